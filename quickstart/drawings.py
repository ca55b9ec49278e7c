"""Labelled, captioned images drawn from a seed, for demos and tests without a download.

Every image is a pure function of (seed, index). One object of `CLASSES` stands on a patterned backdrop with a little
clutter. Colours, surface, position, scale and tilt are drawn independently of the class, so neither the mean colour nor
a template of raw pixels predicts the class well: its outline does.
"""

from __future__ import annotations

import io
import math
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Floats = NDArray[np.floating[Any]]

CLASSES: tuple[str, ...] = (
    "ring", "crescent", "cross", "star", "heart", "arrow", "house", "tree",
    "fish", "mushroom", "cup", "key", "bolt", "flower", "umbrella", "sailboat",
)  # fmt: skip

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (208, 40, 45), "orange": (226, 112, 24), "green": (52, 140, 66), "turquoise": (20, 150, 150),
    "blue": (45, 90, 205), "purple": (125, 60, 170), "magenta": (205, 50, 140), "brown": (120, 72, 40),
    "grey": (105, 108, 116), "black": (35, 35, 42),
}  # fmt: skip
# Backdrops are pale and objects are not: a small tower then learns to tell them apart within minutes.
BACKDROP_COLOURS: dict[str, tuple[int, int, int]] = {
    "pink": (250, 205, 215), "peach": (252, 220, 190), "yellow": (250, 238, 165), "lime": (218, 240, 180),
    "mint": (195, 238, 220), "sky": (195, 225, 248), "lilac": (222, 208, 245), "white": (246, 246, 242),
}  # fmt: skip

SURFACES: tuple[str, ...] = ("plain", "striped", "checked", "dotted")
BACKDROPS: tuple[str, ...] = ("plain", "shaded", "cloudy", "striped", "checked", "dotted")

_OVERSAMPLE = 4  # Outlines are drawn this many times larger and then reduced, which smooths them.


@dataclass(frozen=True)
class Drawing:
    """One RGB image; `label` indexes `CLASSES`, and `key` is unique to its (seed, index)."""

    image: Image.Image
    label: int
    caption: str
    key: str
    mask: Image.Image
    """Mode "L", of the image's size: `label` + 1 on the pixels of which the object covers half or more, 0 elsewhere."""


# Outlines in units of half the object's extent, x right and y down. "+" adds a part, "-" cuts it away and "!"
# draws it in the contrasting shade of a detail; later parts go over earlier ones. "poly" takes points x y,
# "box" left top right bottom, and "disc" centre and radii and, for a piece, its first and last degree
# (clockwise from the right).
_OUTLINES: dict[str, str] = {
    "ring": "+disc 0 0 .95 .95;-disc 0 0 .52 .52",
    "crescent": "+disc 0 0 .97 .97;-disc .45 -.15 .78 .78",
    "cross": "+box -.3 -.95 .3 .95;+box -.95 -.3 .95 .3",
    "star": "+poly 0 -1 .25 -.34 .95 -.31 .4 .13 .59 .81 0 .42 -.59 .81 -.4 .13 -.95 -.31 -.25 -.34",
    "heart": "+disc -.47 -.33 .49 .5;+disc .47 -.33 .49 .5;+poly -.9 -.1 0 -.45 .9 -.1 0 .95",
    "arrow": "+box -.95 -.24 .2 .24;+poly .1 -.75 1 0 .1 .75",
    "house": "+box -.72 -.15 .72 .92;+poly -1 -.1 0 -.95 1 -.1;!box -.5 .3 -.1 .92;!box .2 .15 .52 .47",
    "tree": "+poly -.68 .05 0 -1 .68 .05;+poly -.85 .62 0 -.5 .85 .62;+box -.15 .6 .15 1;!box -.15 .62 .15 1",
    "fish": "+disc .22 0 .75 .48;+poly -.35 0 -1 -.55 -.8 0 -1 .55;!disc .6 -.12 .1 .1",
    "mushroom": "+disc 0 .1 .97 .95 180 360;+poly -.28 0 .28 0 .38 .92 -.38 .92;!disc -.4 -.25 .17 .17;"
    "!disc .12 -.5 .17 .17;!disc .5 -.15 .15 .15",
    "cup": "+disc .5 0 .4 .4;-disc .5 0 .2 .2;+poly -.9 -.7 .5 -.7 .35 .75 -.75 .75;!box -.9 -.7 .5 -.5",
    "key": "+disc -.52 0 .46 .46;+box -.2 -.13 1 .13;+box .45 0 .62 .42;+box .8 0 .98 .48;-disc -.5 0 .2 .2",
    "bolt": "+poly .3 -1 -.6 .15 -.08 .15 -.32 1 .62 -.25 .1 -.25 .55 -1",
    "flower": "+disc .62 0 .34 .34;+disc .31 .54 .34 .34;+disc -.31 .54 .34 .34;+disc -.62 0 .34 .34;"
    "+disc -.31 -.54 .34 .34;+disc .31 -.54 .34 .34;+disc 0 0 .5 .5;!disc 0 0 .3 .3",
    "umbrella": "+disc 0 .1 .97 .95 180 360;-disc -.65 .12 .32 .2;-disc 0 .12 .32 .2;-disc .65 .12 .32 .2;"
    "+box -.07 -.1 .07 .8;+disc .16 .75 .23 .23 0 180;-disc .16 .75 .1 .1 0 180",
    "sailboat": "+poly -.95 .4 .95 .4 .6 .9 -.65 .9;+box -.06 -.95 .05 .45;+poly .12 -.9 .85 .28 .12 .28;"
    "+poly -.14 -.65 -.14 .28 -.75 .28",
}


