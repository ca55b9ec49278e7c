"""Cells and steps: what is shared, and how long a budget lasts."""

from collections import Counter
from pathlib import Path

import pytest
from mapet.shared.errors import UsageError
from mapet.studies.graph import Graph, Inputs, build_graph, codebook_options, epochs_of
from mapet.studies.schema import Budget, Study, Tokenizer, read_study
from mapet.tokenize_stage.towers.cost import tower_cost
from mapet.tokenize_stage.towers.tower import TowerSettings
from msgspec.structs import replace

BOOK = {"tower": "package", "k": 16}


def graph_of(study: Study, root: str = "/study", count: int = 160) -> Graph:
    return build_graph(study, Inputs("train", "val", count, Path(root)))


def kinds(graph: Graph) -> Counter:
    return Counter(step.kind for step in graph.steps.values())


@pytest.fixture
def smoke() -> Study:
    return read_study("smoke")


def test_the_grid_has_one_cell_per_combination_and_one_step_per_content(smoke: Study):
    graph = graph_of(smoke)
    # 2 objectives x 2 budgets x 2 seeds, and 2 comparisons x 2 seeds that are measured with the baseline's probe.
    assert len(graph.cells) == 12
    assert kinds(graph) == {"codebook": 1, "tokens": 1, "run": 8, "probe": 8}


def test_steps_follow_those_that_they_need(smoke: Study):
    steps = list(graph_of(smoke).steps.values())
    before: set[str] = set()
    for step in steps:
        assert before.issuperset(step.needs)
        before.add(step.folder)


def test_rows_and_budgets_of_equal_content_share_their_steps(smoke: Study):
    twice = {"one": Budget(images=320), "same": Budget(images=330)}
    objectives = {"MIM": {"objective.name": "mim"}, "BEiT": {"objective.name": "mim"}}
    study = replace(smoke, budgets=twice, objectives=objectives, baseline="MIM", comparisons=[], seeds=[0])
    graph = graph_of(study)
    assert len(graph.cells) == 4
    assert kinds(graph) == {"codebook": 1, "tokens": 1, "run": 1, "probe": 1}


def test_tokenizers_share_a_codebook_but_not_stores_of_other_views(smoke: Study):
    tokenizers = {"centre": Tokenizer(BOOK), "crops": Tokenizer(BOOK, {"crop": "random-resized", "views": 2})}
    graph = graph_of(replace(smoke, tokenizers=tokenizers))
    assert kinds(graph)["codebook"] == 1
    assert kinds(graph)["tokens"] == 2
    assert kinds(graph)["run"] == 16


def test_folders_do_not_depend_on_where_the_study_is(smoke: Study):
    assert list(graph_of(smoke, "/a").steps) == list(graph_of(smoke, "/b").steps)


def test_random_init_and_pixels_come_from_the_baselines_probe(smoke: Study):
    graph = graph_of(smoke)
    cells = {cell.row: cell for cell in graph.cells if cell.seed == 1}
    words = graph.steps[str(cells["random init"].probe)].words
    assert cells["pixels"].probe == cells["random init"].probe
    assert {"--random-init", "--pixels"} <= set(words)
    assert cells["random init"].features == "random init"


def test_what_is_not_pre_trained_is_made_once_for_all_tokenizers(smoke: Study):
    small = {"train.batch_size": 32}
    both = replace(smoke, evaluations=["linear", "finetuned"], finetuning=small, budgets={"one": Budget(images=320)})
    both = replace(both, comparisons=["random init", "from scratch", "pixels"])
    one = graph_of(both)
    tokenizers = {**smoke.tokenizers, "crops": Tokenizer(BOOK, {"crop": "random-resized", "views": 2})}
    two = graph_of(replace(both, tokenizers=tokenizers))
    # A second tokenizer leaves the steps of the first one as they are.
    assert list(two.steps.items())[: len(one.steps)] == list(one.steps.items())
    assert kinds(two) == {"codebook": 2, "tokens": 2, "run": 8, "probe": 8, "classifier": 8 + 2}
    assert sum("--random-init" in step.words for step in two.steps.values()) == 2
    controls = [cell for cell in two.cells if not cell.budget]
    made = {(cell.row, cell.seed, cell.tokenizer): (cell.probe, cell.classifier) for cell in controls}
    assert len(made) == 3 * 2 * 2
    for (row, seed, _), steps in made.items():
        assert steps == made[row, seed, "k-CLIP"]
    for row in ("random init", "pixels"):
        for seed in smoke.seeds:
            words = two.steps[str(made[row, seed, "crops"][0])].words
            assert {"--random-init", "--pixels"} <= set(words)
            assert words[words.index("--seed") + 1] == str(seed)
    assert {(cell.tokenizer, cell.tokens) for cell in two.cells} == set(
        zip(tokenizers, (folder for folder, step in two.steps.items() if step.kind == "tokens"), strict=True)
    )


def test_from_scratch_is_fine_tuned_once_per_model_and_seed(smoke: Study):
    small = {"train.batch_size": 32}
    study = replace(smoke, evaluations=["finetuned"], comparisons=["from scratch"], finetuning=small)
    graph = graph_of(study)
    scratch = [step for step in graph.steps.values() if "--from-scratch" in step.words]
    assert len(scratch) == 2
    assert kinds(graph)["classifier"] == 8 + 2
    assert "probe" not in kinds(graph)


