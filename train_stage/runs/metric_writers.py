"""Where metrics are written besides metrics.jsonl: TensorBoard and Weights & Biases."""

import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...shared.errors import UsageError
from ...shared.storage.files import written_whole


def start_wandb(project: str, out: Path, settings: Mapping[str, Any]) -> Any:
    try:
        import wandb
    except ImportError:
        raise UsageError("train.wandb needs Weights & Biases; pip install wandb, or leave the setting out.") from None
    known = out / "wandb-id.txt"  # so that a run which goes on is the same one there
    if not known.exists():
        with written_whole(known) as partial:
            partial.write_text(secrets.token_hex(4))
    return wandb.init(
        project=project,
        name=out.absolute().name,
        id=known.read_text(),
        resume="allow",
        dir=str(out),
        config=dict(settings),
    )
