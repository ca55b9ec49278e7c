"""Predictions equal those of a naive model on images that torchvision prepares, and so the published oracle."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from mapet.shared.errors import DataError, UsageError
from mapet.train_stage.classification.logits import classify
from mapet.train_stage.evaluation.embed import Execution
from mapet.train_stage.evaluation.labelled import labelled_images
from mapet.train_stage.predict import predict, show
from mapet.train_stage.weights.read import load_weights
from PIL import Image
from safetensors.torch import load_file
from torch.nn.functional import conv2d, gelu, layer_norm, linear
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor

ORACLE = Path(__file__).parent / "oracle"
WEIGHTS = ORACLE / "finetune.pth.tar"
VIEW = Compose(
    [
        Resize(71, InterpolationMode.BICUBIC),  # floor(64 / 0.9)
        CenterCrop(64),
        ToTensor(),
        Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ]
)


def naive_logits(images: torch.Tensor) -> torch.Tensor:
    """The published fine-tuned ViT (3 heads), written out: images (B, 3, 64, 64) -> logits (B, 10)."""
    state = torch.load(WEIGHTS, weights_only=False)["state_dict"]
    state = {name.removeprefix("module."): tensor for name, tensor in state.items()}

    def norm(name: str, rows: torch.Tensor) -> torch.Tensor:
        return layer_norm(rows, (48,), state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)

    def dense(name: str, rows: torch.Tensor) -> torch.Tensor:
        return linear(rows, state[f"{name}.weight"], state.get(f"{name}.bias"))

    patches = conv2d(images, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=16)
    rows = torch.cat([state["cls_token"].expand(len(images), -1, -1), patches.flatten(2).mT], 1) + state["pos_embed"]
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    for block in (f"blocks.{index}" for index in range(depth)):
        normed = norm(f"{block}.norm1", rows)
        keys, values = dense(f"{block}.attn.kv", normed).chunk(2, -1)
        queries = dense(f"{block}.attn.q", normed)
        q, k, v = (part.unflatten(-1, (3, 16)).transpose(1, 2) for part in (queries, keys, values))
        mixed = ((q @ k.mT / 4).softmax(-1) @ v).transpose(1, 2).flatten(2)
        rows = rows + state[f"{block}.ls1.gamma"] * dense(f"{block}.attn.proj", mixed)
        hidden = gelu(dense(f"{block}.mlp.fc1", norm(f"{block}.norm2", rows)))
        rows = rows + state[f"{block}.ls2.gamma"] * dense(f"{block}.mlp.fc2", hidden)
    return dense("head", norm("fc_norm", rows[:, 1:].mean(1)))


def close(ours: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((ours - expected).abs().max() <= 1e-5 * expected.abs().max())


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six PNGs of smooth noise, of three sizes, without labels."""
    folder = tmp_path_factory.mktemp("pictures")
    drawn = np.random.default_rng(0)
    for number, size in enumerate([(71, 71), (64, 64), (100, 71)] * 2):
        noise = Image.fromarray(drawn.integers(0, 256, (9, 9, 3), dtype=np.uint8))
        noise.resize(size, Image.Resampling.BICUBIC).save(folder / f"{number}.png")
    return folder


@torch.no_grad()
def test_the_oracles_logits():
    expected = load_file(ORACLE / "finetune_expected.safetensors")
    assert close(naive_logits(expected["images"]), expected["logits"])
    assert close(load_weights(WEIGHTS).vit()(expected["images"]), expected["logits"])


@torch.no_grad()
@pytest.mark.parametrize("batch_size", [128, 4])
def test_probabilities_are_the_softmax_of_naive_logits(pictures: Path, batch_size: int):
    images = torch.stack([VIEW(Image.open(pictures / f"{number}.png")) for number in range(6)])
    expected = naive_logits(images).double().softmax(1)
    predictions = predict(WEIGHTS, pictures, top=10, batch_size=batch_size)
    assert [one.key for one in predictions] == [str(number) for number in range(6)]
    for prediction, row in zip(predictions, expected, strict=True):
        ranked = [one.probability for one in prediction.classes]
        assert ranked == sorted(ranked, reverse=True)
        ours = torch.zeros(10, dtype=torch.float64)
        for one in prediction.classes:
            ours[one.output] = one.probability
        assert close(ours, row)
        assert {one.name: one.output for one in prediction.classes} == {str(output): output for output in range(10)}


