"""The control: features of the tower as targets, of the very crop that the tokens were made of, and nothing else."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from mapet.shared.errors import DataError, FingerprintMismatch, UsageError
from mapet.shared.images.decode import read_image
from mapet.shared.images.views import center_view, to_array
from mapet.shared.runtime.distributed import World
from mapet.shared.sources.sources import read_records
from mapet.shared.tokens.store import TokenStore
from mapet.tokenize_stage.build_codebook import build_codebook
from mapet.tokenize_stage.encode_shards import encode_shards
from mapet.tokenize_stage.import_tokens import import_tokenizer
from mapet.tokenize_stage.tokenizers.opening import load_tokenizer, read_tokenizer
from mapet.train_stage.data.batch import Batch, LoadBatch
from mapet.train_stage.data.join import join
from mapet.train_stage.export import export
from mapet.train_stage.finetune import finetune
from mapet.train_stage.import_weights import import_weights
from mapet.train_stage.pretrain import pretrain, pretrain_dry_run
from mapet.train_stage.probe import probe
from mapet.train_stage.report import report
from mapet.train_stage.settings import resolve
from mapet.train_stage.tasks.feature_regression import FeatureRegression, open_teacher
from mapet.train_stage.tasks.pretraining import PretrainingModel, PretrainingTask, flops_per_image
from mapet.train_stage.weights.read import load_weights
from safetensors.torch import load_file

from ..conftest import TINY

SETTINGS = [
    *TINY,
    "model.patch_size=8",
    "train.epochs=2",
    "train.batch_size=32",
    "optimizer.warmup_epochs=0",
    "train.log_every=2",
    "train.checkpoint_every=2",
    "train.keep_last=9",
    "objective.target=features",
]


@pytest.fixture(scope="module")
def views(chain, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokens of two random crops of each image, the first of three views its centre."""
    out = tmp_path_factory.mktemp("views") / "tokens"
    options = {"crop": "random-resized", "views": 3, "with_center": True}
    encode_shards(chain.images, chain.codebook, out, batch_size=16, **options)
    return out


def task_on(chain, tokens: Path, *overrides: str) -> FeatureRegression:
    settings, store = resolve(None, [*SETTINGS, *overrides]), TokenStore(tokens)
    saved = read_tokenizer(chain.codebook)
    teacher = open_teacher(saved, settings, store, "cpu", World())
    return FeatureRegression(settings, store, join(chain.images, store), saved, teacher)


def batch_of(task: PretrainingTask, places: list[tuple[int, int]]) -> Batch:
    return next(task.batches(iter([places]), 0, pin_memory=False))


def test_the_targets_are_the_towers_features_of_the_crop_that_the_tokens_were_made_of(chain, views: Path):
    task, tokenizer = task_on(chain, views), load_tokenizer(chain.codebook)
    loss = task.loss(task.new_model(), "cpu", "float32")
    for epoch in range(3):
        batch = batch_of(task, [(epoch, index) for index in range(0, 96, 4)])
        features, tokens = loss.targets(batch).reshape(-1, tokenizer.dim).numpy(), batch.tokens.reshape(-1).numpy()
        found, _ = tokenizer.assign(features)
        different = found != tokens
        assert different.mean() < 0.005
        assert tokenizer.nearly_equal(features[different], tokens[different], found[different]).all()


def test_the_target_of_an_image_is_its_own_features_in_the_order_of_its_permutation(chain):
    """Without crops: the tower on the image as its own preprocessing makes it."""
    task, tokenizer = task_on(chain, chain.tokens), load_tokenizer(chain.codebook)
    batch = batch_of(task, [(0, 5), (0, 70)])
    targets = task.loss(task.new_model(), "cpu", "float32").targets(batch)
    records = {record.key: record for record in read_records(chain.images)}
    for place, index in enumerate((5, 70)):
        image, _ = read_image(records[task.images.key(index)])
        pixels = torch.from_numpy(to_array(center_view(image, tokenizer.preprocess)))[None]
        features = tokenizer.features(pixels)[0]
        for rank, patch in enumerate(batch.order[place].tolist()):
            assert torch.allclose(targets[place, rank], features[patch], atol=1e-5)


