"""--dry-run says what a run amounts to, and writes nothing."""

import pytest
import torch
from mapet.shared.runtime.distributed import World
from mapet.shared.runtime.memory import as_text
from mapet.train_stage.model.mapet import MaPeT
from mapet.train_stage.objectives.layouts import step_layout
from mapet.train_stage.objectives.token_loss import token_loss
from mapet.train_stage.pretrain import pretrain_dry_run
from mapet.train_stage.settings import resolve
from mapet.train_stage.tasks.pretraining import PretrainingModel, flops_per_image, parameters_of
from mapet.train_stage.training import dry_run
from mapet.train_stage.training.dry_run import MemoryEstimate, estimate_memory, estimate_run, show_estimate
from mapet.train_stage.training.plan import make_plan
from torch.utils.flop_counter import FlopCounterMode

from ..conftest import SHORT, TINY

SETTINGS = [*TINY, *SHORT, "train.batch_size=16", "train.epochs=4", "optimizer.warmup_epochs=1"]


def test_the_plan_is_estimated_and_printed(chain, capsys):
    estimate = pretrain_dry_run(chain.images, chain.tokens, overrides=SETTINGS, device="cpu")
    assert estimate.steps.count == 10
    assert estimate.seconds == pytest.approx(24 * estimate.steps.mean)
    capsys.readouterr()
    show_estimate(estimate)
    text = capsys.readouterr().out
    for words in (
        "dim 32, depth 2, 2 heads, 34,448 parameters",
        "16 of 64 patches given",
        "113 content rows + 48 query rows",  # 1 + 64 and 48 auxiliary; 48
        "96; 96 per epoch",
        "16 = 1 process(es) x 1 part(s) x 16 images",
        "24 = 4 epochs x 6",
        "6 steps from 1e-06 to 0.0015",
        "Measured in 10 steps",
    ):
        assert words in text, words


def test_nothing_is_measured_where_there_is_too_little_memory(chain, capfd, monkeypatch):
    monkeypatch.setattr(dry_run, "free_bytes", lambda: 1 << 20)
    estimate = pretrain_dry_run(chain.images, chain.tokens, overrides=SETTINGS, device="cpu")
    assert estimate.steps is None
    show_estimate(estimate)
    output, errors = capfd.readouterr()
    assert "Measured" not in output
    assert "are needed and 1.05 MB are free. Lower execution.micro_batch" in errors


@pytest.mark.parametrize("objective", ["mapet", "pim", "mim"])
def test_flops_are_those_of_a_real_step(objective: str):
    settings = resolve(overrides=[*SETTINGS, f"objective.name={objective}"])
    model, layout = MaPeT(settings.model.shape(16)), step_layout(settings.objective, 64, 0, 0, 1, "cpu")
    order, targets = torch.randperm(64).expand(3, 64), torch.zeros(3, len(layout.ranks), dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        rows = model.predict_rows(torch.randn(3, 3, 64, 64), order, layout)
        token_loss(rows, model.decoder, targets)[0].backward()
    assert counter.get_total_flops() == 3 * flops_per_image(settings, 16)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters_of(settings.model.shape(16))


@pytest.mark.parametrize(
    ("start", "end", "rows"),
    [(14, 26, []), (26, 14, ["objective.query_rows=8", "objective.visible_change=random"]), (20, 21, []), (30, 30, [])],
)
def test_flops_of_a_schedule_are_the_mean_over_it(start: int, end: int, rows: list[str]):
    schedule = [f"objective.visible={start}", f"objective.visible_to={end}"]
    found = flops_per_image(resolve(overrides=[*SETTINGS, *schedule, *rows]), 16)
    low, high = sorted((start, end))
    settings = (resolve(overrides=[*SETTINGS, f"objective.visible={n}", *rows]) for n in range(low, high + 1))
    assert found == pytest.approx(sum(flops_per_image(one, 16) for one in settings) / (high - low + 1), rel=2e-3)


SHALLOW = ["model.name=null", "model.dim=192", "model.depth=4", "model.heads=3", "train.batch_size=64"]
"""ViT-T with a third of its blocks."""


def estimate_of(*overrides: str, world: World | None = None, device: str = "cpu") -> MemoryEstimate:
    settings = resolve(overrides=[*SHALLOW, *overrides])
    world = world or World()
    return estimate_memory(PretrainingModel(settings, 8192), make_plan(settings, 1000, world.size), world, device)


def memory_of(*overrides: str, world: World | None = None, device: str = "cpu") -> int:
    return estimate_of(*overrides, world=world, device=device).device


def test_the_memory_estimate_knows_what_saves_memory():
    whole = memory_of()
    assert memory_of("execution.micro_batch=8") < 0.4 * whole
    assert memory_of("execution.grad_checkpointing=true") < 0.5 * whole
    assert memory_of("train.precision=bfloat16") < whole
    assert memory_of("train.ema=0.99") > whole
    assert memory_of("execution.micro_batch=8", "execution.parallel=fsdp", world=World(1, 8)) < memory_of(
        "execution.micro_batch=8", world=World(1, 8)
    )


def test_copies_for_checkpoints_are_added_to_steps_that_follow_one():
    settings = resolve(overrides=[*SHALLOW, "train.epochs=20"])
    steps, copies = make_plan(settings, 1000).steps, estimate_of("train.epochs=20").checkpoint_copies
    at_the_end, before = (
        memory_of("train.epochs=20", f"train.checkpoint_every={every}") for every in (steps, steps - 1)
    )
    assert copies == 3 * 4 * parameters_of(settings.model.shape(8192))
    assert before - at_the_end == copies


def test_a_gpu_holds_no_copies_and_computes_in_bfloat16():
    often, never = (f"train.checkpoint_every={every}" for every in (1, 10**6))
    assert memory_of(often, device="cuda") == memory_of(never, device="cuda")
    assert memory_of(device="cuda") == memory_of("train.precision=bfloat16", device="cuda")
    assert memory_of(device="cuda") < memory_of("train.precision=float32", device="cuda")


def test_the_host_memory_of_a_gpu_run_is_printed_apart(capsys, monkeypatch):
    settings = resolve(overrides=SHALLOW)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1, 1))
    estimate = estimate_run(PretrainingModel(settings, 64), make_plan(settings, 1000), World(), "cuda")
    show_estimate(estimate)
    text = capsys.readouterr().out
    assert "per process, on the GPU" in text
    assert f"{as_text(estimate.memory.checkpoint_copies)} for checkpoints, first process" in text


def test_the_memory_estimate_is_that_of_the_largest_step_of_a_schedule():
    of_few, of_many = (estimate_of(f"objective.visible={visible}").device for visible in (180, 20))
    assert of_few < of_many
    for start, end in ((180, 20), (20, 180)):
        scheduled = estimate_of(f"objective.visible={start}", f"objective.visible_to={end}")
        assert scheduled.device == of_many
