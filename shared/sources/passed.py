"""What a source took and what it passed over, in one line."""

from collections import Counter
from collections.abc import Iterable, Mapping

from .keys import extension_of, is_hidden, plain

_MOST_KINDS, _LONGEST_EXTENSION = 4, 12


class PassedOver:
    """Counts the names that were passed over, by kind, with an example of each kind."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._examples: dict[str, str] = {}

    @classmethod
    def of(cls, kinds: Mapping[str, tuple[int, str]]) -> "PassedOver":
        """What was counted when `kinds` was read."""
        passed = cls()
        passed._counts.update({kind: count for kind, (count, _) in kinds.items()})
        passed._examples = {kind: example for kind, (_, example) in kinds.items()}
        return passed

    @property
    def kinds(self) -> dict[str, tuple[int, str]]:
        """The number of names of each kind, and an example."""
        return {kind: (count, plain(self._examples[kind])) for kind, count in self._counts.items()}

    def add(self, name: str, extension: str | None = None) -> None:
        """Adds a name; its kind is its extension, which may be given, or that it is hidden."""
        kind = _kind_of(name) if extension is None else _kind_of_extension(extension)
        self._counts[kind] += 1
        if kind not in self._examples:
            self._examples[kind] = name

    def merge(self, other: "PassedOver") -> None:
        """Adds what another one counted."""
        self._counts.update(other._counts)
        self._examples = other._examples | self._examples

    def __bool__(self) -> bool:
        return bool(self._counts)

    def __str__(self) -> str:
        """Counts and examples of the most frequent kinds, such as "12 .txt (a.txt), 1 hidden (.DS_Store)"."""
        kinds = sorted(self._counts, key=lambda kind: (-self._counts[kind], kind))
        parts = [f"{self._counts[kind]:,} {kind} ({plain(self._examples[kind])})" for kind in kinds[:_MOST_KINDS]]
        others = sum(self._counts[kind] for kind in kinds[_MOST_KINDS:])
        return ", ".join([*parts, *([f"{others:,} others"] if others else [])])


def _kind_of(name: str) -> str:
    if is_hidden(name):
        return "hidden or of the system"
    return _kind_of_extension(extension_of(name))


def _kind_of_extension(extension: str) -> str:
    return f".{extension}" if 0 < len(extension) <= _LONGEST_EXTENSION else "without extension"


def count_of(count: int, one: str, many: str | None = None) -> str:
    """A number with its noun, such as "1 tar" or "1,234 tars"."""
    return f"{count:,} {one if count == 1 else many or f'{one}s'}"


def first_to_last(names: Iterable[str]) -> str:
    """The only name, or the first and the last one, such as "ant to zebra"."""
    ordered = list(names)
    return plain(ordered[0] if len(ordered) == 1 else f"{ordered[0]} to {ordered[-1]}")
