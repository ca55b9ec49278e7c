"""Prints how much code a checkout has and how long its functions are, folder by folder.

python scripts/measure_code.py [BEFORE] AFTER

Measures the package: Python files outside tests/, benchmarks/, docs/, scripts/ and hidden folders. Lines are all
lines of a file, blank ones and comments included; `__init__.py` counts in lines but not as a module. The length of a
function runs from its first decorator or `def` to its last line, docstring and nested functions included. With two
checkouts a last table compares their totals.
"""

import ast
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path

LEFT_OUT = {"tests", "benchmarks", "docs", "scripts", "build", "dist", "site"}
TOP = ". (root)"
HEADER = ("folder", "modules", "lines", "functions", "median", "90 %", "longest")


@dataclass
class Measures:
    """Modules, their lines, and the length of each function in lines."""

    modules: int = 0
    lines: int = 0
    functions: list[int] = field(default_factory=list)

    def add(self, name: str, source: str) -> None:
        self.modules += name != "__init__.py"
        self.lines += len(source.splitlines())
        self.functions += function_lengths(source)

    def cells(self) -> tuple[str, ...]:
        counts = (self.modules, self.lines, len(self.functions))
        lengths = (percentile(self.functions, 0.5), percentile(self.functions, 0.9), max(self.functions, default=0))
        return tuple(f"{number:,}" for number in (*counts, *lengths))


def function_lengths(source: str) -> list[int]:
    functions = (
        node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )
    return [
        (node.end_lineno or node.lineno) - min([node.lineno, *(one.lineno for one in node.decorator_list)]) + 1
        for node in functions
    ]


def percentile(lengths: list[int], share: float) -> int:
    """The smallest length that at least this share of the functions does not exceed."""
    return sorted(lengths)[math.ceil(share * len(lengths)) - 1] if lengths else 0


def measure(root: Path) -> dict[str, Measures]:
    """The measures of each folder of a checkout, by its path from the root."""
    folders: dict[str, Measures] = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if parts[0] in LEFT_OUT or any(part.startswith(".") for part in parts):
            continue
        folder = "/".join(parts[:-1]) or TOP
        folders.setdefault(folder, Measures()).add(path.name, path.read_text(encoding="utf-8"))
    return folders


def total(folders: dict[str, Measures]) -> Measures:
    everything = Measures()
    for one in folders.values():
        everything.modules += one.modules
        everything.lines += one.lines
        everything.functions += one.functions
    return everything


def table(rows: list[tuple[str, ...]]) -> str:
    """A Markdown table whose first row is its header; numbers stand on the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join(line(row, widths) for row in (rows[0], tuple(rule), *rows[1:]))


def line(row: tuple[str, ...], widths: list[int]) -> str:
    cells = [row[0].ljust(widths[0])]
    cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
    return f"| {' | '.join(cells)} |"


def main(roots: list[Path]) -> None:
    measured = [(name, measure(root)) for name, root in zip(("before", "after")[-len(roots) :], roots, strict=True)]
    for name, folders in measured:
        print(f"{name if len(roots) == 2 else 'Code'}:\n")
        rows = [(folder, *one.cells()) for folder, one in sorted(folders.items())]
        print(table([HEADER, *rows, ("all", *total(folders).cells())]) + "\n")
    if len(roots) == 2:
        print(table([HEADER, *((name, *total(folders).cells()) for name, folders in measured)]))


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit("usage: measure_code.py [BEFORE] AFTER")
    main([Path(argument) for argument in sys.argv[1:]])
