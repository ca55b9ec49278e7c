"""Trains the weights that the package carries, with the package's own commands, and writes them for timm to open.

    python -m mapet.quickstart.train_weights --work work --out train_stage/weights/shipped/mapet-drawings-tiny

Drawings, a codebook over patch features of the demo's tower, tokens, MaPeT pre-training, export. Every part resumes in
`--work`. The series of the drawings is one that neither the demo nor the tower's training draws.
"""

from pathlib import Path
from typing import Annotated

import typer

from ..shared.runtime.console import running_command
from ..tokenize_stage.build_codebook import build_codebook
from ..tokenize_stage.encode_shards import encode_shards
from ..train_stage.export import export
from ..train_stage.pretrain import pretrain
from .demo import MODEL_SETTINGS, SERIES_OF_WEIGHTS, TOWER, K, draw_tars

IMAGES = 24_000
SETTINGS = {**MODEL_SETTINGS, "train.batch_size": 16, "train.epochs": 2, "optimizer.warmup_epochs": 0.25}


def main(work: Annotated[Path, typer.Option()], out: Annotated[Path, typer.Option()]) -> None:
    images = work / "drawings"
    draw_tars(images, IMAGES, SERIES_OF_WEIGHTS)
    build_codebook(str(images), work / "codebook", tower=f"local-dir:{TOWER}", k=K, restarts=1, patches=200_000, seed=0)
    encode_shards(str(images), work / "codebook", work / "tokens")
    overrides = [f"{key}={value}" for key, value in SETTINGS.items()]
    pretrain(str(images), work / "tokens", work / "run", overrides=overrides)
    export(work / "run", out)


if __name__ == "__main__":
    with running_command():
        typer.run(main)
