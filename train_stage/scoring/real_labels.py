"""ReaL labels: all classes that an image of a validation set shows (Beyer et al. 2020, arXiv 2006.07159)."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from msgspec import Meta
from torch import Tensor

from ...shared.artifacts.fields import read_json
from ...shared.errors import DataError
from ...shared.sources.records import ImageRecord

_Output = Annotated[int, Meta(ge=0)]
_WHAT = "a list of ReaL labels: for each image, in the order of their file names, the list of its classes' numbers"


@dataclass(frozen=True)
class RealLabels:
    """For each image, the outputs that are right; none leave the image out."""

    accepted: Sequence[frozenset[int]]

    @property
    def images(self) -> int:
        """How many images have any."""
        return sum(map(bool, self.accepted))

    def accuracy(self, predicted: Tensor) -> float:
        """The share of the images with ReaL labels whose predicted output (n,) is one of them."""
        pairs = zip(predicted.tolist(), self.accepted, strict=True)
        right = [output in outputs for output, outputs in pairs if outputs]
        return sum(right) / len(right)


def read_real_labels(file: str | Path, records: Sequence[ImageRecord], outputs: int) -> RealLabels:
    """The ReaL labels of images, from a JSON list of lists of output numbers such as the published real.json.

    Line i of the list is the image whose file name is the i-th in sorted order, whatever folder it lies in.

    Raises:
        DataError if the file is no such list, is of another number of images, has a number that is no output or no
        labels at all, or if two images have the same file name.
    """
    path = Path(file)
    listed = read_json(path, list[list[_Output]], _WHAT)
    if len(listed) != len(records):
        raise DataError(
            f"{path} has the ReaL labels of {len(listed):,} images and there are {len(records):,}; give exactly the "
            "images that the list was made for."
        )
    beyond = next((number for numbers in listed for number in numbers if number >= outputs), None)
    if beyond is not None:
        raise DataError(f"{path} has class number {beyond}, and the weights have the outputs 0 to {outputs - 1}.")
    if not any(listed):
        raise DataError(f"{path} has no label for any image; give the ReaL labels of these images.")
    names = [record.key.rpartition("/")[2] for record in records]
    order = torch.tensor(sorted(range(len(names)), key=names.__getitem__))
    twice = next((a for a, b in zip(sorted(names), sorted(names)[1:], strict=False) if a == b), None)
    if twice is not None:
        raise DataError(
            f"{path} is in the order of the images' file names, and two images are named {twice!r}; give --val images "
            "with names of their own."
        )
    accepted = [frozenset[int]()] * len(names)
    for index, numbers in zip(order.tolist(), listed, strict=True):
        accepted[index] = frozenset(numbers)
    return RealLabels(accepted)
