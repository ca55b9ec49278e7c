"""ReaL labels are those of the images in the order of their file names."""

import json
from pathlib import Path

import pytest
import torch
from mapet.shared.errors import DataError
from mapet.shared.sources.records import ImageRecord
from mapet.train_stage.scoring.real_labels import read_real_labels


def records(*keys: str) -> list[ImageRecord]:
    return [ImageRecord(key, Path("val.tar"), 0, 1, 0) for key in keys]


def written(tmp_path: Path, content: object) -> Path:
    path = tmp_path / "real.json"
    path.write_text(json.dumps(content))
    return path


def test_lists_are_in_the_order_of_file_names_whatever_folder_they_lie_in(tmp_path: Path):
    path = written(tmp_path, [[1], [], [0, 2]])
    real = read_real_labels(path, records("b/val_1", "a/val_3", "a/val_2"), 3)
    assert list(real.accepted) == [{1}, {0, 2}, set()]
    assert real.images == 2
    assert real.accuracy(torch.tensor([1, 1, 0])) == 0.5
    assert real.accuracy(torch.tensor([1, 2, 0])) == 1


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ([[0], [1]], "the ReaL labels of 2 images and there are 3"),
        ([[0], [3], []], "class number 3, and the weights have the outputs 0 to 2"),
        ([[], [], []], "no label for any image"),
        ([[0], [-1], []], "wrong"),
        ([[0], [0.5], []], "wrong"),
        ([0, 1, 2], "wrong"),
        ({"val_1": [0]}, "is not a list of ReaL labels"),
    ],
)
def test_what_is_no_list_of_these_images_is_refused(tmp_path: Path, content: object, part: str):
    with pytest.raises(DataError, match=part):
        read_real_labels(written(tmp_path, content), records("val_1", "val_2", "val_3"), 3)


def test_two_images_of_one_name_are_refused(tmp_path: Path):
    with pytest.raises(DataError, match="two images are named 'val_1'"):
        read_real_labels(written(tmp_path, [[0], [0]]), records("a/val_1", "b/val_1"), 3)
