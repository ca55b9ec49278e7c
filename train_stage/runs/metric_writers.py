"""Where the metrics of a run are written besides metrics.jsonl: TensorBoard and Weights & Biases."""

import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torch.utils.tensorboard import SummaryWriter

from ...shared.errors import UsageError
from ...shared.storage.files import written_whole


class MetricWriter(Protocol):
    """Writes named numbers of a step somewhere."""

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes the numbers of one step."""
        ...

    def close(self) -> None:
        """Flushes and closes the destination."""
        ...


class TensorBoardWriter:
    """TensorBoard events in RUN/tensorboard; events after step `start` are hidden when a run resumes."""

    def __init__(self, out: Path, start: int) -> None:
        self._writer = SummaryWriter(out / "tensorboard", purge_step=start + 1 if start else None)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WandbWriter:
    """Weights & Biases. RUN/wandb-id.txt keeps the id, so that a resumed run is the same run there.

    Raises UsageError if the library is not installed.
    """

    def __init__(self, project: str, out: Path, settings: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError:
            raise UsageError(
                "train.wandb needs Weights & Biases; pip install wandb, or leave the setting out."
            ) from None
        id_file = out / "wandb-id.txt"
        if not id_file.exists():
            with written_whole(id_file) as partial:
                partial.write_text(secrets.token_hex(4))
        self._run = wandb.init(
            project=project,
            name=out.absolute().name,
            id=id_file.read_text(),
            resume="allow",
            dir=str(out),
            config=dict(settings),
        )

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log(dict(scalars), step=step)

    def close(self) -> None:
        self._run.finish()


def open_writers(out: Path, start: int, wandb: str | None, settings: Mapping[str, Any]) -> list[MetricWriter]:
    """The writers of a run that starts or resumes at step `start`; `wandb` is a project or None."""
    writers: list[MetricWriter] = [TensorBoardWriter(out, start)]
    if wandb is not None:
        writers.append(WandbWriter(wandb, out, settings))
    return writers
