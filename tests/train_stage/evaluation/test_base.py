"""Every evaluation is given weights and labelled images, and states its numbers with the protocol behind them."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mapet.shared.errors import DataError, UsageError
from mapet.train_stage.evaluation import embed
from mapet.train_stage.evaluation.base import (
    Evaluation,
    EvaluationInputs,
    EvaluationResult,
    evaluate,
)
from mapet.train_stage.evaluation.embed import (
    Execution,
    extract_features,
    fresh_weights,
    pixel_encoder,
    pooled_encoder,
)
from mapet.train_stage.evaluation.labelled import LabelledImages, labelled_images
from mapet.train_stage.probing.knn import KNearestNeighbours
from mapet.train_stage.probing.linear_probe import LinearProbe
from mapet.train_stage.probing.run_probe import RunProbe
from mapet.train_stage.settings import resolve
from mapet.train_stage.weights.read import load_weights
from mapet.train_stage.weights.weights import Weights

FROZEN = [LinearProbe(), KNearestNeighbours()]


@pytest.fixture(scope="module")
def weights(run: Path) -> Weights:
    return load_weights(run)


@pytest.fixture(scope="module")
def images(chain) -> LabelledImages:
    return labelled_images(chain.images)


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of images in each batch that a ViT encodes, as it happens."""
    counts: list[int] = []
    plain: Callable[..., list[tuple[torch.Tensor, torch.Tensor]]] = embed.embed_blocks

    def counting(model, pixels: torch.Tensor, blocks: list[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        counts.append(len(pixels))
        return plain(model, pixels, blocks)

    monkeypatch.setattr(embed, "embed_blocks", counting)
    return counts


class Rotation(Evaluation):
    """An evaluation that needs the weights and the images themselves, as fine-tuning will."""

    @property
    def name(self) -> str:
        return "rotation"

    def evaluate(self, inputs: EvaluationInputs) -> EvaluationResult:
        numbers = {"parameters": float(sum(tensor.numel() for tensor in inputs.weights.tensors.values()))}
        protocol = {"train_images": len(inputs.train), "val_images": len(inputs.val)}
        return EvaluationResult(self.name, protocol, numbers)


def test_evaluations_of_frozen_features_share_one_pass_over_the_images(weights, images, encoded: list[int]):
    val = images.subset(20)
    advanced: list[int] = []
    execution = Execution(batch_size=50, advance=advanced.append)
    results = evaluate([*FROZEN, KNearestNeighbours(k=3), Rotation()], weights, images, val, execution)
    assert [result.name for result in results] == ["linear", "knn", "knn", "rotation"]
    assert encoded == advanced == [50, 46, 20]
    assert results[3].protocol == {"train_images": 96, "val_images": 20}


def test_evaluations_that_do_not_read_features_extract_none(weights, images, encoded: list[int]):
    evaluate([Rotation()], weights, images, images)
    assert encoded == []


def test_features_extracted_before_give_the_same_results(weights, images, encoded: list[int]):
    val, execution = images.subset(30), Execution()
    expected = evaluate(FROZEN, weights, images, val, execution)
    encoders = [pooled_encoder(weights, "cpu"), pixel_encoder(4)]
    features, pixels = extract_features(encoders, weights.preprocess, images, val, execution)
    encoded.clear()
    assert evaluate(FROZEN, weights, images, val, features=features) == expected
    assert encoded == []
    assert pixels.train.shape == (96, 3 * 4 * 4)
    assert FROZEN[0].measure(pixels).protocol["features"]["encoder"] == "pixels 4x4"


def test_a_result_is_plain_json_that_says_how_it_was_measured(weights, images):
    linear, knn = (result.to_json() for result in evaluate(FROZEN, weights, images, images.subset(20)))
    assert json.loads(json.dumps([linear, knn])) == [linear, knn]
    assert (knn["protocol"]["k"], knn["protocol"]["temperature"]) == (20, 0.07)
    assert linear["protocol"]["weight_decay"] in linear["protocol"]["weight_decays"]
    for result in (linear, knn):
        assert 0 <= result["numbers"]["top1"] <= 1
        assert result["protocol"]["features"] == {
            "encoder": "pre-trained",
            "feature": "mean over patches of the final norm's output",
            "block": 1,
            "dim": 32,
            "preprocess": weights.preprocess.to_json(),
            "train_images": 96,
            "val_images": 20,
            "val_classes": len(images.subset(20).labels.unique()),
        }


def test_a_subset_is_drawn_by_key_and_keeps_the_order(images):
    subset = images.subset(10)
    keys = [record.key for record in images.records]
    places = [keys.index(record.key) for record in subset.records]
    assert places == sorted(places)
    assert len(set(places)) == 10
    assert LabelledImages(images.records[::-1]).subset(10).records == subset.records[::-1]
    assert images.subset(500).records == images.records
    assert images.labels.tolist() == [record.label for record in images.records]


def test_fresh_weights_are_those_of_the_seed_and_leave_the_callers_random_state_alone(weights):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    once, again = fresh_weights(weights), fresh_weights(weights)
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(tensor, again.tensors[name]) for name, tensor in once.tensors.items())
    assert once.seed == 3
    assert not torch.equal(once.tensors["pos_embed"], weights.tensors["pos_embed"])


def run_probe(images: Path, *overrides: str) -> RunProbe:
    model = ["model.name=null", "model.dim=32", "model.depth=2", "model.heads=2", "model.image_size=64"]
    data = ["data.mean=[0.4,0.5,0.6]", "data.std=[0.2,0.25,0.3]", "data.interpolation=bilinear"]
    probed = [f"probe.images={images}", f"probe.val={images}", "probe.max_images=40"]
    return RunProbe(resolve(None, [*model, *data, "model.patch_size=8", *probed, *overrides]), "cpu")


def test_the_probe_of_a_run_is_the_evaluation_of_its_weights_on_subsets(chain, weights, images):
    expected = evaluate(FROZEN[::-1], weights, images.subset(40), images.subset(10))
    k = weights.shape.k
    measured = run_probe(chain.images, "probe.linear=true").measure(weights.tensors, k)
    assert measured == {result.name: result.numbers["top1"] for result in expected}
    assert run_probe(chain.images).measure(weights.tensors, k) == {"knn": measured["knn"]}


def test_a_run_without_images_to_probe_has_no_probe():
    with pytest.raises(UsageError, match="must be set"):
        RunProbe(resolve(None), "cpu")


def test_images_without_a_label_are_refused(tmp_path: Path):
    from PIL import Image

    Image.new("RGB", (64, 64)).save(tmp_path / "plain.png")
    with pytest.raises(DataError, match=r"1 of the 1 images in .* have no label"):
        labelled_images(tmp_path)