@torch.no_grad()
def test_logits_of_files_are_naive_ones(pictures: Path, tmp_path: Path):
    """What `evaluate` measures."""
    labels = tmp_path / "labels.txt"
    labels.write_text("0\n" * 6)
    images = torch.stack([VIEW(Image.open(pictures / f"{number}.png")) for number in range(6)])
    ours = classify(load_weights(WEIGHTS), labelled_images(pictures, labels=labels).records, Execution())
    assert close(ours, naive_logits(images))


def test_top_counts_classes_and_is_never_more_than_there_are(pictures: Path):
    assert [len(one.classes) for one in predict(WEIGHTS, pictures, top=3)] == [3] * 6
    assert [len(one.classes) for one in predict(WEIGHTS, pictures, top=50)] == [10] * 6
    with pytest.raises(UsageError, match="--top 0"):
        predict(WEIGHTS, pictures, top=0)


def test_a_csv_file_has_the_same_predictions(pictures: Path, tmp_path: Path):
    predictions = predict(WEIGHTS, pictures, top=2, csv=tmp_path / "out" / "table.csv")
    with open(tmp_path / "out" / "table.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["key", "file", "class_1", "probability_1", "class_2", "probability_2"]
    for row, prediction in zip(rows, predictions, strict=True):
        first, second = prediction.classes
        assert (row["key"], row["file"]) == (prediction.key, prediction.file)
        assert (row["class_1"], row["class_2"]) == (first.name, second.name)
        assert (float(row["probability_1"]), float(row["probability_2"])) == (first.probability, second.probability)


def test_outputs_without_names_get_those_of_a_list(pictures: Path, tmp_path: Path):
    names = tmp_path / "names.txt"
    names.write_text("".join(f"class {letter}\n" for letter in "abcdefghij"))
    named = predict(WEIGHTS, pictures, classes=names)
    assert {one.name for prediction in named for one in prediction.classes} <= {f"class {c}" for c in "abcdefghij"}
    assert [one.classes[0].output for one in named] == [one.classes[0].output for one in predict(WEIGHTS, pictures)]
    names.write_text("only\nthree\nnames\n")
    with pytest.raises(DataError, match=r"names 3 classes and .* has 10 outputs"):
        predict(WEIGHTS, pictures, classes=names)


def test_unreadable_images_are_skipped_if_asked_for(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], write_folder
):
    files = {f"{number}.png": (pictures / f"{number}.png").read_bytes() for number in range(3)}
    folder = write_folder(tmp_path / "some", {**files, "1.png": files["1.png"][:60]})
    with pytest.raises(DataError, match="image '1'"):
        predict(WEIGHTS, folder)
    skipping = predict(WEIGHTS, folder, on_error="skip")
    alone = predict(WEIGHTS, pictures)
    assert [one.key for one in skipping] == ["0", "2"]
    assert "Skipped 1 unreadable image:" in capsys.readouterr().err
    for one, whole in zip(skipping, (alone[0], alone[2]), strict=True):
        assert [c.output for c in one.classes] == [c.output for c in whole.classes]
        assert [c.probability for c in one.classes] == pytest.approx([c.probability for c in whole.classes], rel=1e-5)
    with pytest.raises(DataError, match="None of the images"):
        predict(WEIGHTS, write_folder(tmp_path / "bad", {"1.png": files["1.png"][:60]}), on_error="skip")


def test_labels_that_cannot_be_read_do_not_matter(pictures: Path, tmp_path: Path, write_tar):
    tar = tmp_path / "some.tar"
    write_tar(tar, {"0.png": (pictures / "0.png").read_bytes(), "0.cls": b"\xff\xfe\xff"})
    with pytest.raises(DataError, match="label"):
        labelled_images(tar)
    (alone,), first = predict(WEIGHTS, tar), predict(WEIGHTS, pictures)[0]
    assert (alone.key, alone.classes[0].output) == ("0", first.classes[0].output)


def test_json_is_one_line_per_image(pictures: Path, capsys: pytest.CaptureFixture[str]):
    predictions = predict(WEIGHTS, pictures, top=2)
    capsys.readouterr()
    show(predictions, as_json=True)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines == [one.to_json() for one in predictions]
    assert list(lines[0]) == ["key", "file", "classes"]
    assert list(lines[0]["classes"][0]) == ["name", "output", "probability"]
