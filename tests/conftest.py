"""Parts that many tests share: drawn pictures, a small real tower, a codebook, a token store. All real, all small."""

import argparse
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # a test must not wait for a hub
# Results are bit-identical for one number of threads; processes that tests start must have the same one. Models are
# too small here for a second thread to help.
os.environ["OMP_NUM_THREADS"] = "1"

from mapet.shared.runtime.console import running_command

from .warm import share, warm_python

REPOSITORY = Path(__file__).parent.parent
RESEARCH_DATA = REPOSITORY.parent / "shared"
K = 16


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-baselines", action="store_true", help="Write down the losses of test_baselines.py.")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("numprocesses", None):  # of pytest-xdist, in the process that starts the others
        share()


@pytest.fixture
def command() -> Iterator[None]:
    """The test runs as a command does: messages, progress and tables are printed, signal handlers may be installed."""
    with running_command():
        yield


@pytest.fixture(autouse=True)
def _printed_output(request: pytest.FixtureRequest) -> None:
    """Functions print only inside a command, so a test that reads what is printed runs inside one."""
    if {"capsys", "capfd"} & set(request.fixturenames):
        request.getfixturevalue("command")


@dataclass(frozen=True)
class Chain:
    """The artifacts of a small chain: 3 tars of 32 drawings (64 px), a codebook with K = 16 (8x8 grid), a store."""

    images: Path
    codebook: Path
    tokens: Path

    @property
    def tars(self) -> list[Path]:
        return sorted(self.images.glob("*.tar"))


@pytest.fixture(scope="session")
def tower(tmp_path_factory: pytest.TempPathFactory) -> str:
    """`local-dir:` name of a tiny open_clip ViT with random weights: 64 px, patch 8, 8x8 grid, 32 features."""
    import open_clip
    import torch
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("tower")
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 64, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16},
        "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1},
    }
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = open_clip.CLIP(**config)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    return f"local-dir:{folder}"


