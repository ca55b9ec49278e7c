"""Tokens in a notebook: of one image or of many, as numpy, torch or pandas, and as HTML tables."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..artifacts.codes import Tokens
from ..errors import UsageError
from ..labels.columns import NO_LABEL
from ..labels.parsing import Label
from .rows import ShardRows

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
{% for view in views %}<table><caption style="text-align: left">view {{ loop.index0 }}: {{ view.caption }}</caption>
{% for row in view.tokens %}<tr>{% for code in row %}<td>{{ code }}</td>{% endfor %}</tr>
{% endfor %}</table>
{% endfor %}
"""


@dataclass(frozen=True, eq=False)
class ImageTokens:
    """What a token store knows about one image: V views of H x W tokens."""

    key: str
    label: Label | None
    """The number or the name of its class; None for an image without a label."""
    height: int
    width: int
    """Height and width of the upright image, in pixels."""
    tokens: Tokens = field(repr=False)
    """(V, H, W) uint16, or uint32 where K is more than 65,536."""
    crops: NDArray[np.float64] = field(repr=False)
    """(V, 4) float64: top, left, height, width in upright source pixels."""
    flips: NDArray[np.bool_] = field(repr=False)
    """(V,) bool: mirrored left to right after the crop."""

    @classmethod
    def of(cls, rows: ShardRows, row: int) -> "ImageTokens":
        """The image of one row of a shard, in arrays that do not keep the shard in memory."""
        return cls(
            key=str(rows.keys[row]),
            label=rows.label(row),
            height=int(rows.sizes[row, 0]),
            width=int(rows.sizes[row, 1]),
            tokens=rows.tokens[row].copy(),
            crops=rows.crops[row].copy(),
            flips=rows.flips[row].copy(),
        )

    def to_numpy(self) -> Tokens:
        """Tokens (V, H, W), uint16 or uint32."""
        return self.tokens

    def to_torch(self) -> "torch.Tensor":
        """Tokens (V, H, W) int64, the dtype that torch indexes with."""
        return to_torch(self.tokens)

    def to_pandas(self) -> "pandas.DataFrame":
        """One row per patch: key, label, view, flip, row, column, token. Raises UsageError without pandas."""
        return to_pandas([self])

    def _repr_html_(self) -> str:
        views = [
            {"caption": _view_caption(crop, flip), "tokens": grid.tolist()}
            for crop, flip, grid in zip(self.crops, self.flips, self.tokens, strict=True)
        ]
        return _rendered(_GRIDS, key=self.key, label=self.label, height=self.height, width=self.width, views=views)


def _view_caption(crop: NDArray[np.float64], flip: bool) -> str:
    top, left, height, width = crop
    return f"{width:.1f}x{height:.1f} at ({left:.1f}, {top:.1f}){', flipped' if flip else ''}"


def to_torch(tokens: Tokens) -> "torch.Tensor":
    """Tokens of any shape as an int64 tensor."""
    import torch

    return torch.from_numpy(tokens.astype(np.int64))


def to_pandas(images: Sequence[ImageTokens]) -> "pandas.DataFrame":
    """One row per patch, with the columns of `columns`. Raises UsageError if pandas is not installed."""
    try:
        import pandas
    except ImportError:
        raise UsageError("to_pandas needs pandas, which is not installed; pip install pandas.") from None
    return pandas.DataFrame(columns(images))


def columns(images: Sequence[ImageTokens]) -> dict[str, Any]:
    """The columns key, label, view, flip, row, column and token, with an item per patch.

    Labels are int64, -1 for none; if any is a class name, they are objects, None for none.
    """
    shapes = [image.tokens.shape for image in images]
    places = [np.indices(shape).reshape(3, -1) for shape in shapes] or [np.empty((3, 0), dtype=np.int64)]
    view, row, column = np.concatenate(places, axis=1)
    sizes = [image.tokens.size for image in images]
    has_names = any(isinstance(image.label, str) for image in images)
    missing, dtype = (None, object) if has_names else (NO_LABEL, np.int64)
    labels = [missing if image.label is None else image.label for image in images]
    flips = [np.repeat(image.flips, shape[1] * shape[2]) for image, shape in zip(images, shapes, strict=True)]
    tokens = [image.tokens.reshape(-1) for image in images]
    return {
        "key": np.repeat(np.array([image.key for image in images], dtype=object), sizes),
        "label": np.repeat(np.array(labels, dtype=dtype), sizes),
        "view": view,
        "flip": np.concatenate([np.empty(0, dtype=bool), *flips]),
        "row": row,
        "column": column,
        "token": np.concatenate([np.empty(0, dtype=np.uint16), *tokens]),
    }


def facts_html(title: str, facts: Sequence[tuple[str, object]]) -> str:
    """A two-column HTML table for a notebook; titles and facts are escaped."""
    return _rendered(_FACTS, title=title, facts=facts)


def _rendered(template: str, **values: object) -> str:
    from jinja2 import Environment

    return Environment(autoescape=True).from_string(template).render(**values)
