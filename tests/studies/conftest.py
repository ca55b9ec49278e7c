"""A finished study whose figures are known: real runs, copied to where the study looks for them."""

import json
import shutil
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from mapet.studies.graph import CLASSIFIER, PROBE, RUN, Graph, Inputs, build_graph
from mapet.studies.schema import STUDIES, read_study
from mapet.studies.scores import StudyResult
from mapet.studies.study import study
from mapet.train_stage.finetune import finetune
from mapet.train_stage.pretrain import pretrain

BASELINE = "MIM 40 %"
FOREIGN = "<b>\"x\"</b> & 'y' | _z_ #1 \u202etxt.exe ${a}^~ \\ [w]".ljust(60, "m")
TOKENIZER = "k-CLIP <i>\u200f"
SCORES = {
    BASELINE: {"linear": (0.40, 0.42, 0.44), "knn": (0.30, 0.36, 0.33), "finetuned": (0.50, 0.52, 0.54)},
    FOREIGN: {"linear": (0.44, 0.48, 0.52), "knn": (0.35, 0.33, 0.37), "finetuned": (0.48, 0.50, 0.52)},
    "random init": {"linear": (0.05, 0.06, 0.04), "knn": (0.06, 0.07, 0.08)},
    "from scratch": {"finetuned": (0.45, 0.44, 0.46)},
    "pixels": {"linear": (0.10, 0.11, 0.12), "knn": (0.20, 0.21, 0.19)},
}
"""Top-1 by row and evaluation, of seeds 0, 1 and 2 and of every budget. From the baseline FOREIGN differs by 4, 6 and 8
points (linear), by 5, -3 and 4 (k-NN), and by -2 with every seed (fine-tuned)."""
CURVE = {BASELINE: (0.1, 0.2), FOREIGN: (0.15, 0.25)}
"""k-NN accuracy at the two points of a row's learning curve with seed 0; with seed 1 it is 0.02 higher, then 0.04."""


@dataclass(frozen=True)
class Finished:
    """A finished study."""

    file: Path
    out: Path
    result: StudyResult
    graph: Graph


@pytest.fixture(scope="session")
def finished(chain, tower: str, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Two objectives, two budgets, three seeds, three evaluations, three comparisons; foreign names among them."""
    pytest.importorskip("scipy", reason="no scipy: differences have no intervals")
    root = tmp_path_factory.mktemp("finished-study")
    file, out = root / "study.yaml", root / "my <study>"
    content = yaml.safe_load((STUDIES / "smoke.yaml").read_text())
    del content["drawings"]
    content |= {
        "tokenizers": {TOKENIZER: {"codebook": {"tower": tower, "k": 16, "restarts": 1, "iterations": 5}}},
        "objectives": {BASELINE: content["objectives"][BASELINE], FOREIGN: content["objectives"]["MaPeT"]},
        "budgets": {"equal images": {"images": 192}, "equal FLOPs": {"images": 192, "flops_of": FOREIGN}},
        "seeds": [0, 1, 2],
        "evaluations": ["linear", "knn", "finetuned"],
        "comparisons": ["random init", "from scratch", "pixels"],
        "curve_points": 2,
        "finetuning": {"train.epochs": 1, "train.batch_size": 32, "optimizer.warmup_epochs": 0},
    }
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    graph = build_graph(read_study(file), Inputs(str(chain.images), str(chain.images), 96, out))
    _pretend(graph, out, chain)
    return Finished(file, out, study(file, out, images=chain.images, val=chain.images, device="cpu"), graph)


def _pretend(graph: Graph, out: Path, chain) -> None:
    """Writes the results of all steps, so that the study has nothing left to make."""
    runs = [step for step in graph.steps.values() if step.kind == RUN]
    made = {kind: out.parent / kind for kind in (RUN, CLASSIFIER)}
    words = [word for flag, word in pairwise(runs[0].words) if flag == "--set" and "probe." not in word]
    pretrain(chain.images, chain.tokens, made[RUN], overrides=words, device="cpu")
    words = ["train.epochs=1", "train.batch_size=32", "optimizer.warmup_epochs=0"]
    finetune(made[RUN], chain.images, chain.images, made[CLASSIFIER], overrides=words, device="cpu")
    for folder, step in graph.steps.items():
        (out / folder).mkdir(parents=True)
        cells = [cell for cell in graph.cells if folder in (cell.run, cell.probe, cell.classifier)]
        scores: dict[str, dict[str, float]] = {}
        for cell in cells:
            at = {name: values[cell.seed] for name, values in SCORES[cell.row].items()}
            if step.kind == PROBE:
                scores[cell.features] = {name: value for name, value in at.items() if name != "finetuned"}
            elif folder == cell.classifier:
                scores["classifier"] = {"finetuned": at["finetuned"]}
        result = {"kind": step.kind, "seconds": 2.0, "scores": scores}
        (out / folder / "result.json").write_text(json.dumps(result))
        if step.kind in made:
            shutil.copytree(made[step.kind], out / folder / "output", ignore=shutil.ignore_patterns("checkpoints"))
        if step.kind == RUN:
            knn = zip((3, 6), CURVE[cells[0].row], (1, 2), strict=True)
            lines = [{"step": step, "knn": value + 0.02 * cells[0].seed * nth} for step, value, nth in knn]
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (out / folder / "output" / "probe.jsonl").write_text(text)