def _polygon(form: str, n: list[float]) -> Floats:
    """The points, shape (count, 2), of one part of an outline; see `_OUTLINES` for its numbers."""
    if form == "poly":
        return np.array(n).reshape(-1, 2)
    if form == "box":
        return np.array([(n[0], n[1]), (n[2], n[1]), (n[2], n[3]), (n[0], n[3])])
    first, last = n[4:] or (0.0, 360.0)
    angle = np.radians(np.linspace(first, last, int((last - first) / 10)))
    return np.stack([n[0] + n[2] * np.cos(angle), n[1] + n[3] * np.sin(angle)], axis=1)


@cache
def _outline(name: str) -> list[tuple[str, Floats]]:
    """The parts of a class in drawing order: "+", "-" or "!" and a polygon of shape (count, 2)."""
    words = [part.split() for part in _OUTLINES[name].split(";")]
    return [(head[0], _polygon(head[1:], [float(n) for n in rest])) for head, *rest in words]


def _pattern(name: str, rng: Generator, size: int) -> Floats:
    """A pattern in [-1, 1], shape (size, size), float32; periods are fractions of the picture's side."""
    if name == "plain":
        return np.zeros((size, size), np.float32)
    if name == "cloudy":
        coarse = Image.fromarray(rng.uniform(-1, 1, (6, 6)).astype(np.float32))
        return np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC))
    turn = rng.uniform(0, 2 * math.pi)
    line = np.arange(size, dtype=np.float32) / size - 0.5
    along = math.cos(turn) * line[None, :] + math.sin(turn) * line[:, None]
    if name == "shaded":
        return along * 1.4
    across = math.cos(turn) * line[:, None] - math.sin(turn) * line[None, :]
    wave = 2 * math.pi / rng.uniform(0.11, 0.2)
    first = np.sin(along * wave + rng.uniform(0, 2 * math.pi))
    if name == "striped":
        pattern = 3 * first
    else:
        second = np.sin(across * wave + rng.uniform(0, 2 * math.pi))
        pattern = 4 * first * second if name == "checked" else 4 * (first + second) - 3
    clipped: Floats = np.clip(pattern, -1, 1)
    return clipped


def _paint(rgb: Floats, pattern: Floats, depth: float) -> Floats:
    """Colour `rgb`, shape (3,), made lighter and darker by `pattern` to shape (size, size, 3), float32."""
    # A dark colour cannot get much darker, so its pattern is drawn lighter.
    step = depth * (1.0 if rgb.mean() < 110 else -1.0)
    return rgb.astype(np.float32) + (pattern * step)[..., None]


def _place(rng: Generator) -> tuple[Floats, float, str]:
    """Centre (x, y) and extent as fractions of the side, and the place in words ("in the upper left")."""
    extent = rng.uniform(0.4, 0.76)
    offset = rng.uniform(-1, 1, 2) * (1 - extent) / 2
    row, column = (0 if abs(v) <= 0.05 else 1 if v < 0 else 2 for v in (offset[1], offset[0]))
    places = (
        ("in the middle", "on the left", "on the right"),
        ("at the top", "in the upper left", "in the upper right"),
        ("at the bottom", "in the lower left", "in the lower right"),
    )
    return 0.5 + offset, extent, places[row][column]


def _masks(name: str, rng: Generator, centre: Floats, extent: float, size: int) -> list[Floats]:
    """Coverage of the object, and of its details, in [0, 1], each of shape (size, size), float32."""
    large = size * _OVERSAMPLE
    tilt = math.radians(rng.uniform(-15, 15))
    half = rng.uniform(0.88, 1.0, 2) * (large * extent / 2)
    turn = np.array([[math.cos(tilt), math.sin(tilt)], [-math.sin(tilt), math.cos(tilt)]])
    frame = np.diag([rng.choice((-1, 1)) * half[0], half[1]]) @ turn
    whole, detail = Image.new("L", (large, large)), Image.new("L", (large, large))
    pens = {False: ImageDraw.Draw(whole), True: ImageDraw.Draw(detail)}
    for kind, outline in _outline(name):
        points = (outline @ frame + centre * large).ravel().tolist()
        pens[kind == "!"].polygon(points, fill=0 if kind == "-" else 255)
    return [np.asarray(layer.reduce(_OVERSAMPLE), np.float32) / 255 for layer in (whole, detail)]


