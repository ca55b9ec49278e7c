"""The dry run of a study, against counts by hand."""

import dataclasses
from pathlib import Path

import pytest
import torch
import yaml
from mapet.shared.errors import DataError, UsageError
from mapet.studies import plan
from mapet.studies.graph import Inputs, build_graph
from mapet.studies.plan import study_dry_run
from mapet.studies.schema import STUDIES, Budget, read_study
from mapet.tokenize_stage.towers import cost
from mapet.tokenize_stage.towers.cost import TowerCost, tower_cost
from mapet.tokenize_stage.towers.tower import TowerSettings
from msgspec.structs import replace

SMOKE = yaml.safe_load((STUDIES / "smoke.yaml").read_text())


@pytest.fixture(scope="module")
def pixels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smoke study on tokens of pixels, whose tower costs nothing, with fine-tuning."""
    path = tmp_path_factory.mktemp("plan") / "pixels.yaml"
    book = {"tower": "pixels:8", "image_size": 64, "k": 16, "restarts": 2, "iterations": 5, "patches": 4000}
    changes = {"tokenizers": {"pixels": {"codebook": book, "tokens": {"views": 2}}}}
    changes |= {"evaluations": ["linear", "finetuned"], "finetuning_recipe": "finetune-small-data"}
    changes |= {"finetuning": {"train.epochs": 3, "train.batch_size": 50, "optimizer.warmup_epochs": 0}}
    path.write_text(yaml.safe_dump({**SMOKE, **changes}))
    return path


def test_steps_images_and_bytes_are_those_that_are_counted_by_hand(pixels: Path, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = study_dry_run(pixels)
    steps = {kind: (cost.steps, cost.images) for kind, cost in found.kinds.items()}
    # 160 images; 4000 of 10240 patches leave out no image but with probability e^-25. 3 epochs of 150 images.
    assert steps["codebook"] == (1, 160)
    assert steps["tokens"] == (1, 320)
    assert steps["probe"] == (8, 8 * 160)
    assert steps["classifier"] == (8, 8 * 3 * 150)
    # k-means: 4000 x (2 restarts x 5 iterations + 1 assignment) x 16 codes x 192 numbers x 2.
    assert found.kinds["codebook"].flops == 2 * 192 * 4000 * 16 * (2 * 5 + 1)
    assert found.kinds["codebook"].bytes == 4 * 16 * 192
    assert found.kinds["tokens"].bytes == 2 * 320 * 64
    assert found.kinds["run"].images == sum(
        step.images_seen for step in build_graph(read_study(pixels), Inputs("a", "b", 160, Path("c"))).steps.values()
        if step.kind == "run"
    )  # fmt: skip
    assert list(tmp_path.iterdir()) == []


def test_a_plain_vit_is_counted_as_by_hand(pixels: Path):
    # Forward: patch embedding, 12 products of rows with dim x dim in the block, and two of rows with rows.
    n, d = 64, 32
    embedding, block, attention = 2 * n * 192 * d, 2 * (n + 1) * d * d * 12, 2 * 2 * (n + 1) ** 2 * d
    # Backward is twice forward, but pixels have no gradient, and attention computes one of its products again.
    training = 3 * (embedding + block + attention) - embedding + attention / 2
    probe = study_dry_run(pixels).kinds["probe"]
    assert probe.flops / probe.images == pytest.approx(training / 3, rel=1e-3)


def test_hours_follow_from_the_rate(pixels: Path):
    found = study_dry_run(pixels, flops_per_second=1e9)
    hours = [found.hours(cost) for cost in found.kinds.values()]
    assert found.hours(found.total) == pytest.approx(sum(hours))
    assert hours[2] == pytest.approx(found.kinds["run"].flops / 1e9 / 3600)
    assert study_dry_run(pixels).hours(found.total) is None
    with pytest.raises(UsageError, match="--flops-per-second 0 must be a positive number"):
        study_dry_run(pixels, flops_per_second=0)


def test_checkpoints_are_weights_and_two_moments(pixels: Path):
    # One block of width 32: embedding, positions, class and mask tokens, block with LayerScale, norm, head of 16 codes.
    d, k = 32, 16
    block = 12 * d * d + 9 * d + 2 * d + 2 * 2 * d
    weights = 192 * d + d + 65 * d + d + d + block + 2 * d + d * k + k
    study = read_study(pixels)
    graph = build_graph(study, Inputs("a", "b", 160, Path("c")))
    run = next(step for step in graph.steps.values() if step.kind == "run")
    assert plan._of_run(run, 160).bytes == 3 * 4 * weights


def test_a_model_of_another_grid_than_its_tokens_is_refused(tmp_path: Path):
    path = tmp_path / "grid.yaml"
    tokenizers = {"pixels": {"codebook": {"tower": "pixels:16", "image_size": 64, "k": 16}}}
    path.write_text(yaml.safe_dump({**SMOKE, "tokenizers": tokenizers}))
    with pytest.raises(DataError, match=r"model mini has 8x8 patches .* tokens of pixels are 4x4; change the model or"):
        study_dry_run(path)


def test_a_tower_that_would_be_downloaded_is_left_out(pixels: Path, tmp_path: Path):
    content = yaml.safe_load(pixels.read_text())
    content["tokenizers"] = {"far": {"codebook": {"tower": "hf-hub:someone/clip", "k": 16}}}
    (tmp_path / "far.yaml").write_text(yaml.safe_dump(content))
    assert study_dry_run(tmp_path / "far.yaml").total.unknown == 2


def test_the_budget_of_another_objective_is_its_flops(pixels: Path):
    study = replace(read_study(pixels), seeds=[0], comparisons=[])
    budgets = {"images": Budget(images=3200), "FLOPs": Budget(images=3200, flops_of="MaPeT")}
    graph = build_graph(replace(study, budgets=budgets), Inputs("a", "b", 160, Path("c")))
    runs = {(cell.row, cell.budget): graph.steps[cell.run] for cell in graph.cells}
    assert runs["MaPeT", "FLOPs"] is runs["MaPeT", "images"]
    mim, mapet = runs["MIM 40 %", "FLOPs"], runs["MaPeT", "images"]
    assert abs(mim.flops - mapet.flops) <= 0.5 * 160 * mim.flops / mim.images_seen
    assert mim.images_seen > 3200


def test_every_shipped_study_without_its_own_images_can_be_planned_without_any():
    assert read_study("paper-imagenet").train_images == 1_281_167
    with pytest.raises(UsageError, match="needs the number of training images: give --images, or train_images"):
        study_dry_run("tiny")


def test_a_tower_of_open_clip_is_counted_with_its_attention(tower: str):
    # The demo's tower, counted by running it.
    from mapet.tokenize_stage.towers.opening import open_tower
    from torch.utils.flop_counter import FlopCounterMode

    settings = TowerSettings(f"local-dir:{tower}" if ":" not in str(tower) else tower)
    opened = open_tower(settings)
    pixels = torch.zeros(1, 3, opened.preprocess.image_size, opened.preprocess.image_size)
    opened._module.requires_grad_(True)
    with FlopCounterMode(display=False) as counter:
        opened._intermediates(pixels, -1, False)
    expected = TowerCost(counter.get_total_flops(), opened.grid, opened.dim)
    assert dataclasses.asdict(tower_cost(settings)) == dataclasses.asdict(expected)


def test_published_encoders_are_counted_by_hand():
    width, rows = 768, 197
    vit = 2 * 196 * 768 * width + 12 * (2 * rows * width * width * 12 + 2 * 2 * rows * rows * width)
    head = 2 * 196 * (width * width + width * 32)
    assert cost.PUBLISHED["vqkd"].flops == vit + head
    side, ins = 112, 256
    macs = 3 * 256 * 49 * side * side
    for group, out in enumerate((256, 512, 1024, 2048)):
        for _ in range(2):
            h = out // 4
            macs += ((ins * out if ins != out else 0) + 9 * ins * h + 2 * 9 * h * h + h * out) * side * side
            ins = out
        side //= 1 if group == 3 else 2
    assert cost.PUBLISHED["dvae"].flops == 2 * macs
