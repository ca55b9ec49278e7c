"""The cells of a study and the steps that make them: one step for each different content, whichever cells need it."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..quickstart.demo import TOWER
from ..shared.errors import UsageError
from ..shared.storage.files import canonical_json
from ..train_stage.settings import FEATURES, FinetuneSettings, Settings, resolve, resolve_finetuning
from .schema import FROM_SCRATCH, PIXELS, RANDOM_INIT, Budget, Study, Tokenizer, Value, Values

if TYPE_CHECKING:
    from ..tokenize_stage.kmeans.train import KMeansSettings
    from ..tokenize_stage.towers.cost import TowerCost
    from ..tokenize_stage.towers.tower import TowerSettings

SettingsT = TypeVar("SettingsT", "TowerSettings", "KMeansSettings")
CODEBOOK, TOKENS, RUN, PROBE, CLASSIFIER = "codebook", "tokens", "run", "probe", "classifier"
KINDS = (CODEBOOK, TOKENS, RUN, PROBE, CLASSIFIER)
PRETRAINED = "pre-trained"
OUTPUT = "output"
"""Name of a step's artifact in its folder."""
_FEATURES = {RANDOM_INIT: "random init", PIXELS: "pixels 32x32"}
"""How `train probe` calls the features of a comparison."""


@dataclass(frozen=True)
class Inputs:
    """What all steps of a study read, and where they write."""

    images: str
    val: str
    count: int
    """Training images."""
    root: Path
    device: str = "auto"


@dataclass(frozen=True)
class Step:
    """One call of a command. Steps of equal content are one step."""

    kind: str
    folder: str
    """Relative to the study's folder."""
    words: tuple[str, ...]
    needs: tuple[str, ...] = ()
    """Folders of the steps whose artifacts it reads."""
    images_seen: int = 0
    """Of a pre-training or a fine-tuning."""
    flops: int = 0
    """Of a pre-training, the tower included whose features it regresses."""
    tokenizer: Tokenizer | None = None
    """Of a codebook or a token store."""
    settings: Settings | None = None
    """Of a pre-training, and of the one that a step reads."""
    finetuning: FinetuneSettings | None = None
    k: int = 0
    """Outputs of a pre-training's head: codes, or features of the tower."""


@dataclass(frozen=True)
class Cell:
    """A row of the table at one seed: the steps that its figures come from."""

    row: str
    tokenizer: str
    model: str
    budget: str
    """Empty for what is not pre-trained."""
    seed: int
    codebook: str
    tokens: str
    run: str
    probe: str | None = None
    features: str = PRETRAINED
    classifier: str | None = None


@dataclass
class Graph:
    """Cells, and steps by folder, each after those that it needs."""

    cells: list[Cell] = field(default_factory=list)
    steps: dict[str, Step] = field(default_factory=dict)

    def add(self, kind: str, label: str, content: Any, needs: Iterable[str], **made: Any) -> str:
        """Adds a step unless there is one of the same content; returns its folder. `made` are fields of the step."""
        needs = tuple(needs)
        digest = hashlib.sha256(canonical_json([kind, content, *needs]).encode()).hexdigest()[:12]
        known = [folder for folder, step in self.steps.items() if folder.endswith(digest) and step.kind == kind]
        if known:
            return known[0]
        folder = f"{kind}/{re.sub(r'[^a-z0-9.]+', '-', label.lower()).strip('-.')}-{digest}"
        self.steps[folder] = Step(kind, folder, needs=needs, **made)
        return folder


def build_graph(study: Study, inputs: Inputs) -> Graph:
    """The cells and steps of a study.

    Raises:
        UsageError for settings that do not fit together, or a budget of less than half an epoch.
    """
    graph, builder = Graph(), _Builder(study, inputs)
    controls: dict[tuple[str, int], list[Cell]] = {}
    for tokenizer_name, tokenizer in study.tokenizers.items():
        codebook, tokens = builder.tokens(graph, tokenizer_name, tokenizer)
        for model in study.models:
            for seed in study.seeds:
                for budget in study.budgets:
                    for row in study.objectives:
                        place = (tokenizer_name, model, budget, seed, codebook, tokens)
                        graph.cells.append(builder.pretrained(graph, row, *place))
                if (model, seed) not in controls:
                    of = next(cell for cell in reversed(graph.cells) if cell.row == study.baseline)
                    controls[model, seed] = builder.comparisons(graph, of)
                graph.cells += [
                    replace(cell, tokenizer=tokenizer_name, codebook=codebook, tokens=tokens)
                    for cell in controls[model, seed]
                ]
    return graph