def _clutter(rng: Generator, size: int) -> Floats:
    """Coverage in [0, 1], shape (size, size), float32, of two to six small discs, triangles and squares."""
    layer = Image.new("L", (size * 2, size * 2))
    pen = ImageDraw.Draw(layer)
    for _ in range(rng.integers(2, 7)):
        x, y = rng.uniform(0, 2 * size, 2)
        reach = rng.uniform(0.05, 0.1) * size
        corners = rng.choice((3, 4, 12))
        angle = rng.uniform(0, 2 * math.pi) + np.arange(corners) * (2 * math.pi / corners)
        points = np.stack([x + reach * np.cos(angle), y + reach * np.sin(angle)], axis=1)
        pen.polygon(points.ravel().tolist(), fill=255)
    return np.asarray(layer.reduce(2), np.float32) / 255


def _colour(palette: dict[str, tuple[int, int, int]], rng: Generator) -> tuple[str, Floats]:
    """A name from the palette and a jittered RGB value, shape (3,), of it."""
    name = list(palette)[rng.integers(len(palette))]
    return name, np.array(palette[name]) + rng.uniform(-10, 10, 3)


def _words(rng: Generator, name: str, front: str, back: str, surface: str, place: str, extent: float) -> str:
    """A caption of one or two sentences. Some omit the colours, so that a text tower must learn the shape."""
    a = "an" if name[0] in "aeiou" else "a"
    scale = "small" if extent < 0.52 else "large" if extent > 0.64 else "medium"
    return (
        f"a {scale} {front} {surface} {name} {place} on a {back} background",
        f"a drawing of {a} {name}. it is {surface} and stands {place}.",
        f"{a} {name}, {front} and {surface}, on {back}. it is {scale} and {place}.",
        f"a picture of a {surface} {name}",
    )[rng.integers(4)]


def draw(index: int, seed: int, size: int = 64) -> Drawing:
    """Draws image number `index` of the series `seed`; the same arguments give the same pixels.

    The label is `index` modulo the number of classes; `size` is the image's side in pixels.

    Raises:
        ValueError: A negative `index` or `seed`, or a `size` under 16.
    """
    if index < 0 or seed < 0 or size < 16:
        raise ValueError(f"index {index} and seed {seed} must be at least 0 and size {size} at least 16")
    rng = np.random.default_rng((seed, index))
    label = index % len(CLASSES)
    front, front_rgb = _colour(COLOURS, rng)
    back, back_rgb = _colour(BACKDROP_COLOURS, rng)
    surface, backdrop = SURFACES[rng.integers(len(SURFACES))], BACKDROPS[rng.integers(len(BACKDROPS))]
    centre, extent, place = _place(rng)
    caption = _words(rng, CLASSES[label], front, back, surface, place, extent)

    canvas = _paint(back_rgb, _pattern(backdrop, rng, size), depth=rng.uniform(8, 20))
    specks = _colour(COLOURS, rng)[1].astype(np.float32)
    canvas += (_clutter(rng, size) * 0.8)[..., None] * (specks - canvas)
    whole, detail = _masks(CLASSES[label], rng, centre, extent, size)
    thing = _paint(front_rgb, _pattern(surface, rng, size), depth=rng.uniform(28, 45))
    dark = 0.45 * thing if front_rgb.mean() >= 110 else 0.45 * thing + 130
    thing += detail[..., None] * (dark - thing)
    canvas += whole[..., None] * (thing - canvas)
    canvas += rng.normal(0, rng.uniform(1, 4), (size, size, 1)).astype(np.float32)
    image = Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8))
    mask = Image.fromarray(np.where(whole >= 0.5, label + 1, 0).astype(np.uint8))
    return Drawing(image, label, caption, f"drawing-{seed:04d}-{index:06d}", mask)


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def write_drawings(
    directory: Path,
    count: int,
    seed: int,
    per_tar: int = 1000,
    prefix: str = "drawings",
    *,
    masks: bool = False,
    size: int = 64,
) -> list[Path]:
    """Writes drawings 0 to `count` - 1 of the series `seed` as WebDataset tars and returns their paths.

    Each sample has `KEY.jpg` (`size` x `size` pixels), `KEY.cls` (the label in ASCII) and `KEY.txt` (the caption,
    UTF-8); with `masks` also `KEY.seg.png` (`Drawing.mask`). The tars are `directory/PREFIX-000000.tar` and so on;
    existing files of these names are replaced.

    Raises:
        ValueError: `count` or `per_tar` under 1.
    """
    import webdataset

    if count < 1 or per_tar < 1:
        raise ValueError(f"count {count} and per_tar {per_tar} must be at least 1")
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, first in enumerate(range(0, count, per_tar)):
        path = directory / f"{prefix}-{number:06d}.tar"
        # Written under another name first, so that a reader of the folder never sees an incomplete tar.
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        with webdataset.TarWriter(str(partial), mtime=0.0) as tar:
            for index in range(first, min(first + per_tar, count)):
                drawing, jpeg = draw(index, seed, size), io.BytesIO()
                drawing.image.save(jpeg, "JPEG", quality=92)
                parts = {"jpg": jpeg.getvalue(), "cls": drawing.label, "txt": drawing.caption}
                if masks:
                    parts["seg.png"] = _png(drawing.mask)
                tar.write({"__key__": drawing.key, **parts})
        partial.replace(path)
        paths.append(path)
    return paths
