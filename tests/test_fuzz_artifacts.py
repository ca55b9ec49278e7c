"""Artifacts of strangers: sealed, but wrong in one place. Each is refused by one sentence, or opened without harm.

Every mutation is drawn by a seed and sealed again (digests and checksums are recomputed), so that it reaches what is
behind them. All mutations of a kind are opened in one process of limited memory, with an audit hook that notes every
file that is opened.
"""

import json
import subprocess
from pathlib import Path

import pytest

from .warm import warm_python

KINDS = (
    "codebook",
    "centroids",
    "manifest",
    "entry",
    "zarr",
    "tar",
    "state",
    "weights",
    "export",
    "tensors",
    "yaml",
    "log",
)
FEW, MANY = 10, 200  # the few are the first of the many


@pytest.fixture(scope="module")
def artifacts(chain, tower, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One artifact of every kind."""
    from mapet import encode_shards, export, import_weights, pretrain

    root = tmp_path_factory.mktemp("artifacts")
    (root / "images").symlink_to(chain.images)
    (root / "codebook").symlink_to(chain.codebook)
    encode_shards(chain.images, chain.codebook, root / "tokens")
    encode_shards(chain.images, chain.codebook, root / "tars", format="webdataset", crop="random-resized", views=2)
    sizes = ["dim=32", "depth=1", "heads=2", "image_size=64", "patch_size=8"]
    settings = [f"model.{size}" for size in sizes] + [
        "train.epochs=1",
        "train.batch_size=32",
        "optimizer.warmup_epochs=0",
    ]
    pretrain(chain.images, root / "tokens", root / "run", overrides=settings)
    import_weights(root / "run", root / "weights")
    export(root / "run", root / "export")
    return root


def fuzz(artifacts: Path, work: Path, count: int, *kinds: str) -> list[dict]:
    """What became of `count` mutations of each kind: description, outcome, seconds, and files opened elsewhere."""
    command = [
        *warm_python(),
        str(Path(__file__).with_name("fuzzing.py")),
        str(artifacts),
        str(work),
        str(count),
        *kinds,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60 + 10 * count * len(kinds))
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.fixture(scope="module")
def few(artifacts: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    return fuzz(artifacts, tmp_path_factory.mktemp("few") / "work", FEW, *KINDS)


def assert_harmless(results: list[dict], count: int) -> None:
    assert len(results) == count
    assert [result for result in results if result["outcome"] not in ("opened", "refused")] == []
    assert [result for result in results if result["seconds"] > 10] == []
    assert [result for result in results if result["outside"]] == []
    assert max(result["memory_mb"] for result in results) < 2000
    assert sum(result["outcome"] == "refused" for result in results) >= count // 4


@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_artifact_is_refused_or_harmless(few: list[dict], kind: str):
    assert_harmless([result for result in few if result["kind"] == kind], FEW)


@pytest.mark.campaign
@pytest.mark.parametrize("kind", KINDS)
def test_two_hundred_wrong_artifacts_of_each_kind(artifacts: Path, tmp_path: Path, kind: str):
    assert_harmless(fuzz(artifacts, tmp_path / "work", MANY, kind), MANY)
