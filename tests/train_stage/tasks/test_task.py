"""The machinery of a run knows no task: a task of sixty lines gets a run folder, metrics, checkpoints and resume."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from mapet.shared.errors import UsageError
from mapet.shared.runtime.distributed import World
from mapet.shared.sources.records import read_bytes
from mapet.shared.tokens.store import TokenStore
from mapet.train_stage.data.dataset import TokenisedImages
from mapet.train_stage.data.join import join
from mapet.train_stage.pretrain import pretrain
from mapet.train_stage.runs.loop import train
from mapet.train_stage.runs.opening import open_run
from mapet.train_stage.runs.resume import find_resume_point
from mapet.train_stage.settings import Settings, resolve
from mapet.train_stage.training.dry_run import estimate_memory
from mapet.train_stage.training.plan import make_plan
from mapet.train_stage.training.task import Places, StepInputs, Task, TaskLoss
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..conftest import SHORT, TINY

SETTINGS = [
    *TINY,
    *SHORT,
    "train.batch_size=16",
    "optimizer.lr=0.1",
    "train.log_every=2",
    "train.checkpoint_every=4",
    "train.keep_last=9",
]


@dataclass(frozen=True, eq=False)
class SizeBatch:
    index: Tensor
    sizes: Tensor
    labels: Tensor

    def to(self, device: torch.device | str) -> "SizeBatch":
        return SizeBatch(self.index.to(device), self.sizes.to(device), self.labels.to(device))


class SizeLoss(TaskLoss):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def compile_surroundings(self) -> None: ...

    def at_step(self, step: int, steps: int) -> StepInputs:
        return StepInputs([1])

    def forward(self, batch: SizeBatch, inputs: StepInputs) -> tuple[Tensor, Tensor]:
        logits = self.model(batch.sizes)
        return cross_entropy(logits, batch.labels), (logits.argmax(1) == batch.labels).float().sum()[None]


class SizeTask(Task[SizeBatch]):
    """Predicts from the number of an image's bytes whether it is larger than 2 KiB."""

    name = "size"

    def __init__(self, settings: Settings, images: TokenisedImages) -> None:
        self.settings, self.images = settings, images

    def new_model(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.settings.train.seed)
            return nn.Sequential(nn.Sequential(nn.Linear(1, 16)))

    def blocks(self, model: nn.Module) -> nn.ModuleList:
        return nn.ModuleList(model)

    def loss(self, model: nn.Module, device: str, precision: str) -> SizeLoss:
        return SizeLoss(model)

    def without_weight_decay(self, name: str, parameter: Tensor) -> bool:
        return parameter.ndim == 1

    def example_batch(self, count: int) -> SizeBatch:
        return SizeBatch(torch.zeros(count), torch.zeros(count, 1), torch.zeros(count, dtype=torch.int64))

    def flops_per_image(self) -> int:
        return 6 * 16

    def describe(self, steps: int) -> list[tuple[str, str]]:
        return [("model", "one layer")]

    def batches(self, places: Iterator[Places], workers: int, *, pin_memory: bool) -> Iterator[SizeBatch]:
        for batch in places:
            records = [self.images.record(index) for _, index in batch]
            sizes = torch.tensor([[len(read_bytes(record)) / 4096] for record in records])
            labels = (sizes[:, 0] > 0.5).long()
            yield SizeBatch(torch.tensor([index for _, index in batch]), sizes, labels)

    def checkpoint_metadata(self) -> dict[str, Any]:
        return {"unit": "4 KiB"}

    def run_metadata(self) -> dict[str, Any]:
        return {"unit": "4 KiB"}

    def start_from(self, model: nn.Module, weights: str | Path) -> dict[str, str]:
        raise UsageError("this task starts fresh")

    def evaluation_interval(self, steps_per_epoch: int) -> None:
        return None

    def evaluator(self, device: str) -> None:
        return None


def run_task(images: TokenisedImages, out: Path, *overrides: str) -> Path:
    settings = resolve(overrides=[*SETTINGS, *overrides])
    task = SizeTask(settings, images)
    point = find_resume_point(out, "auto", task.name, settings, resolve(), lambda before: None)
    run = open_run(task, out, point, None, "cpu", World())
    with run.logbook:
        return train(run)


@pytest.fixture(scope="module")
def images(chain) -> TokenisedImages:
    return join(chain.images, TokenStore(chain.tokens))


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_task_of_its_own_trains_logs_and_resumes_bit_identically(images, tmp_path: Path):
    path = run_task(images, tmp_path / "run")
    logged = lines(tmp_path / "run")
    assert [line["step"] for line in logged] == [2, 4, 6, 8, 10, 12]
    assert logged[-1]["loss"] < logged[0]["loss"]
    assert all("accuracy" in line and "accuracy_by_rank" not in line for line in logged)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["unit"] == "4 KiB"
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    for newer in ("step-0000012", "step-0000008"):
        shutil.rmtree(tmp_path / "again" / "checkpoints" / newer)
    again = run_task(images, tmp_path / "again")
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (again / name).read_bytes() == (path / name).read_bytes()
    assert [line["loss"] for line in lines(tmp_path / "again")] == [line["loss"] for line in logged]
    assert set(load_file(path / "model.safetensors")) == {"0.0.weight", "0.0.bias"}


def test_a_folder_of_another_task_is_refused(chain, images, tmp_path: Path):
    run_task(images, tmp_path / "run")
    with pytest.raises(UsageError, match=r"holds a run of another task \(size, not pretraining\)"):
        pretrain(chain.images, chain.tokens, tmp_path / "run", overrides=SETTINGS, device="cpu")


def test_the_memory_of_any_task_is_estimated(images):
    settings = resolve(overrides=SETTINGS)
    estimate = estimate_memory(SizeTask(settings, images), make_plan(settings, 96), World(), "cpu")
    assert estimate.checkpoint_copies == 3 * 4 * 32