@pytest.mark.parametrize(
    "objective", [("mim",), ("pim",), ("mapet",), ("mapet", "objective.query_rows=9", "objective.visible=5")]
)
def test_the_loss_is_that_of_the_predicted_patches_and_all_else_is_as_for_tokens(chain, views: Path, objective):
    name, *overrides = objective
    changed = [f"objective.name={name}", "model.drop_path=0", *overrides]
    task = task_on(chain, views, *changed)
    places = [(0, 3), (1, 40), (1, 41)]
    batch = batch_of(task, places)
    tokens_settings = resolve(None, [*SETTINGS[:-1], *changed])
    as_tokens = Batch(**LoadBatch(task.images, tokens_settings)(places))
    for field in ("index", "pixels", "order", "tokens", "uniform_draws", "jitter_factors", "jitter_order"):
        assert torch.equal(getattr(batch, field), getattr(as_tokens, field)), field
    assert as_tokens.teacher_pixels is None

    model = task.new_model()
    loss = task.loss(model, "cpu", "float32")
    inputs = loss.at_step(0, 10)
    plain = PretrainingModel(tokens_settings, task.store.k)
    same = plain.loss(plain.new_model(), "cpu", "float32").at_step(0, 10)
    assert inputs.layout.rank_numbers == same.layout.rank_numbers
    assert inputs.layout.visible == same.layout.visible
    value, measured = loss(batch, inputs)
    predicted = model(loss.preprocess(batch), batch.order, inputs.layout).detach().numpy()
    features = task.teacher.features(batch.teacher_pixels).numpy()
    cosines = []
    for image in range(len(places)):
        for row, rank in enumerate(inputs.layout.rank_numbers):
            truth, guess = features[image, batch.order[image, inputs.layout.visible + rank]], predicted[image, row]
            cosines.append(truth @ guess / np.linalg.norm(truth) / np.linalg.norm(guess))
    assert value.item() == pytest.approx(1 - np.mean(cosines), abs=1e-5)
    assert measured.sum().item() == pytest.approx(np.sum(cosines), abs=1e-4)
    value.backward()
    assert model.decoder.weight.grad.abs().max() > 0


