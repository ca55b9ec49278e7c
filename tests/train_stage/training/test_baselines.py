"""Losses of three short seeded runs, as they were when they were last known to be right.

Where a change is meant to change them: pytest tests/train_stage/training/test_baselines.py --write-baselines
"""

import csv
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from mapet.shared.images.decode import read_image
from mapet.shared.images.views import Preprocess, center_view, to_array
from mapet.shared.sources.sources import read_records
from mapet.tokenize_stage.import_tokens import import_tokens
from mapet.train_stage.pretrain import pretrain
from mapet.train_stage.settings import resolve
from mapet.train_stage.tasks.pretraining import PretrainingModel

BASELINES = Path(__file__).parent / "baselines.json"
RUNS = {
    "mapet": ["objective.name=mapet", "train.seed=1"],
    "pim, block permutations, few query rows": [
        "objective.name=pim",
        "objective.permutation=block",
        "objective.query_rows=20",
        "train.seed=2",
    ],
    "mim, no jitter": ["objective.name=mim", "data.color_jitter=0", "train.seed=3"],
}
SETTINGS = [
    "model.name=null",
    "model.dim=64",
    "model.depth=3",
    "model.heads=4",
    "model.image_size=64",
    "model.patch_size=8",
    "train.epochs=6",
    "train.batch_size=16",
    "optimizer.warmup_epochs=1",
    "train.log_every=6",
]
SIDE, K = 8, 16


@pytest.fixture(scope="module")
def tokens(chain, tmp_path_factory) -> Path:
    """A store whose tokens say how bright a patch is: no tower and no k-means, which may differ between machines."""
    root = tmp_path_factory.mktemp("bright")
    records = read_records(chain.images)
    size = 8 * SIDE
    preprocess = Preprocess(size, "shortest", size, "bicubic", (0.5,) * 3, (0.5,) * 3)
    found = []
    for record in records:
        grey = to_array(center_view(read_image(record)[0], preprocess)).mean(0)
        patches = grey.reshape(SIDE, 8, SIDE, 8).mean((1, 3))
        found.append((patches * K // 256).astype(np.int64))
    np.save(root / "tokens.npy", np.stack(found))
    with open(root / "list.csv", "w", newline="") as file:
        csv.writer(file).writerows([["key"], *([record.key] for record in records)])
    import_tokens(
        root / "store",
        tokens=root / "tokens.npy",
        csv=root / "list.csv",
        images=chain.images,
        codebook=chain.codebook,
    )
    return root / "store"


def digest_of_fresh_weights(settings: list[str]) -> str:
    """Which weights a run starts from: releases of PyTorch draw other truncated normals from the same seed."""
    tensors = PretrainingModel(resolve(overrides=settings), K).new_model().state_dict()
    whole = hashlib.sha256()
    for name in sorted(tensors):
        whole.update(tensors[name].numpy().tobytes())
    return whole.hexdigest()


@pytest.mark.parametrize("name", RUNS)
def test_losses_are_those_that_were_written_down(chain, tokens: Path, tmp_path: Path, request, name: str):
    settings = [*SETTINGS, *RUNS[name]]
    pretrain(chain.images, tokens, tmp_path, overrides=settings, device="cpu")
    losses = [json.loads(line)["loss"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0] - 0.1
    known = json.loads(BASELINES.read_text()) if BASELINES.exists() else {}
    start = digest_of_fresh_weights(settings)
    if request.config.getoption("--write-baselines"):
        known[name] = {"fresh_weights_sha256": start, "losses": losses}
        BASELINES.write_text(json.dumps(known, indent=1) + "\n")
    elif known[name]["fresh_weights_sha256"] != start:
        pytest.skip(f"PyTorch {torch.__version__} draws other fresh weights than the baselines' release")
    else:
        assert losses == pytest.approx(known[name]["losses"], rel=1e-3)
