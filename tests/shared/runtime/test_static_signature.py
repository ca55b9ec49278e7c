"""What is read from a function's source is what Python knows once the function is imported."""

import functools
import importlib
import inspect
import operator
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest
from mapet import cli
from mapet.shared.runtime.static_signature import REQUIRED, read_signature

ROOT = Path(__file__).parents[3]
FUNCTIONS = sorted(
    function for group in cli.COMMANDS.values() for command in group.values() for function in command.functions.values()
)


def written(folder: Path, **modules: str) -> Path:
    for name, text in modules.items():
        (folder / f"{name}.py").write_text(text)
    return folder


def evaluated(types: tuple[str, ...], module: ModuleType) -> object:
    names = {"Path": Path, "Sequence": Sequence, **vars(module)}
    return functools.reduce(operator.or_, (None if one == "None" else eval(one, names) for one in types))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_signature_of_a_command_is_that_of_its_imported_function(function: str):
    module, _, name = function.partition(":")
    loaded = importlib.import_module(f"mapet.{module}")
    imported = getattr(loaded, name)
    parameters = inspect.signature(imported).parameters
    static = read_signature(ROOT.joinpath(*module.split(".")).with_suffix(".py"), name)
    assert list(static.parameters) == list(parameters)
    for parameter in static.parameters.values():
        assert parameter.default == parameters[parameter.name].default, parameter
        assert evaluated(parameter.types, loaded) == parameters[parameter.name].annotation, parameter
    assert static.summary == " ".join(inspect.getdoc(imported).split("\n\n")[0].split())


def test_defaults_are_literals_arithmetic_and_constants_also_of_other_modules(tmp_path: Path):
    written(
        tmp_path,
        constants="NAME, SIZE = 'zarr', 2**10\nHALF: float = 1 / 2\n",
        function="from .constants import HALF, NAME as FORMAT\nfrom .constants import SIZE\n"
        "def f(a, b: int = -1, *, c=(HALF, 4 / 3), d=FORMAT, e=SIZE - 1, g): ...\n",
    )
    parameters = read_signature(tmp_path / "function.py", "f").parameters
    assert {name: parameter.default for name, parameter in parameters.items()} == {
        "a": REQUIRED,
        "b": -1,
        "c": (0.5, 4 / 3),
        "d": "zarr",
        "e": 1023,
        "g": REQUIRED,
    }


def test_aliases_of_types_are_resolved_and_functions_found_through_imports(tmp_path: Path):
    (tmp_path / "room").mkdir()
    written(tmp_path / "room", __init__="", types="Images = str | list[str]\n")
    written(
        tmp_path,
        f="from .room.types import Images\ndef f(images: Images | None, k: int): 'Summary.'\n",
        again="from .f import f as g\n",
    )
    signature = read_signature(tmp_path / "again.py", "g")
    assert [parameter.types for parameter in signature.parameters.values()] == [("str", "list[str]", "None"), ("int",)]
    assert signature.summary == "Summary."


def test_texts_of_arguments_come_from_the_docstring(tmp_path: Path):
    written(
        tmp_path,
        f='''
def f(a, b, c, d, e):
    """First sentence,
    to its end.

    More.

    Args:
        a, b: shared: with a colon.
        c: over
            two lines.
        d:
            below.

    Raises:
        an error without a colon
    """
''',
    )
    signature = read_signature(tmp_path / "f.py", "f")
    texts = {name: parameter.help for name, parameter in signature.parameters.items()}
    assert texts == {
        "a": "shared: with a colon.",
        "b": "shared: with a colon.",
        "c": "over two lines.",
        "d": "below.",
        "e": "",
    }
    assert signature.summary == "First sentence, to its end."


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("def g(): ...", LookupError),
        ("f = 1", LookupError),
        ("class g: ...\ndef f(a=g()): ...", ValueError),
        ("def f(a=UNKNOWN): ...", LookupError),
        ("def g(): ...\ndef f(a=g): ...", LookupError),
    ],
)
def test_what_cannot_be_read_is_an_error(tmp_path: Path, source: str, error: type[Exception]):
    written(tmp_path, f=source)
    with pytest.raises(error):
        read_signature(tmp_path / "f.py", "f")
