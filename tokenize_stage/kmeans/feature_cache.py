"""Sampled patch features on disk: one part per source shard first, then a single fp16 file in the sample's order."""

import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from msgspec import Meta, Struct
from numpy.typing import NDArray

from ...shared.artifacts.fields import Count, Text, checked
from ...shared.errors import DataError, UsageError
from ...shared.runtime.console import say
from ...shared.runtime.memory import as_text
from ...shared.storage.bounded import refuse_irregular
from ...shared.storage.files import read_sealed_json, write_sealed_json, written_whole

FORMAT, VERSION = "mapet-feature-cache", 1
_OLD_FORMAT = "mapet-features"
"""The id of caches before they had their own; `mapet train features` writes another artifact of that id."""
_SHEET, _FEATURES, _DRAWS, _SKIPPED, _PART = "sample.json", "features.f16", "draws.npy", "skipped.json", "part-"
_BLOCK = 4096

Rows = tuple[NDArray[np.float16], NDArray[np.uint64]]
"""Features (m, dim) of some patches and their draws (m,)."""


class _Sheet(Struct):
    """sample.json"""

    identity: dict[str, Any]
    shards: Text
    most: Annotated[int, Meta(ge=0)]
    rows: Count | None
    skipped: list[tuple[Text, Text]]