@pytest.fixture(scope="session")
def vqkd_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A VQ-KD checkpoint in its published layout: random weights, 64 px, 4x4 grid, K = 24."""
    import torch

    dim, draw = 64, torch.Generator().manual_seed(3)
    shapes = {
        "encoder.cls_token": (1, 1, dim),
        "encoder.pos_embed": (1, 17, dim),
        "encoder.patch_embed.proj.weight": (dim, 3, 16, 16),
        "encoder.patch_embed.proj.bias": (dim,),
        "encoder.fc_norm.weight": (dim,),
        "encoder.fc_norm.bias": (dim,),
        "encode_task_layer.0.weight": (dim, dim),
        "encode_task_layer.0.bias": (dim,),
        "encode_task_layer.2.weight": (8, dim),
        "encode_task_layer.2.bias": (8,),
        "quantize.embedding.weight": (24, 8),
        "decoder.cls_token": (1, 1, dim),
        "decode_task_layer.0.bias": (dim,),
    }
    block = {"norm1.weight": (dim,), "norm1.bias": (dim,), "norm2.weight": (dim,), "norm2.bias": (dim,)}
    block |= {"attn.q_bias": (dim,), "attn.v_bias": (dim,), "attn.qkv.weight": (3 * dim, dim)}
    block |= {"attn.proj.weight": (dim, dim), "attn.proj.bias": (dim,), "mlp.fc1.weight": (2 * dim, dim)}
    block |= {"mlp.fc1.bias": (2 * dim,), "mlp.fc2.weight": (dim, 2 * dim), "mlp.fc2.bias": (dim,)}
    shapes |= {f"encoder.blocks.0.{name}": shape for name, shape in block.items()}
    tensors = {name: 0.3 * torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    path = tmp_path_factory.mktemp("published") / "vqkd.pth"
    namespace = argparse.Namespace(model="vqkd_encoder_base_decoder_3x768x12_clip")
    torch.save({"model": tensors, "epoch": 99, "args": namespace}, path)
    return path


@pytest.fixture(scope="session")
def dvae_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """DALL-E's encoder with random weights, stride 2, K = 24: a pickled module in both of PyTorch's containers, and
    the state dict of FLAVA. The classes of the module exist only while it is pickled."""
    import torch
    from torch import nn

    class Conv2d(nn.Module):
        def __init__(self, width: int, out: int, size: int):
            super().__init__()
            draw = torch.Generator().manual_seed(width + out * size)
            self.w = nn.Parameter(torch.randn(out, width, size, size, generator=draw) / (width * size * size) ** 0.5)
            self.b = nn.Parameter(torch.randn(out, generator=draw) / 10)

    class EncoderBlock(nn.Module):
        def __init__(self, width: int, out: int):
            super().__init__()
            sizes = ((width, out // 4, 3), (out // 4, out // 4, 3), (out // 4, out // 4, 3), (out // 4, out, 1))
            layers = [
                pair for n, size in enumerate(sizes, 1) for pair in ((f"relu_{n}", nn.ReLU()), (f"conv_{n}", size))
            ]
            named = {name: Conv2d(*layer) if isinstance(layer, tuple) else layer for name, layer in layers}
            self.id_path = Conv2d(width, out, 1) if width != out else nn.Identity()
            self.res_path = nn.Sequential(OrderedDict(named))

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            groups = {
                "input": Conv2d(3, 8, 7),
                "group_1": nn.Sequential(OrderedDict(block_1=EncoderBlock(8, 8), pool=nn.MaxPool2d(2))),
                "group_2": nn.Sequential(OrderedDict(block_1=EncoderBlock(8, 16))),
                "output": nn.Sequential(OrderedDict(relu=nn.ReLU(), conv=Conv2d(16, 24, 1))),
            }
            self.blocks = nn.Sequential(OrderedDict(groups))

    modules = {name: ModuleType(name) for name in ("dall_e", "dall_e.encoder", "dall_e.utils")}
    for module, kind in (("dall_e.encoder", Encoder), ("dall_e.encoder", EncoderBlock), ("dall_e.utils", Conv2d)):
        kind.__module__, kind.__qualname__ = module, kind.__name__
        setattr(modules[module], kind.__name__, kind)
    folder = tmp_path_factory.mktemp("published")
    files = {name: folder / f"{name}.pkl" for name in ("zip", "legacy", "flava")}
    encoder = Encoder()
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        torch.save(encoder, files["zip"])
        torch.save(encoder, files["legacy"], _use_new_zipfile_serialization=False)

    def renamed(name: str) -> str:
        stem, _, last = name.rpartition(".")
        stem = stem.replace(".block_", ".group.block_").replace("res_path.", "res_path.path.")
        return f"{stem}.{ {'w': 'weight', 'b': 'bias'}[last] }"

    torch.save({renamed(name): tensor for name, tensor in encoder.state_dict().items()}, files["flava"])
    return files


@pytest.fixture(scope="session")
def chain(tower: str, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    # Not above: the process that hands tests to the workers of pytest-xdist would import PyTorch before they start.
    from mapet.quickstart.drawings import write_drawings
    from mapet.tokenize_stage.build_codebook import build_codebook
    from mapet.tokenize_stage.encode_shards import encode_shards

    root = tmp_path_factory.mktemp("chain")
    found = Chain(root / "images", root / "codebook", root / "tokens")
    write_drawings(found.images, 96, seed=7, per_tar=32)
    build_codebook(found.images, found.codebook, tower=tower, k=K, restarts=1, iterations=5)
    encode_shards(found.images, found.codebook, found.tokens, batch_size=16)
    return found


def _write_tar(path: Path, files: dict[str, bytes] | Iterable[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in files.items() if isinstance(files, dict) else files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


@pytest.fixture(scope="session")
def write_tar() -> Callable[..., Path]:
    """write_tar(path, {name: bytes, ...} or [(name, bytes), ...])"""
    return _write_tar


def _write_folder(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


@pytest.fixture(scope="session")
def write_folder() -> Callable[..., Path]:
    """write_folder(root, {name: bytes, ...})"""
    return _write_folder


# CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH of the effective and the permitted set; who lacks them need not give them up.
GIVE_UP_READING_EVERYTHING = """
import ctypes
libc, version, sets = ctypes.CDLL(None), (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
assert libc.capget(version, sets) == 0
for each in (0, 1):
    sets[each] &= ~0b110
assert libc.capset(version, sets) == 0
"""


@pytest.fixture(scope="session")
def run_as_owner() -> Callable[..., subprocess.CompletedProcess]:
    """run_as_owner(code, *arguments): Python code in a process that may read only what modes allow, root's too."""

    def run(code: str, *arguments: object) -> subprocess.CompletedProcess:
        command = [*warm_python(), "-c", GIVE_UP_READING_EVERYTHING + code, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True)

    return run


@pytest.fixture(scope="module")
def browser() -> Iterator:
    """A headless Chromium, the system's own; its tests skip where there is none."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright: pages are not opened")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no chromium: pages are not opened")
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield found
        found.close()


class Opened:
    """A page that is open in a browser, and what went wrong on it."""

    def __init__(self, browser, path: Path, fragment: str = "", *, width: int = 1440, scheme: str = "light"):
        self.context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, reduced_motion="reduce"
        )
        self.page = self.context.new_page()
        self.problems: list[str] = []
        self.page.on("console", lambda said: self.problems.append(f"{said.type}: {said.text}"))
        self.page.on("pageerror", lambda error: self.problems.append(f"error: {error}"))
        self.page.on("request", self._note_request)
        self.page.goto(f"file://{path}{fragment}")

    def _note_request(self, request) -> None:
        if not request.url.startswith(("file://", "data:")):
            self.problems.append(f"request: {request.url}")

    def faults(self) -> list[str]:
        """What axe-core finds serious or critical."""
        axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="no axe: pages are not audited")
        found = axe.Axe().run(self.page, options={"resultTypes": ["violations"]}).response["violations"]
        return [
            f"{one['id']}: {node['html'][:200]}"
            for one in found
            if one["impact"] in ("serious", "critical")
            for node in one["nodes"]
        ]


@pytest.fixture
def open_page(browser) -> Iterator[Callable[..., Opened]]:
    """open_page(path, fragment="", width=1440, scheme="light"): no console message, error or request may have come."""
    opened: list[Opened] = []

    def open_one(path: Path, fragment: str = "", **options) -> Opened:
        opened.append(Opened(browser, path, fragment, **options))
        return opened[-1]

    yield open_one
    for one in opened:
        one.context.close()
        assert one.problems == []


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def served(tmp_path: Path):
    """The URL of `tmp_path`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
