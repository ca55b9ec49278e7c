"""PyTorch's private functions and their public fallbacks: the results agree, and nothing else touches private names."""

import ast
import importlib.util
import multiprocessing
import os
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from mapet.shared.runtime import compat
from torch import Tensor
from torch.utils.data import DataLoader

ROOT = Path(__file__).parent.parent.parent.parent
HOUSES = ("quickstart", "shared", "tokenize_stage", "train_stage")


@pytest.fixture
def without_private_names(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A second copy of the module, imported where PyTorch has none of the private names that it looks for."""
    monkeypatch.setattr(torch.ops, "aten", SimpleNamespace())
    for module in ("torch._subclasses.fake_tensor", "torch.utils._python_dispatch"):
        monkeypatch.setitem(sys.modules, module, None)
    spec = importlib.util.spec_from_file_location("mapet.shared.runtime.compat_without", compat.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.undo()
    return module


def private_names(path: Path, defined: set[str]) -> list[str]:
    """Private names of other packages that a module uses: those of attributes that this package never defines."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and _is_private(node.attr) and node.attr not in defined:
            names.append(f"{path.name}:{node.lineno} {node.attr}")
        if isinstance(node, ast.Import):
            parts = [part for alias in node.names for part in alias.name.split(".")]
            names += [f"{path.name}:{node.lineno} {part}" for part in parts if _is_private(part)]
        if isinstance(node, ast.ImportFrom) and not node.level:
            parts = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            names += [f"{path.name}:{node.lineno} {part}" for part in parts if _is_private(part)]
    return names


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_exit"  # os._exit is documented


def defined_names(path: Path) -> set[str]:
    """Names of functions, classes, variables and attributes that a module defines."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.attr)
    return names


def test_no_other_module_touches_a_private_name_of_pytorch(tmp_path: Path):
    paths = [path for house in HOUSES for path in (ROOT / house).rglob("*.py")] + sorted(ROOT.glob("*.py"))
    defined = set().union(*map(defined_names, paths))
    found = {path.relative_to(ROOT).as_posix(): private_names(path, defined) for path in paths}
    assert {path: names for path, names in found.items() if names and path != "shared/runtime/compat.py"} == {}
    assert found["shared/runtime/compat.py"]
    for line in (
        "torch.ops.aten._flash(x)",
        "import torch._subclasses",
        "from torch.utils._pytree import tree_iter",
        "from torch import _dynamo",
        "loader._shutdown_workers()",
    ):
        (tmp_path / "bad.py").write_text(f"{line}\n")
        assert private_names(tmp_path / "bad.py", defined), line


@pytest.fixture(params=[False, True], ids=["unmasked", "masked"])
def attention_inputs(request: pytest.FixtureRequest) -> dict[str, Any]:
    random = torch.Generator().manual_seed(0)
    shapes = {"query": 7, "key": 11, "value": 11}
    inputs: dict[str, Any] = {name: torch.randn(2, 3, rows, 8, generator=random) for name, rows in shapes.items()}
    allowed = torch.rand(7, 11, generator=random) < 0.5
    allowed[:, 0] = True
    mask = torch.zeros(7, 11).masked_fill_(~allowed, float("-inf"))
    return inputs | {"attn_mask": mask if request.param else None}


def test_attention_falls_back_to_public_arithmetic(without_private_names: ModuleType, attention_inputs: dict[str, Any]):
    assert without_private_names.flash_attention is without_private_names.public_flash_attention
    assert compat.flash_attention is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    for scale in (None, 0.3):
        private = compat.flash_attention(**attention_inputs, scale=scale)
        public = without_private_names.flash_attention(**attention_inputs, scale=scale)
        for one, other in zip(private, public, strict=True):
            torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5)
    with pytest.raises(NotImplementedError, match="neither dropout nor causal"):
        without_private_names.flash_attention(**attention_inputs, is_causal=True)


def test_the_backward_of_attention_falls_back_to_public_arithmetic(
    without_private_names: ModuleType, attention_inputs: dict[str, Any]
):
    assert compat.flash_attention_backward is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    mask = attention_inputs.pop("attn_mask")
    leaves: list[Tensor] = [tensor.requires_grad_() for tensor in attention_inputs.values()]
    out, log_sums = without_private_names.flash_attention(*leaves, attn_mask=mask)
    grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    by_autograd = torch.autograd.grad(out, leaves, grad_out)
    saved = (grad_out, *(leaf.detach() for leaf in leaves), out.detach(), log_sums.detach())
    private = compat.flash_attention_backward(*saved, 0.0, False, attn_mask=mask)
    public = without_private_names.flash_attention_backward(*saved, 0.0, False, attn_mask=mask)
    for one, other, expected in zip(private, public, by_autograd, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(other, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["resize_bicubic", "resize_bilinear"])
@pytest.mark.parametrize(
    ("height", "width", "size", "scales", "tolerance"),
    [
        (60, 90, (20, 30), (1 / 3, 1 / 3), 0),
        (61, 90, (20, 28), (0.34, 0.32), 0),
        (20, 33, (60, 98), (3.01, 2.99), 0),
        # Sizes that `interpolate` would not derive from these scales: one more than the floor.
        (59, 90, (20, 30), (1 / 3, 1 / 3), 1),
        (23, 23, (24, 24), (1.02, 1.02), 1),
    ],
)
def test_the_resize_falls_back_to_interpolate_or_to_weights(
    without_private_names: ModuleType,
    name: str,
    height: int,
    width: int,
    size: tuple[int, int],
    scales: tuple[float, float],
    tolerance: int,
):
    assert getattr(without_private_names, name) is getattr(without_private_names, f"public_{name}")
    assert getattr(compat, name) is not getattr(compat, f"public_{name}")
    random = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (1, 3, height, width), dtype=torch.uint8, generator=random)
    pixels = pixels.contiguous(memory_format=torch.channels_last)
    private = getattr(compat, name)(pixels, list(size), False, *scales)
    public = getattr(without_private_names, name)(pixels, list(size), False, *scales)
    assert public.dtype == torch.uint8
    assert public.shape == private.shape
    assert (public.int() - private.int()).abs().max() <= tolerance


class _Plain:
    """An iterator without the private names of the loader's own."""

    def __init__(self, batches: Any):
        self.batches = batches

    def __iter__(self) -> "_Plain":
        return self

    def __next__(self) -> Any:
        return next(self.batches)


class _PlainLoader:
    def __init__(self, loader: DataLoader):
        self.loader = loader

    def __iter__(self) -> _Plain:
        return _Plain(iter(self.loader))


class _ProcessIds(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> int:
        return os.getpid()


@pytest.mark.parametrize("private", [True, False])
def test_workers_are_found_and_ended_with_and_without_the_loaders_internals(private: bool):
    loader: Any = DataLoader(_ProcessIds(), batch_size=None, num_workers=2, multiprocessing_context="fork")
    other = multiprocessing.get_context("fork").Process(target=_wait, daemon=True)
    other.start()
    batches = compat.start_workers(loader if private else _PlainLoader(loader))
    pids = compat.worker_pids(batches)
    assert len(pids) == 2
    assert set(batches) == set(pids)
    compat.shut_down_workers(batches)
    assert {child.pid for child in multiprocessing.active_children()} & set(pids) == set()
    assert other.is_alive()
    other.kill()
    other.join()


def _wait() -> None:
    time.sleep(60)


def test_a_loader_without_workers_has_no_processes():
    batches = compat.start_workers(DataLoader(_ProcessIds(), batch_size=None))
    assert compat.worker_pids(batches) == []
    assert next(batches) == os.getpid()


def step() -> Tensor:
    """A forward and backward pass: 8 MB of weights and gradients, activations of 1 MB each."""
    model = torch.nn.Sequential(torch.nn.Linear(1000, 1000), torch.nn.GELU(), torch.nn.Linear(1000, 1000))
    indexes = torch.empty(250, dtype=torch.int64)
    rows = torch.empty(2000, 1000)[indexes]
    model(rows).sum().backward()
    return indexes


def test_bytes_are_counted_without_content_and_without_private_modes(without_private_names: ModuleType):
    assert without_private_names.LiveBytes is without_private_names.PublicLiveBytes
    assert compat.LiveBytes is not compat.PublicLiveBytes
    peaks = []
    for module in (compat, without_private_names):
        live = module.LiveBytes()
        with module.fake_tensors(), live:
            indexes = step()
        peaks.append(live.peak)
    assert type(indexes) is Tensor
    assert indexes.tolist() == [0] * 250  # computed, and with valid indexes
    assert peaks[0] > 16e6
    assert peaks[1] == pytest.approx(peaks[0], rel=0.02)