def codebook_options(tokenizer: Tokenizer) -> Values:
    """The options of build-codebook, with the place of the package's tower instead of its name."""
    book = {**tokenizer.codebook}
    if book.get("tower") == "package":
        book["tower"] = f"local-dir:{TOWER}"
    return book


class _Builder:
    def __init__(self, study: Study, inputs: Inputs) -> None:
        self.study, self.inputs = study, inputs
        self._device = ("--device", inputs.device)
        self._labelled = ("--images", inputs.images, "--val", inputs.val)

    def _output(self, folder: str) -> str:
        return str(self.inputs.root / folder / OUTPUT)

    def tokens(self, graph: Graph, name: str, tokenizer: Tokenizer) -> tuple[str, str]:
        """The steps of a tokenizer: its codebook and its token store."""
        options = _options(codebook_options(tokenizer))
        words: tuple[str, ...] = ("tokenize", "build-codebook", self.inputs.images, *options, *self._device)
        if tokenizer.published:
            words = ("tokenize", "import", *_options(tokenizer.published), *self._device)
        content = tokenizer.published or tokenizer.codebook
        codebook = graph.add(CODEBOOK, name, content, (), words=words, tokenizer=tokenizer)
        words = ("tokenize", "encode-shards", self.inputs.images, "--codebook", self._output(codebook))
        words += (*_options(tokenizer.tokens), *self._device)
        made = {"words": words, "tokenizer": tokenizer}
        return codebook, graph.add(TOKENS, name, tokenizer.tokens, (codebook,), **made)

    def pretrained(
        self, graph: Graph, row: str, tokenizer: str, model: str, budget: str, seed: int, codebook: str, tokens: str
    ) -> Cell:
        """A pre-training and its evaluations."""
        values = self.values(row, model, seed)
        settings = self.settings(values, row, model)
        (flops, k), per_epoch = self.flops_and_outputs(row, tokenizer, model, seed), self.images_per_epoch(settings)
        allowed = self.study.budgets[budget]
        if allowed.flops_of:
            of, _ = self.flops_and_outputs(allowed.flops_of, tokenizer, model, seed)
            allowed = Budget(flops=(allowed.images or 0) * of)
        epochs = epochs_of(allowed, flops, per_epoch, f"objective {row}, budget {budget}")
        values = {"optimizer.warmup_epochs": self.study.warmup * epochs, **values, "train.epochs": epochs}
        if self.study.curve_points:
            steps = epochs * per_epoch // settings.train.batch_size
            values |= {"probe.images": self.inputs.images, "probe.val": self.inputs.val}
            values["probe.every"] = max(steps // self.study.curve_points, 1)
        label = f"{row} {model} seed {seed} {budget}"
        recipe = _recipe(self.study.recipe)
        words: tuple[str, ...] = ("train", "pretrain", "--images", self.inputs.images, "--tokens", self._output(tokens))
        needs: tuple[str, ...] = (tokens,)
        if settings.objective.target == FEATURES:
            needs, words = (tokens, codebook), (*words, "--teacher", self._output(codebook))
        words += (*recipe, *_settings(values), *self._device)
        seen = epochs * per_epoch
        content = {**values, "recipe": self.study.recipe}
        settings = self.settings(values, row, model)
        made = {"words": words, "images_seen": seen, "flops": seen * flops, "settings": settings, "k": k}
        run = graph.add(RUN, label, _without_paths(content), needs, **made)
        probe = self.probe(graph, label, run, seed, row, budget) if self.study.frozen else None
        classifier = None
        if "finetuned" in self.study.evaluations:
            classifier = self.classifier(graph, label, run, seed, model)
        return Cell(row, tokenizer, model, budget, seed, codebook, tokens, run, probe, PRETRAINED, classifier)

    def flops_and_outputs(self, row: str, tokenizer: str, model: str, seed: int) -> tuple[int, int]:
        """FLOPs per image of a pre-training, and the outputs of its head: codes, or features of the tower.

        A tower whose features are regressed is computed in every step, and its FLOPs count.
        """
        values, of = self.values(row, model, seed), self.study.tokenizers[tokenizer]
        is_of_features = self.settings(values, row, model).objective.target == FEATURES
        outputs, of_tower = of.k, 0
        if is_of_features:
            tower = tower_of(of)
            if tower is None:
                raise UsageError(
                    f"objective {row}: the FLOPs of the tower of tokenizer {tokenizer} are not known before it is "
                    "downloaded; download it, and give its folder as local-dir:FOLDER."
                )
            outputs, of_tower = tower.dim, tower.flops
        # Counted once for all seeds and targets, since counting takes seconds.
        values = {key: value for key, value in values.items() if key not in ("train.seed", "objective.target")}
        return of_tower + flops_of(canonical_json(values), self.study.recipe, outputs), outputs

    def values(self, row: str, model: str, seed: int) -> Values:
        """What a pre-training's settings are given, but for its length."""
        return {**self.study.settings, **self.study.models[model], **self.study.objectives[row], "train.seed": seed}

    def settings(self, values: Mapping[str, Value], row: str, model: str) -> Settings:
        """Raises UsageError, which names the row, for settings that do not fit together."""
        try:
            return _resolved(self.study.recipe, tuple(_pairs(values)))
        except UsageError as error:
            raise UsageError(f"objective {row}, model {model}: {error}") from None

    def images_per_epoch(self, settings: Settings | FinetuneSettings, of: str = "") -> int:
        """Without the incomplete batch at the end."""
        batch = settings.train.batch_size
        if batch > self.inputs.count:
            raise UsageError(f"{of}train.batch_size {batch} is larger than the {self.inputs.count} training images.")
        return self.inputs.count // batch * batch

    def probe(self, graph: Graph, label: str, run: str, seed: int, row: str, budget: str) -> str:
        """The frozen evaluations of a run.

        Those of the baseline at its last budget include the comparisons, but only with the first tokenizer: they do not
        depend on tokens.
        """
        flags = ["--attentive"] if "attentive" in self.study.frozen else []
        first = next(folder for folder, step in graph.steps.items() if step.kind == TOKENS)
        is_last = row == self.study.baseline and budget == list(self.study.budgets)[-1]
        if is_last and first in graph.steps[run].needs:
            flags += ["--random-init"] if RANDOM_INIT in self.study.comparisons else []
            flags += ["--pixels"] if PIXELS in self.study.comparisons else []
        words = ("train", "probe", self._output(run), *self._labelled, "--json", "--seed", str(seed), *flags)
        made = {"words": (*words, *self._device), "settings": graph.steps[run].settings}
        return graph.add(PROBE, label, flags, (run,), **made)

    def classifier(self, graph: Graph, label: str, run: str, seed: int, model: str, *flags: str) -> str:
        """The fine-tuning of a run."""
        values: Values = {**self.study.finetuning, **self.study.finetuning_of.get(model, {}), "train.seed": seed}
        pretraining = graph.steps[run].settings
        assert pretraining is not None  # every pre-training has them
        settings = self.finetuning_settings(values, pretraining, model)
        per_epoch = self.images_per_epoch(settings, "fine-tuning: ")
        recipe = _recipe(self.study.finetuning_recipe)
        words = ("train", "finetune", self._output(run), *self._labelled, *recipe, *_settings(values), *flags)
        content = [values, self.study.finetuning_recipe, *flags]
        made = {"words": (*words, *self._device), "images_seen": settings.train.epochs * per_epoch}
        return graph.add(CLASSIFIER, label, content, (run,), **made, settings=pretraining, finetuning=settings)

    def finetuning_settings(self, values: Values, pretraining: Settings, model: str) -> FinetuneSettings:
        """Raises UsageError, which names the model, for settings that do not fit together."""
        data, size = pretraining.data, pretraining.model.image_size
        view = (tuple(data.mean), tuple(data.std), data.interpolation)
        try:
            return _resolved_finetuning(self.study.finetuning_recipe, tuple(_pairs(values)), size, *view)
        except UsageError as error:
            raise UsageError(f"fine-tuning, model {model}: {error}") from None

    def comparisons(self, graph: Graph, of: Cell) -> list[Cell]:
        """The cells without pre-training, of the model and seed of a cell."""
        place = (of.tokenizer, of.model, "", of.seed, of.codebook, of.tokens, of.run)
        cells = []
        for name in self.study.comparisons:
            if name == FROM_SCRATCH:
                label = f"from scratch {of.model} seed {of.seed}"
                classifier = self.classifier(graph, label, of.run, of.seed, of.model, "--from-scratch")
                cells.append(Cell(name, *place, classifier=classifier))
            else:
                cells.append(Cell(name, *place, of.probe, _FEATURES[name]))
        return cells


def epochs_of(budget: Budget, flops_per_image: int, images_per_epoch: int, what: str) -> int:
    """The number of whole epochs that comes closest to a budget. Raises UsageError under half an epoch."""
    images = budget.images if budget.flops is None else budget.flops / flops_per_image
    assert images is not None  # a budget has one of the two
    epochs = images / images_per_epoch
    if epochs < 0.5:
        raise UsageError(
            f"{what}: the budget is {epochs:.2g} epochs of {images_per_epoch:,} images; give at least one epoch."
        )
    return round(epochs) or 1


def tower_of(tokenizer: Tokenizer) -> "TowerCost | None":
    """What the tower of a tokenizer costs; None if it would have to be downloaded."""
    from ..tokenize_stage.towers.cost import PUBLISHED
    from ..tokenize_stage.towers.tower import TowerSettings

    published = [cost for name, cost in PUBLISHED.items() if name in tokenizer.published]
    return published[0] if published else _tower_cost(settings_among(TowerSettings, codebook_options(tokenizer)))


def settings_among(kind: type[SettingsT], options: Values) -> SettingsT:
    """The settings of a dataclass among the options of a command, which `read_study` has checked."""
    return kind(**{one.name: options[one.name] for one in fields(kind) if one.name in options})  # type: ignore[arg-type]


@cache
def _tower_cost(settings: "TowerSettings") -> "TowerCost | None":
    from ..tokenize_stage.towers.cost import tower_cost

    return tower_cost(settings)


@cache
def flops_of(values: str, recipe: str | None, k: int) -> int:
    """FLOPs of forward and backward per image of a pre-training; `values` are its settings as JSON."""
    from ..train_stage.tasks.pretraining import flops_per_image

    return flops_per_image(resolve(recipe, _pairs(json.loads(values))), k)


# To resolve settings takes a tenth of a second, and a study's graph is built more than once.
_resolved = cache(resolve)


@cache
def _resolved_finetuning(
    recipe: str | None,
    pairs: tuple[str, ...],
    image_size: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    interpolation: str,
) -> FinetuneSettings:
    view = {"mean": list(mean), "std": list(std), "interpolation": interpolation}
    return resolve_finetuning(recipe, pairs, image_size, view)


def _pairs(values: Mapping[str, Value]) -> list[str]:
    return [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in values.items()]


def _settings(values: Mapping[str, Value]) -> list[str]:
    return [word for pair in _pairs(values) for word in ("--set", pair)]


def _recipe(name: str | None) -> tuple[str, ...]:
    return () if name is None else ("--recipe", name)


def _options(values: Mapping[str, Value]) -> list[str]:
    """Options of a command; a list is several values of one option."""
    words = []
    for name, value in values.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        elif isinstance(value, list):
            words += [f"--{option}", *map(str, value)]
        elif value is not None:
            words += [f"--{option}", str(value)]
    return words


def _without_paths(values: Mapping[str, Value]) -> dict[str, Value]:
    return {key: value for key, value in values.items() if key not in ("probe.images", "probe.val")}
