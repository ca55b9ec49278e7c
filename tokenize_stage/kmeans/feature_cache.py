"""Sampled patch features on disk: parts that appear whole, one a source shard, then one fp16 file in sample order."""

import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...shared.errors import DataError, UsageError
from ...shared.runtime.console import say
from ...shared.runtime.memory import as_text
from ...shared.storage.files import read_sealed_json, write_sealed_json, written_whole

FORMAT, VERSION = "mapet-features", 1
_SHEET, _FEATURES, _DRAWS, _SKIPPED, _PART = "sample.json", "features.f16", "draws.npy", "skipped.json", "part-"
_BLOCK = 4096

Rows = tuple[np.ndarray, np.ndarray]
"""Features (m, dim) float16 of some patches and their draws (m,) uint64."""


@dataclass(frozen=True)
class FeatureCache:
    """A folder that holds the features of a sample, or what has been extracted of them so far.

    `owned` says that the folder is ours to empty: hidden beside a codebook, not one that the user named.
    """

    path: Path
    dim: int
    owned: bool

    def begin(self, identity: dict[str, Any], shards: str, most: int, count: int) -> int:
        """Prepares the folder for a sample of `count` patches, whose draws are at most `most`.

        `identity` is what features depend on, `shards` a digest of which keys stand in which shard, on which parts
        depend. Returns the largest draw that is to be extracted: that of a larger sample if the folder holds such a
        one or has begun with it.

        Raises DataError for a folder of other features or too little space, UsageError for one of something else.
        """
        sheet = self.path / _SHEET
        if sheet.exists():
            about = read_sealed_json(sheet, format=FORMAT, version=VERSION)
            if about["identity"] != identity:
                self._refuse_other(about["identity"], identity)
            elif about["most"] < most:
                say(f"{self.path} holds a smaller sample; features are extracted again.")
            elif about["rows"] is not None or about["shards"] == shards:
                return about["most"]
        elif self.path.exists() and any(not path.name.startswith(".") for path in self.path.iterdir()):
            raise UsageError(f"{self.path} is not empty and no features cache; choose another --features-cache.")
        self._clear()
        self._refuse_full_disk(count)
        write_sealed_json(sheet, self._sheet(identity, shards, most, None, []))
        return most

    def is_whole(self) -> bool:
        """Whether all features are there, in one file."""
        return self._about()["rows"] is not None

    def skipped(self) -> list[tuple[str, str]]:
        """(key, reason) of the images that could not be read."""
        return [(key, reason) for key, reason in self._about()["skipped"]]

    def unfinished(self, names: Sequence[str]) -> list[str]:
        """Those of the source shards `names` that have no part yet."""
        return [] if self.is_whole() else [name for name in names if not self._part(name).exists()]

    def write_part(self, name: str, rows: Iterable[Rows], skipped: list[tuple[str, str]]) -> None:
        """Writes the features of one source shard, as they come; `skipped` is read when `rows` is at its end."""
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
        """Puts the parts of all source shards into one file, in the order of their draws, and removes them."""
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
        about = self._about()
        sheet = self._sheet(about["identity"], about["shards"], about["most"], len(draws), skipped)
        write_sealed_json(self.path / _SHEET, sheet)
        self._remove_parts()

    def features(self, most: int) -> np.ndarray:
        """The features whose draws are at most `most`, (n, dim) float16 in a file; DataError if it is damaged."""
        rows, file = self._about()["rows"], self.path / _FEATURES
        try:
            draws = np.load(self.path / _DRAWS)
            if len(draws) != rows or file.stat().st_size != rows * self.dim * 2:
                raise ValueError("not of the length that sample.json states")
        except (OSError, ValueError) as error:
            raise DataError(f"{self.path} is damaged ({error}); delete it to extract the features again.") from None
        count = int(np.searchsorted(draws, np.uint64(most), side="right"))
        return np.memmap(file, dtype=np.float16, mode="r", shape=(rows, self.dim))[:count]

    def _about(self) -> dict[str, Any]:
        return read_sealed_json(self.path / _SHEET, format=FORMAT, version=VERSION)

    @staticmethod
    def _sheet(identity: dict[str, Any], shards: str, most: int, rows: int | None, skipped: list) -> dict[str, Any]:
        fields = {"identity": identity, "shards": shards, "most": most, "rows": rows, "skipped": skipped}
        return {"format": FORMAT, "version": VERSION, **fields}

    def _part(self, name: str) -> Path:
        return self.path / f"{_PART}{name}"

    def _blocks(self, file: Path, count: int) -> Iterator[tuple[int, np.ndarray]]:
        if count:
            rows = np.memmap(file, dtype=np.float16, mode="r", shape=(count, self.dim))
            for at in range(0, count, _BLOCK):
                yield at, rows[at : at + _BLOCK]

    def _refuse_other(self, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
        if self.owned:
            return
        changed = [name for name in ours if theirs.get(name) != ours[name]]
        there, here = ("; ".join(f"{name} {_short(side.get(name))}" for name in changed) for side in (theirs, ours))
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
                f"for a while, = {as_text(needed)}, and {as_text(free)} are free; use fewer --patches, or "
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
