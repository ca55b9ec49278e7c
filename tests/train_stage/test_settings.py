"""Settings: the paper's recipes, overrides, and one sentence for what cannot be."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mapet.shared.errors import UsageError
from mapet.train_stage.settings import RECIPES, resolve, resolve_finetuning, resolve_segmenting
from mapet.train_stage.training.plan import make_plan
from mapet.train_stage.weights.weights import Input


@pytest.mark.parametrize(("size", "dim", "heads"), [("tiny", 192, 3), ("small", 384, 6), ("base", 768, 12)])
def test_shipped_recipes_are_the_papers(size: str, dim: int, heads: int):
    found = resolve(f"vit-{size}-16")
    assert (found.model.dim, found.model.depth, found.model.heads) == (dim, 12, heads)
    assert (found.model.image_size, found.model.patch_size, found.objective.visible) == (224, 16, 49)
    assert (found.optimizer.lr, found.optimizer.min_lr, found.optimizer.warmup_lr) == (1.5e-3, 1e-5, 1e-6)
    assert (found.optimizer.weight_decay, found.optimizer.clip_grad) == (0.05, 3.0)
    assert (found.train.epochs, found.train.batch_size, found.optimizer.warmup_epochs) == (300, 2048, 10)


def test_the_base_recipe_says_what_the_defaults_are():
    assert resolve("vit-base-16") == resolve()


def test_every_shipped_recipe_resolves():
    kinds = {"finetune": resolve_finetuning, "segment": resolve_segmenting}
    of_pretraining = [path for path in RECIPES.glob("*.yaml") if path.stem.split("-")[0] not in kinds]
    assert {path.stem: resolve(path).model.name for path in of_pretraining} == {
        "efficient": None,
        "vit-base-16": "vit-base",
        "vit-small-16": "vit-small",
        "vit-small-16-one-gpu": "vit-small",
        "vit-tiny-16": "vit-tiny",
    }
    others = {path.stem for path in RECIPES.glob("*.yaml")} - {path.stem for path in of_pretraining}
    assert all(kinds[name.split("-")[0]](name, [], 224, Input().to_json()) for name in others)


def test_the_published_recipe_of_segmentation_has_the_defaults_at_512_pixels():
    recipe, defaults = (resolve_segmenting(name, [], 512, Input().to_json()) for name in ("segment-vit-base-16", None))
    assert recipe == defaults


def test_the_published_recipes_of_fine_tuning_have_the_published_settings():
    recipes = {
        name: resolve_finetuning(f"finetune-vit-{name}-16", [], 224, Input().to_json())
        for name in ["tiny", "small", "base"]
    }
    values = {name: (r.optimizer.lr, r.train.epochs, r.optimizer.layer_decay) for name, r in recipes.items()}
    assert values == {"tiny": (2.5e-4, 300, 1.0), "small": (5e-4, 200, 0.65), "base": (5e-4, 100, 0.65)}
    assert recipes["base"] == resolve_finetuning(None, [], 224, Input().to_json())


def test_the_recipe_for_one_gpu_scales_the_published_learning_rate_with_the_batch():
    one, papers = resolve("vit-small-16-one-gpu"), resolve("vit-small-16")
    assert one.optimizer.lr / papers.optimizer.lr == one.train.batch_size / papers.train.batch_size
    assert one.model == papers.model


@pytest.mark.parametrize(
    ("processes", "parts", "micro_batch"), [(1, 8, 256), (2, 4, 256), (8, 1, 256), (64, 1, 32), (512, 1, 4)]
)
def test_the_published_batch_is_shared_by_any_number_of_processes(processes: int, parts: int, micro_batch: int):
    plan = make_plan(resolve("vit-base-16"), 1_281_167, processes)
    assert (plan.steps_per_epoch, plan.steps, plan.schedule.warmup) == (625, 187_500, 6_250)
    assert (plan.parts, plan.micro_batch, plan.share) == (parts, micro_batch, 2048 // processes)


PLAIN = resolve()


@settings(deadline=None)
@given(st.integers(1, 4096), st.integers(1, 16), st.none() | st.integers(1, 500))
def test_parts_are_equal_and_as_few_as_the_micro_batch_allows(batch: int, processes: int, micro: int | None):
    settings = replace(
        PLAIN,
        train=replace(PLAIN.train, batch_size=batch),
        execution=replace(PLAIN.execution, micro_batch=micro),
    )
    if batch % processes:
        with pytest.raises(UsageError, match=f"not a multiple of the {processes} processes"):
            make_plan(settings, 5000, processes)
        return
    plan = make_plan(settings, 5000, processes)
    assert plan.micro_batch * plan.parts * processes == batch
    assert plan.micro_batch <= (micro or batch)
    fewer = [parts for parts in range(1, plan.parts) if plan.share % parts == 0]
    assert all(plan.share // parts > micro for parts in fewer)


def test_overrides_win_over_the_recipe_and_keep_their_types(tmp_path: Path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("optimizer: {lr: 1e-4}\ntrain: {epochs: 7}\n")
    found = resolve(recipe, ["optimizer.lr=2e-3", "optimizer.betas=[0.9,0.98]", "optimizer.clip_grad=null"])
    assert (found.optimizer.lr, found.train.epochs) == (2e-3, 7)
    assert (found.optimizer.betas, found.optimizer.clip_grad) == ([0.9, 0.98], None)


def test_visible_defaults_to_a_quarter_of_the_patches():
    assert resolve(overrides=["model.image_size=64", "model.patch_size=8"]).objective.visible == 16


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optimizer.learning_rate=1", "optimizer.lr"),
        ("optimiser.lr=1", "optimizer"),
        ("optimizer.lr=fast", "optimizer.lr"),
        ("optimizer.lr=-1", "positive"),
        ("train.epochs=0", "at least 1"),
        ("train.epochs=1.5", "train.epochs"),
        ("model.name=vit-huge", "vit-large"),
        ("model.name=null", "model.dim"),
        ("objective.visible=196", "196"),
        ("objective.visible_to=-1", "at least 0"),
        ("objective.visible_change=sometimes", "linear, random"),
        ("objective.name=mae", "mapet, pim, mim"),
        ("objective.mask_ratio=1", "mask_ratio"),
        ("objective.masking=rows", "block, uniform"),
        ("objective.query_rows=0", "query_rows"),
        ("objective.permutation_block=0", "permutation_block"),
        ("execution.loss_chunk=0", "loss_chunk"),
        ("execution.attention=dense", "choose from sdpa, flex"),
        ("model.image_size=225", "multiple"),
        ("model.heads=7", "multiple"),
        ("model.drop_path=1", "drop_path"),
        ("train.on_bad_step=ignore", "stop, skip"),
        ("train.spike=0.5", "larger than 1"),
        ("train.ema=1", "train.ema 1"),
        ("train.ema_warmup=true", "needs train.ema"),
        ("train.keep_every=0", "at least 1"),
        ("probe.images=somewhere", "probe.val"),
        ("execution.micro_batch=0", "at least 1"),
        ("execution.parallel=pipeline", "ddp, fsdp"),
        ("train.precision=fp16", "bfloat16"),
        ("data.mean=[0.5]", "three numbers"),
        ("data.interpolation=nearest", "bicubic"),
        ("optimizer.lr", "key=value"),
    ],
)
def test_a_setting_that_cannot_be_is_named(override: str, words: str):
    with pytest.raises(UsageError, match=words) as caught:
        resolve(overrides=[override])
    assert "\n" not in str(caught.value)


def test_compiling_for_a_changing_number_of_rows_is_refused():
    with pytest.raises(UsageError, match="fixed number of rows"):
        resolve(overrides=["execution.compile=true", "objective.visible_to=98"])


def test_an_unknown_recipe_lists_the_shipped_ones():
    with pytest.raises(UsageError, match="vit-base-16, vit-small-16, vit-small-16-one-gpu, vit-tiny-16"):
        resolve("vit-giant")


def test_a_recipe_with_an_unknown_key_or_broken_yaml_is_refused(tmp_path: Path):
    (tmp_path / "unknown.yaml").write_text("model: {width: 3}\n")
    (tmp_path / "broken.yaml").write_text("model: {name: [\n")
    with pytest.raises(UsageError, match="width"):
        resolve(tmp_path / "unknown.yaml")
    with pytest.raises(UsageError, match=r"broken\.yaml"):
        resolve(tmp_path / "broken.yaml")