@dataclass(frozen=True)
class FeatureCache:
    """A folder with the features of a sample, all or those that have been extracted so far."""

    path: Path
    dim: int
    """Length of one patch's features."""
    owned: bool
    """Whether the folder may be emptied: it is hidden beside a codebook and was not named by the user."""

    def begin(self, identity: dict[str, Any], shards: str, most: int, count: int) -> int:
        """Prepares the folder for a sample.

        Args:
            identity: everything that the features depend on.
            shards: a digest of the assignment of keys to shards, on which the parts depend.
            most: the largest draw of the sample.
            count: its number of patches.

        Returns:
            The largest draw to extract: that of a larger sample, if the folder holds or has begun one.

        Raises:
            DataError: the folder holds other features, or the disk has too little space.
            UsageError: the folder holds something else.
        """
        sheet = self.path / _SHEET
        if sheet.exists():
            before = self._read_sheet()
            if before["identity"] != identity:
                self._refuse_other(before["identity"], identity)
            elif before["most"] < most:
                say(f"{self.path} holds a smaller sample; features are extracted again.")
            elif before["rows"] is not None or before["shards"] == shards:
                return int(before["most"])
        elif self.path.exists() and any(not path.name.startswith(".") for path in self.path.iterdir()):
            raise UsageError(f"{self.path} is not empty and not a features cache; choose another --features-cache.")
        self._clear()
        self._refuse_full_disk(count)
        write_sealed_json(sheet, self._sheet(identity, shards, most, None, []))
        return most

    def is_whole(self) -> bool:
        """Whether all features have been extracted and joined into one file."""
        return self._read_sheet()["rows"] is not None

    def skipped(self) -> list[tuple[str, str]]:
        """(key, reason) of the images that could not be read."""
        return [(key, reason) for key, reason in self._read_sheet()["skipped"]]

    def unfinished(self, names: Sequence[str]) -> list[str]:
        """The source shards among `names` that have no part yet."""
        return [] if self.is_whole() else [name for name in names if not self._part(name).exists()]

    def write_part(self, name: str, rows: Iterable[Rows], skipped: list[tuple[str, str]]) -> None:
        """Writes the features of one source shard as `rows` yields them; `skipped` is read after the last ones."""
        with written_whole(self._part(name)) as partial:
            partial.mkdir()
            draws = [np.empty(0, dtype=np.uint64)]
            with open(partial / _FEATURES, "wb") as file:
                for features, drawn in rows:
                    file.write(features.tobytes())
                    draws.append(drawn)
            np.save(partial / _DRAWS, np.concatenate(draws))
            (partial / _SKIPPED).write_text(json.dumps(skipped))

    def assemble(self, names: Sequence[str]) -> None:
        """Joins the parts of all source shards into one file, in the order of their draws, and removes them."""
        if self.is_whole():
            self._remove_parts()
            return
        parts = [np.load(self._part(name) / _DRAWS) for name in names]
        draws = np.concatenate(parts)
        if not len(draws):
            raise DataError("None of the sampled images could be read; there is nothing to make a codebook from.")
        order = np.argsort(draws, kind="stable")
        place = np.empty(len(draws), dtype=np.int64)
        place[order] = np.arange(len(draws))
        with written_whole(self.path / _DRAWS) as partial, open(partial, "wb") as file:
            np.save(file, draws[order])
        with written_whole(self.path / _FEATURES) as partial:
            whole = np.memmap(partial, dtype=np.float16, mode="w+", shape=(len(draws), self.dim))
            start = 0
            for name, part in zip(names, parts, strict=True):
                for at, block in self._blocks(self._part(name) / _FEATURES, len(part)):
                    whole[place[start + at : start + at + len(block)]] = block
                start += len(part)
            whole.flush()
        skipped = [pair for name in names for pair in json.loads((self._part(name) / _SKIPPED).read_text())]
        begun = self._read_sheet()
        sheet = self._sheet(begun["identity"], begun["shards"], begun["most"], len(draws), skipped)
        write_sealed_json(self.path / _SHEET, sheet)
        self._remove_parts()

    def features(self, most: int) -> NDArray[np.float16]:
        """The features whose draws are at most `most`: (n, dim), memory-mapped. Raises DataError if damaged."""
        rows, file = self._read_sheet()["rows"], self.path / _FEATURES
        try:
            refuse_irregular(file)
            refuse_irregular(self.path / _DRAWS)
            draws = np.load(self.path / _DRAWS, mmap_mode="r", allow_pickle=False)
            if draws.dtype != np.uint64 or draws.shape != (rows,) or file.stat().st_size != rows * self.dim * 2:
                raise ValueError("not of the length that sample.json states")
        except (OSError, ValueError, EOFError, TypeError, OverflowError, MemoryError) as error:
            raise DataError(f"{self.path} is damaged ({error}); delete it to extract the features again.") from None
        count = int(np.searchsorted(draws, np.uint64(most), side="right"))
        return np.memmap(file, dtype=np.float16, mode="r", shape=(rows, self.dim))[:count]

    def _read_sheet(self) -> dict[str, Any]:
        sheet = self.path / _SHEET
        try:
            content = read_sealed_json(sheet, format=FORMAT, version=VERSION)
        except DataError as error:
            try:
                content = read_sealed_json(sheet, format=_OLD_FORMAT, version=1)
            except DataError:
                raise error from None
        checked(content, _Sheet, sheet, "delete the folder to extract the features again")
        return content

    @staticmethod
    def _sheet(
        identity: dict[str, Any], shards: str, most: int, rows: int | None, skipped: list[tuple[str, str]]
    ) -> dict[str, Any]:
        fields = {"identity": identity, "shards": shards, "most": most, "rows": rows, "skipped": skipped}
        return {"format": FORMAT, "version": VERSION, **fields}

    def _part(self, name: str) -> Path:
        return self.path / f"{_PART}{name}"

    def _blocks(self, file: Path, count: int) -> Iterator[tuple[int, NDArray[np.float16]]]:
        if count:
            rows = np.memmap(file, dtype=np.float16, mode="r", shape=(count, self.dim))
            for at in range(0, count, _BLOCK):
                yield at, rows[at : at + _BLOCK]

    def _refuse_other(self, stored: dict[str, Any], needed: dict[str, Any]) -> None:
        if self.owned:
            return
        changed = [name for name in needed if stored.get(name) != needed[name]]
        there, here = ("; ".join(f"{name} {_short(side.get(name))}" for name in changed) for side in (stored, needed))
        raise DataError(
            f"--features-cache {self.path} holds other features ({there}) than this command needs ({here}); "
            "choose another folder or delete it."
        )

    def _refuse_full_disk(self, count: int) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        needed, free = 2 * count * self.dim * 2, shutil.disk_usage(self.path).free
        if needed > free:
            raise DataError(
                f"The sample does not fit on the disk of {self.path}: {count} patches x {self.dim} x 2 bytes, twice "
                f"while they are joined, = {as_text(needed)}, and {as_text(free)} are free; use fewer --patches, or "
                "--features-cache on another disk."
            )

    def _clear(self) -> None:
        self._remove_parts()
        for name in (_SHEET, _FEATURES, _DRAWS):
            (self.path / name).unlink(missing_ok=True)

    def _remove_parts(self) -> None:
        for pattern in (f"{_PART}*", f".{_PART}*.partial"):
            for part in self.path.glob(pattern):
                shutil.rmtree(part)


def _short(value: Any) -> str:
    return f"{value[:12]}" if isinstance(value, str) and len(value) == 64 else f"{value}"