def test_a_budget_of_flops_gives_the_cheaper_objective_more_images(smoke: Study):
    sizes = {"small": {**smoke.models["mini"], "model.dim": 192, "model.depth": 6, "model.heads": 3}}
    budgets = {"FLOPs": Budget(flops=2e12)}
    graph = graph_of(replace(smoke, models=sizes, budgets=budgets, seeds=[0], comparisons=[]))
    mim, mapet = (graph.steps[cell.run] for cell in graph.cells)
    per_image = {step.folder: step.flops / step.images_seen for step in (mim, mapet)}
    assert per_image[mapet.folder] / per_image[mim.folder] == pytest.approx(2.35, abs=0.25)
    assert mim.images_seen > 2 * mapet.images_seen - 160
    for step in (mim, mapet):  # within half an epoch of the budget
        assert abs(step.flops - 2e12) <= 0.5 * 160 * per_image[step.folder]


@pytest.mark.parametrize(
    ("budget", "epochs"),
    [(Budget(images=1000), 10), (Budget(images=149), 1), (Budget(images=151), 2), (Budget(flops=60_000.0), 3)],
)
def test_a_budget_is_the_nearest_number_of_whole_epochs(budget: Budget, epochs: int):
    assert epochs_of(budget, flops_per_image=200, images_per_epoch=100, what="") == epochs


def test_a_budget_under_half_an_epoch_is_refused():
    with pytest.raises(UsageError, match=r"MaPeT: the budget is 0.4 epochs of 100 images; give at least one epoch"):
        epochs_of(Budget(images=40), 1, 100, "MaPeT")


def test_a_setting_that_does_not_exist_is_refused_with_the_row_that_has_it(smoke: Study):
    with pytest.raises(UsageError, match=r"objective MIM 40 %, model mini: .*objective\.mask"):
        graph_of(replace(smoke, objectives={"MIM 40 %": {"objective.mask": 0.4}}))


def test_settings_of_fine_tuning_are_checked_before_anything_is_made(smoke: Study):
    study = replace(smoke, evaluations=["finetuned"], comparisons=[])
    with pytest.raises(UsageError, match=r"fine-tuning: train\.batch_size 512 is larger than the 160 training images"):
        graph_of(study)
    with pytest.raises(UsageError, match=r"fine-tuning, model mini: .*optimizer\.layerdecay"):
        graph_of(replace(study, finetuning={"optimizer.layerdecay": 0.5}))


def test_a_model_has_fine_tuning_settings_of_its_own(smoke: Study):
    models = {"mini": smoke.models["mini"], "other": {**smoke.models["mini"], "model.depth": 2}}
    changes = {"models": models, "finetuning": {"train.batch_size": 32, "train.epochs": 30}, "seeds": [0]}
    changes |= {"evaluations": ["finetuned"], "comparisons": [], "finetuning_of": {"other": {"train.epochs": 40}}}
    study = replace(smoke, **changes)
    graph = graph_of(study)
    epochs = {cell.model: graph.steps[str(cell.classifier)].images_seen // 160 for cell in graph.cells}
    assert epochs == {"mini": 30, "other": 40}


def test_a_batch_larger_than_the_images_is_refused(smoke: Study):
    with pytest.raises(UsageError, match=r"train.batch_size 32 is larger than the 20 training images"):
        graph_of(smoke, count=20)


def test_the_control_on_features_reads_its_tower_and_pays_for_it(smoke: Study):
    settings = {"objective.name": "mim", "objective.target": "features"}
    rows = {"MIM": {"objective.name": "mim"}, "features": settings}
    study = replace(smoke, objectives=rows, baseline="MIM", budgets={"images": Budget(images=320)}, seeds=[0])
    graph = graph_of(replace(study, comparisons=[]))
    tokens, features = graph.cells
    run = graph.steps[features.run]
    assert run.needs == (features.tokens, features.codebook)
    assert run.words[run.words.index("--teacher") + 1] == f"/study/{features.codebook}/output"
    assert "--teacher" not in graph.steps[tokens.run].words
    tower = tower_cost(TowerSettings(codebook_options(smoke.tokenizers["k-CLIP"])["tower"]))
    # The head has the tower's features as outputs instead of 16 codes, for the 26 of 64 patches that are masked.
    head = 3 * 2 * 26 * smoke.models["mini"]["model.dim"] * (tower.dim - 16)
    assert run.k == tower.dim
    assert run.flops == graph.steps[tokens.run].flops + 320 * (tower.flops + head)


def test_a_tower_of_unknown_size_is_no_control(smoke: Study):
    rows = {"MIM": {"objective.name": "mim", "objective.target": "features"}}
    study = replace(smoke, objectives=rows, baseline="MIM", tokenizers={"hub": Tokenizer({"tower": "hf-hub:a/b"})})
    with pytest.raises(UsageError, match="objective MIM: the FLOPs of the tower of tokenizer hub are not known"):
        graph_of(study)
