"""Tokens in a notebook: one image's, or many, as numpy, torch or pandas, and as a table to look at."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import UsageError
from .rows import NO_LABEL, ShardRows

if TYPE_CHECKING:
    import pandas
    import torch

_FACTS = """
<table><caption style="text-align: left; font-weight: bold">{{ title }}</caption>
{% for name, value in facts %}<tr><th style="text-align: left">{{ name }}</th>
<td style="text-align: left">{{ value }}</td></tr>
{% endfor %}</table>
"""
_GRIDS = """
<p><b>{{ key }}</b>{% if label is not none %}, label {{ label }}{% endif %}, {{ width }}x{{ height }} px</p>
{% for view in views %}<table><caption style="text-align: left">view {{ loop.index0 }}: {{ view.about }}</caption>
{% for row in view.tokens %}<tr>{% for code in row %}<td>{{ code }}</td>{% endfor %}</tr>
{% endfor %}</table>
{% endfor %}
"""


@dataclass(frozen=True, eq=False)
class ImageTokens:
    """What a store holds of one image: V views of H x W tokens."""

    key: str
    label: int | None
    height: int
    width: int
    """Of the upright image, in pixels."""
    tokens: np.ndarray = field(repr=False)
    """(V, H, W) uint16."""
    crops: np.ndarray = field(repr=False)
    """(V, 4) float64: top, left, height, width in upright source pixels."""
    flips: np.ndarray = field(repr=False)
    """(V,) bool: mirrored left to right after the crop."""

    @classmethod
    def of(cls, rows: ShardRows, at: int) -> "ImageTokens":
        """The image at row `at` of a shard, in arrays of its own."""
        label = int(rows.labels[at])
        return cls(
            key=str(rows.keys[at]),
            label=None if label == NO_LABEL else label,
            height=int(rows.sizes[at, 0]),
            width=int(rows.sizes[at, 1]),
            tokens=rows.tokens[at].copy(),
            crops=rows.crops[at].copy(),
            flips=rows.flips[at].copy(),
        )

    def to_numpy(self) -> np.ndarray:
        """(V, H, W) uint16."""
        return self.tokens

    def to_torch(self) -> "torch.Tensor":
        """(V, H, W) int64, as torch counts and looks up."""
        return to_torch(self.tokens)

    def to_pandas(self) -> "pandas.DataFrame":
        """One line a patch: key, label, view, flip, row, column, token. Raises UsageError without pandas."""
        return to_pandas([self])

    def _repr_html_(self) -> str:
        views = [
            {"about": _about_view(crop, flip), "tokens": grid.tolist()}
            for crop, flip, grid in zip(self.crops, self.flips, self.tokens, strict=True)
        ]
        return _rendered(_GRIDS, key=self.key, label=self.label, height=self.height, width=self.width, views=views)


def _about_view(crop: np.ndarray, flip: bool) -> str:
    top, left, height, width = crop
    return f"{width:.1f}x{height:.1f} at ({left:.1f}, {top:.1f}){', flipped' if flip else ''}"


def to_torch(tokens: np.ndarray) -> "torch.Tensor":
    """Tokens of any shape as int64."""
    import torch

    return torch.from_numpy(tokens.astype(np.int64))


def to_pandas(images: Sequence[ImageTokens]) -> "pandas.DataFrame":
    """One line a patch (`columns`). Raises UsageError where pandas is not installed."""
    try:
        import pandas
    except ImportError:
        raise UsageError("to_pandas needs pandas, which is not installed; pip install pandas.") from None
    return pandas.DataFrame(columns(images))


def columns(images: Sequence[ImageTokens]) -> dict[str, Any]:
    """key, label (-1 where there is none), view, flip, row, column and token of every patch, each a column."""
    shapes = [image.tokens.shape for image in images]
    places = [np.indices(shape).reshape(3, -1) for shape in shapes] or [np.empty((3, 0), dtype=np.int64)]
    view, row, column = np.concatenate(places, axis=1)
    sizes = [image.tokens.size for image in images]
    labels = [NO_LABEL if image.label is None else image.label for image in images]
    flips = [np.repeat(image.flips, shape[1] * shape[2]) for image, shape in zip(images, shapes, strict=True)]
    tokens = [image.tokens.reshape(-1) for image in images]
    return {
        "key": np.repeat(np.array([image.key for image in images], dtype=object), sizes),
        "label": np.repeat(np.array(labels, dtype=np.int64), sizes),
        "view": view,
        "flip": np.concatenate([np.empty(0, dtype=bool), *flips]),
        "row": row,
        "column": column,
        "token": np.concatenate([np.empty(0, dtype=np.uint16), *tokens]),
    }


def facts_html(title: str, facts: Sequence[tuple[str, object]]) -> str:
    """A two-column table for a notebook; whatever is in the facts is shown as text."""
    return _rendered(_FACTS, title=title, facts=facts)


def _rendered(template: str, **values: object) -> str:
    from jinja2 import Environment

    return Environment(autoescape=True).from_string(template).render(**values)