@pytest.fixture(scope="module")
def run(chain, views: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("control") / "run"
    train(chain, views, out)
    return out


def train(chain, tokens: Path, out: Path, *overrides: str, **options) -> Path:
    settings = {"overrides": [*SETTINGS, *overrides], "teacher": read_tokenizer(chain.codebook), "device": "cpu"}
    return pretrain(chain.images, tokens, out, **{**settings, **options})


def test_a_run_learns_logs_similarities_and_records_its_teacher(chain, run: Path):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert all(line["loss"] == pytest.approx(1 - line["cosine"], abs=1e-5) for line in lines)
    assert all(len(line["cosine_by_rank"]) == 8 and "accuracy" not in line for line in lines)
    record = json.loads((run / "run.json").read_text())
    assert (record["target"], record["teacher"], record["features"]) == ("features", str(chain.codebook), 32)
    assert "target: features" in (run / "settings.yaml").read_text()


def test_stopped_anywhere_it_resumes_bit_identically(chain, views: Path, run: Path, tmp_path: Path):
    again = tmp_path / "again"
    shutil.copytree(run, again)
    for step in (4, 6):
        shutil.rmtree(again / "checkpoints" / f"step-{step:07}")
    last = train(chain, views, again)
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (last / name).read_bytes() == (run / "checkpoints" / last.name / name).read_bytes()


def test_the_target_of_a_run_cannot_change(chain, views: Path, run: Path):
    tokens = {"overrides": SETTINGS[:-1], "teacher": None}
    with pytest.raises(UsageError, match=r"objective\.target was features and is tokens"):
        train(chain, views, run, **tokens)


def test_a_dry_run_estimates_it_and_its_head_has_one_output_per_feature(chain, views: Path):
    options = {"overrides": SETTINGS, "teacher": read_tokenizer(chain.codebook), "device": "cpu"}
    estimate = pretrain_dry_run(chain.images, views, **options)
    assert estimate.steps is not None
    assert estimate.flops_per_image == flops_per_image(resolve(None, SETTINGS[:-1]), 32)
    described = dict(estimate.description)
    assert "32 features predicted" in described["rows per image"]
    assert "FLOPs and weights are not counted" in described["teacher"]


def test_what_follows_pre_training_takes_the_run(chain, run: Path, tmp_path: Path):
    folder = export(run, tmp_path / "export")
    assert "decoder.weight" not in load_file(folder / "model.safetensors")
    labelled = {"images": chain.images, "val": chain.images, "device": "cpu"}
    assert probe(run, **labelled, iterations=2)
    short = ["train.epochs=1", "train.batch_size=32", "optimizer.warmup_epochs=0"]
    finetune(run, **labelled, out=tmp_path / "finetuned", overrides=short)
    page = report(run, html=tmp_path / "page.html").read_text()
    assert "1 - mean cosine similarity" in page
    with pytest.raises(UsageError, match="predicts the features of a tower"):
        report(run, html=tmp_path / "other.html", tokens=str(chain.tokens), images=str(chain.images))


def test_a_head_of_features_does_not_start_a_head_of_tokens(chain, run: Path, tmp_path: Path, capsys):
    """Here K is not the number of features; the names of what starts fresh show it where they are equal, too."""
    weights = load_weights(run)
    assert (weights.kind, weights.target, weights.shape.k) == ("pretraining", "features", 32)
    train(chain, chain.tokens, tmp_path / "features", init=run, overrides=[*SETTINGS, "train.epochs=1"])
    assert "newly initialised" not in capsys.readouterr().err
    of_tokens = PretrainingModel(resolve(None, SETTINGS[:-1]), 32)
    model = of_tokens.new_model()
    before = model.decoder.weight.clone()
    PretrainingTask.start_from(of_tokens, model, run)
    assert torch.equal(model.decoder.weight, before)
    assert torch.equal(model.mask_positional_token, weights.tensors["mask_positional_token"])
    assert "newly initialised: decoder.weight, decoder.bias" in capsys.readouterr().err


def test_what_does_not_go_together_is_refused(chain, views: Path, tmp_path: Path):
    out = tmp_path / "run"
    with pytest.raises(UsageError, match="give train pretrain its codebook, that of the tokens, with --teacher"):
        train(chain, views, out, teacher=None)
    with pytest.raises(UsageError, match=r"add --set objective\.target=features, or leave it out"):
        train(chain, views, out, overrides=SETTINGS[:-1])
    with pytest.raises(UsageError, match="with --teacher"):
        PretrainingModel(resolve(None, SETTINGS), 16)
    assert not out.exists()


@pytest.mark.parametrize("kind", ["vqkd", "dvae"])
def test_an_encoder_that_a_codebook_holds_teaches_what_precedes_its_codes(
    chain, vqkd_file: Path, dvae_files: dict[str, Path], tmp_path: Path, kind: str
):
    source = {"vqkd": vqkd_file} if kind == "vqkd" else {"dvae": dvae_files["flava"], "image_size": 16}
    import_tokenizer(tmp_path / "book", **source)
    store = encode_shards(chain.tars[0], tmp_path / "book", tmp_path / "tokens", batch_size=16)
    settings = resolve(None, [*SETTINGS, f"model.patch_size={64 // store.grid[0]}"])
    saved = read_tokenizer(tmp_path / "book")
    teacher = open_teacher(saved, settings, store, "cpu", World())
    task = FeatureRegression(settings, store, join(chain.tars[0], store), saved, teacher)
    batch = batch_of(task, [(0, index) for index in range(0, 32, 4)])
    features = task.loss(task.new_model(), "cpu", "float32").targets(batch).flatten(0, 1)
    if teacher.unit_length:
        features = torch.nn.functional.normalize(features, dim=-1)
    found, _ = teacher.assign(features.numpy())
    assert (found == batch.tokens.flatten().numpy()).mean() > 0.99


def test_another_codebook_is_refused_before_its_tower_is_opened(chain, views: Path, tmp_path: Path):
    build_codebook(chain.tars[0], tmp_path / "book", tower="pixels:8", image_size=64, k=8, restarts=1, iterations=1)
    with pytest.raises(FingerprintMismatch, match="give the codebook of these tokens"):
        train(chain, views, tmp_path / "run", teacher=read_tokenizer(tmp_path / "book"))
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_tower_that_is_gone_is_refused(chain, tower: str, tmp_path: Path):
    folder = tmp_path / "tower"
    shutil.copytree(tower.removeprefix("local-dir:"), folder)
    options = {"tower": f"local-dir:{folder}", "k": 8, "restarts": 1, "iterations": 1}
    build_codebook(chain.tars[0], tmp_path / "book", **options)
    encode_shards(chain.tars[0], tmp_path / "book", tmp_path / "tokens", batch_size=16)
    shutil.rmtree(folder)
    with pytest.raises(DataError, match=f"--teacher {tmp_path / 'book'}: .*no open_clip_config.json"):
        train(chain, tmp_path / "tokens", tmp_path / "run", teacher=read_tokenizer(tmp_path / "book"))


def test_an_import_keeps_what_the_decoder_predicts(run: Path, tmp_path: Path):
    assert load_weights(import_weights(run, tmp_path / "import")).target == "features"
