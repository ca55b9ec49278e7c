"""The table of a machine, measured with a tiny model: its rows, its units, and what may not be given."""

import json
from pathlib import Path

import mapet
import pytest
import torch
from mapet.shared.errors import UsageError
from mapet.shared.tokens.store import TokenStore
from mapet.throughput.bench import show
from mapet.throughput.loading import Loading
from mapet.throughput.tokenizing import Encoding, ready_pixels, with_random_codes
from mapet.throughput.training import PlainViT, plain_flops
from mapet.tokenize_stage.towers.opening import open_tower
from mapet.tokenize_stage.towers.tower import TowerSettings
from mapet.train_stage.data.join import join
from mapet.train_stage.model.shape import Shape
from mapet.train_stage.settings import resolve
from mapet.train_stage.tasks.pretraining import PretrainingModel
from torch.utils.flop_counter import FlopCounterMode

MODEL = [
    "model.name=null",
    "model.dim=32",
    "model.depth=1",
    "model.heads=2",
    "model.image_size=32",
    "model.patch_size=8",
]
ROWS = ["decode", "loader", "tower", "assignment", "k-means", "step", "step, FLOPs", "step, limit"]


@pytest.fixture(scope="module")
def measured(chain):
    return mapet.bench(images=chain.tars[0], overrides=MODEL, k=16, batch_size=2, workers=0, device="cpu", seconds=0.01)


def test_every_part_has_a_row_beside_its_reference(measured):
    assert [row.part for row in measured.rows] == ROWS
    for row in measured.rows:
        assert row.rates.rate > 0
        assert row.rates.bare_rate > 0
        assert row.against


def test_the_step_per_flop_is_the_step_in_other_units(measured):
    rows = {row.part: row.rates for row in measured.rows}
    task = PretrainingModel(resolve("vit-tiny-16", MODEL), 16)
    per_image = task.flops_per_image() / 1e12
    assert rows["step, FLOPs"].rate == pytest.approx(rows["step"].rate * per_image)
    assert rows["step, limit"].ours == rows["step, FLOPs"].ours
    plain = rows["step, FLOPs"].bare_rate / rows["step"].bare_rate * 1e12
    shape = task.shape
    assert plain == pytest.approx(plain_flops(shape, shape.patches - shape.patches // 4))


def test_json_holds_what_the_table_shows(measured, capfd):
    show(measured)
    shown = capfd.readouterr().out
    show(measured, as_json=True)
    found = json.loads(capfd.readouterr().out)
    assert [row["part"] for row in found["rows"]] == ROWS
    assert found["verdict"] == measured.sentences
    assert set(found["bounds"]) == {"training", "tokenizing"}
    assert all(part in shown for part in ROWS)
    assert measured.training.sentences[0].split(":")[0] in shown


def test_workers_load_and_encode_all_batches_but_their_first(chain, tower):
    settings = resolve("vit-tiny-16", [*MODEL, "train.batch_size=2"])
    images = join(chain.tars[0], TokenStore(chain.tokens))
    loading = Loading(images, settings, workers=2)
    records = [images.record(index) for index in range(3)]
    opened = open_tower(TowerSettings(tower))
    pixels = ready_pixels(records, opened.preprocess)
    encoding = Encoding(with_random_codes(opened, 8, pixels), records, pixels, workers=1)
    for run, count in ((loading.ours, 2 * 4), (loading.bare, 2 * 4), (encoding.encode, 3 * 2)):
        images_done, seconds = run()
        assert images_done == count
        assert seconds > 0


def test_the_flops_of_the_plain_model_are_those_of_a_step_that_is_computed():
    shape, patches = Shape(32, 2, 2, 8, 32, k=16), torch.arange(5)[None]
    with FlopCounterMode(display=False) as counter:
        PlainViT(shape)(torch.zeros(1, 3, 32, 32), patches, patches).backward()
    assert plain_flops(shape, 5) == counter.get_total_flops()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"seconds": 0}, "--seconds 0 must be a positive number"),
        ({"seconds": float("nan")}, "--seconds nan must be"),
        ({"overrides": ["train.batch_size=4"]}, "give --batch-size"),
        ({"overrides": ["data.workers=1"]}, "give --workers"),
        ({"k": 1}, "--k 1"),
        ({"recipe": "vit-huge"}, "vit-huge"),
        ({"device": "tpu"}, "--device tpu"),
    ],
)
def test_refused_options(options, words):
    with pytest.raises(UsageError, match=words):
        mapet.bench(**options)


def test_nothing_is_left_behind(measured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chain):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(UsageError, match="image_size 30 is not a multiple"):
        mapet.bench(images=chain.tars[0], overrides=["model.image_size=30"], k=16, device="cpu", seconds=0.01)
    assert not list(tmp_path.iterdir())
