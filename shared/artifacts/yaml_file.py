"""Reads YAML from elsewhere: bounded in size and in what its aliases expand to, without anything that is executed."""

import re
from pathlib import Path
from typing import Any

import yaml

from ..errors import DataError
from ..storage.bounded import read_bounded

_MOST_BYTES = 1 << 20
_MOST_VALUES = 100_000
_DEEPEST = 32
_REFERENCE = re.compile(r"\$\{[\w.\[\]-]*\}")
"""OmegaConf's reference to another setting, such as ${train.epochs}."""


def read_yaml(path: Path) -> Any:
    """The content of a YAML file, as plain values.

    Raises:
        DataError if the file cannot be read, is no YAML, is too large, has tags that make objects, or has values that
        OmegaConf would compute by a resolver, such as ${oc.env:HOME}.
    """
    try:
        # A recipe may be a link to one that several projects share.
        text = read_bounded(path.resolve(), _MOST_BYTES).decode()
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if node is not None:
            _count(node, {}, (), path)
        content = yaml.safe_load(text)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}).") from None
    except (UnicodeError, ValueError, TypeError, yaml.YAMLError, RecursionError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{path} cannot be read as YAML ({reason[:200]}).") from None
    _refuse_resolvers(content, "", path)
    return content


def _count(node: yaml.Node, known: dict[int, int], above: tuple[int, ...], path: Path) -> int:
    """How many values a node has once its aliases are expanded."""
    if id(node) in above or len(above) > _DEEPEST:
        raise DataError(f"{path} has values inside each other without an end; write it without such aliases.")
    if id(node) not in known:
        children: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            children = [child for pair in node.value for child in pair]
        elif isinstance(node, yaml.SequenceNode):
            children = node.value
        known[id(node)] = 1 + sum(_count(child, known, (*above, id(node)), path) for child in children)
        if known[id(node)] > _MOST_VALUES:
            raise DataError(f"{path} has aliases that expand to more than {_MOST_VALUES:,} values; write fewer.")
    return known[id(node)]


def _refuse_resolvers(content: Any, place: str, path: Path) -> None:
    if isinstance(content, dict):
        for key, value in content.items():
            _refuse_resolvers(key, place, path)
            _refuse_resolvers(value, f"{place}.{key}".lstrip("."), path)
    elif isinstance(content, list):
        for number, value in enumerate(content):
            _refuse_resolvers(value, f"{place}[{number}]", path)
    elif isinstance(content, str):
        rest, before = content, ""
        while rest != before:
            before, rest = rest, _REFERENCE.sub("", rest)
        if "${" in rest:
            raise DataError(
                f"{path}: {place[:200]} is {content[:200]!r}, which would compute a value from this machine; write the "
                "value itself. A recipe may refer to its own settings only, as in ${train.epochs}."
            )
