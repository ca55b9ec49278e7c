"""Where the metrics of a run are written besides metrics.jsonl: TensorBoard and Weights & Biases."""

import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from torch.utils.tensorboard import SummaryWriter

from ...shared.errors import DataError, UsageError
from ...shared.storage.files import written_whole
from .record import refuse_deleted


class MetricWriter(Protocol):
    """Writes named numbers of a step somewhere."""

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes the numbers of one step."""
        ...

    def close(self) -> None:
        """Flushes and closes the destination."""
        ...


class TensorBoardWriter:
    """TensorBoard events in RUN/tensorboard; events after step `start` are hidden when a run resumes.

    Raises DataError if the disk is full or the folder cannot be written.
    """

    def __init__(self, out: Path, start: int) -> None:
        self._folder = out / "tensorboard"
        with self._explained():
            self._writer = SummaryWriter(self._folder, purge_step=start + 1 if start else None)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        with self._explained():
            for name, value in scalars.items():
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        with self._explained():
            self._writer.close()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except UnicodeError:
            raise DataError(
                f"{self._folder} is not a UTF-8 name, which TensorBoard needs; choose another --out."
            ) from None
        except OSError as error:  # a thread of TensorBoard writes; its error is raised by a later call
            refuse_deleted(self._folder.parent)
            reason = os.strerror(error.errno) if error.errno else str(error)
            raise DataError(
                f"{self._folder} could not be written ({reason}); make room or make it writable, and give the same "
                "command again."
            ) from None


class WandbWriter:
    """Weights & Biases. RUN/wandb-id.txt keeps the id, so that a resumed run is the same run there.

    Raises UsageError if the library is not installed, nobody is logged in, or its server cannot be reached.
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
        try:
            self._run = wandb.init(
                project=project,
                name=out.absolute().name,
                id=id_file.read_text(),
                resume="allow",
                dir=str(out),
                config=dict(settings),
            )
        except Exception as error:  # of many classes: no login, no permission, no network, an unfit name
            reason = (str(error) or type(error).__name__).strip().splitlines()[0].rstrip(".")
            raise UsageError(
                f"train.wandb={project} cannot start Weights & Biases ({reason}); run wandb login, set "
                "WANDB_MODE=offline, or leave the setting out."
            ) from error

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
