"""A function's signature and docstring, read from its source file.

The command line takes its options from the public functions. Importing those would import PyTorch, which takes seconds;
`mapet --help` and shell completion must not.
"""

import ast
import functools
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from inspect import Parameter as InspectParameter
from pathlib import Path
from typing import Any

REQUIRED = InspectParameter.empty
"""The default of a parameter that has none."""

_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}


@dataclass(frozen=True)
class Parameter:
    """A parameter that can be passed by name."""

    name: str
    types: tuple[str, ...]
    """Members of its annotation's union, as source text: `str | None` is ("str", "None"). Aliases are resolved."""
    default: Any = REQUIRED
    help: str = ""
    """Its text in the docstring's `Args:`, on one line; several names before one colon share the text."""


@dataclass(frozen=True)
class StaticSignature:
    """A function's parameters by name, in order, and the first paragraph of its docstring, on one line."""

    summary: str
    parameters: Mapping[str, Parameter]


@functools.cache
def read_signature(source: Path, function: str) -> StaticSignature:
    """Reads the signature of a module-level function without importing or running anything.

    Args:
        source: the Python file that defines the function, or imports it with a relative import.
        function: the function's name.

    Raises:
        LookupError: the file does not define the function, or a default names an unknown constant.
        ValueError: a default is neither a literal nor arithmetic of literals and constants.
    """
    file, definition = _definition(source, function)
    if not isinstance(definition, ast.FunctionDef):
        raise LookupError(f"{function} in {file} is not a function")
    docstring = ast.get_docstring(definition) or ""
    texts = _argument_texts(docstring)
    arguments = definition.args
    positional: list[ast.expr | None] = [None] * (len(arguments.args) - len(arguments.defaults))
    defaults = [*positional, *arguments.defaults, *arguments.kw_defaults]
    parameters = [
        Parameter(
            argument.arg,
            _union_members(argument.annotation, file) if argument.annotation else (),
            REQUIRED if default is None else _value(default, file),
            texts.get(argument.arg, ""),
        )
        for argument, default in zip([*arguments.args, *arguments.kwonlyargs], defaults, strict=True)
    ]
    summary = " ".join(docstring.partition("\n\n")[0].split())
    return StaticSignature(summary, {parameter.name: parameter for parameter in parameters})


def _argument_texts(docstring: str) -> dict[str, str]:
    from docstring_parser.google import GoogleParser, Section, SectionType

    parser = GoogleParser([Section("Args", "param", SectionType.MULTIPLE)])
    return {
        name.strip(): " ".join((argument.description or "").split())
        for argument in parser.parse(docstring).params
        for name in argument.arg_name.split(",")
    }


@functools.cache
def _statements(file: Path) -> list[ast.stmt]:
    return ast.parse(file.read_text(encoding="utf-8"), str(file)).body


def _definition(file: Path, name: str) -> tuple[Path, ast.AST]:
    """What a module binds a name to, a function or an expression, and the file that holds it. Relative imports are
    followed, others are not."""
    for statement in _statements(file):
        match statement:
            case ast.FunctionDef(name=bound) if bound == name:
                return file, statement
            case ast.Assign(targets=[ast.Name(id=bound)], value=value) if bound == name:
                return file, value
            case ast.Assign(targets=[ast.Tuple(elts=targets)], value=ast.Tuple(elts=values)):
                for target, element in zip(targets, values, strict=False):
                    if isinstance(target, ast.Name) and target.id == name:
                        return file, element
            case ast.AnnAssign(target=ast.Name(id=bound), value=ast.expr() as value) if bound == name:
                return file, value
            case ast.ImportFrom(module=module, names=aliases, level=level) if level:
                for alias in aliases:
                    if (alias.asname or alias.name) == name:
                        return _definition(_module_file(file.parents[level - 1], module or ""), alias.name)
    raise LookupError(f"{file} does not define {name}")


def _module_file(package: Path, module: str) -> Path:
    path = package.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _union_members(annotation: ast.expr, file: Path) -> tuple[str, ...]:
    if isinstance(annotation, ast.BinOp) and isinstance(annotation.op, ast.BitOr):
        return (*_union_members(annotation.left, file), *_union_members(annotation.right, file))
    if isinstance(annotation, ast.Name):
        try:
            where, alias = _definition(file, annotation.id)
        except LookupError:  # a builtin, or a class of another package
            return (annotation.id,)
        if isinstance(alias, ast.expr):
            return _union_members(alias, where)
    return (ast.unparse(annotation),)


def _value(expression: ast.expr, file: Path) -> Any:
    match expression:
        case ast.Name(id=name):
            where, constant = _definition(file, name)
            if not isinstance(constant, ast.expr):
                raise LookupError(f"the default {name} in {file} is not a constant")
            return _value(constant, where)
        case ast.BinOp(left=left, op=operation, right=right) if type(operation) in _ARITHMETIC:
            return _ARITHMETIC[type(operation)](_value(left, file), _value(right, file))
        case ast.Tuple(elts=elements):
            return tuple(_value(element, file) for element in elements)
    return ast.literal_eval(expression)
