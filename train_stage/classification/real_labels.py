"""ReaL labels: for each validation image, all outputs that are right (Beyer et al. 2020, arXiv 2006.07159)."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...shared.errors import DataError


def read_real_labels(path: str | Path, keys: Sequence[str], outputs: int) -> list[set[int]]:
    """The right outputs of each image, in the order of `keys`; an empty set leaves an image out.

    Args:
        path: a JSON file: a list of lists in the order of the sorted keys (the published real.json), or an object from
            key to list.
        keys: the keys of the images.
        outputs: the number of outputs of the model.

    Raises:
        DataError if the file cannot be read, or does not describe these images.
    """
    try:
        content: Any = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}).") from None
    except ValueError:
        raise DataError(
            f"{path} is not JSON; give a list of lists of outputs, or an object from key to list."
        ) from None
    if isinstance(content, list):
        if len(content) != len(keys):
            raise DataError(f"{path} has the labels of {len(content)} images, and there are {len(keys)} images.")
        content = dict(zip(sorted(keys), content, strict=True))
    if not isinstance(content, dict):
        raise DataError(f"{path} is neither a list of lists of outputs nor an object from key to list.")
    missing = [key for key in keys if key not in content]
    if missing:
        raise DataError(f"{path} has no labels of {len(missing)} images, such as {missing[0]!r}.")
    for key in keys:
        if not isinstance(content[key], list) or not all(
            isinstance(at, int) and 0 <= at < outputs for at in content[key]
        ):
            raise DataError(f"{path}: the labels of {key!r} are not outputs from 0 to {outputs - 1}.")
    accepted = [set(content[key]) for key in keys]
    if not any(accepted):
        raise DataError(f"{path} has no labels at all.")
    return accepted
