"""What docstrings refer to exists: `module.name` and `Class.name` in backticks, and files of the package by name."""

import ast
import re
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parent.parent
ROOMS = ("shared", "tokenize_stage", "train_stage", "quickstart", "throughput")
FILES = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]
TREES = {path: ast.parse(path.read_text()) for path in FILES}
DATA_FILES = {"json", "safetensors", "yaml", "jsonl", "zarr", "html", "md", "css", "js", "jpg", "png", "cls", "txt"}


def names_in(body: list[ast.stmt]) -> set[str]:
    """Functions, classes, variables and fields that are defined directly in a module or class."""
    names = {node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    for node in body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        names |= {name.id for target in targets if target for name in ast.walk(target) if isinstance(name, ast.Name)}
    return names


def members() -> dict[str, set[str]]:
    """What each module and class of the package has, by its own name."""
    found: dict[str, set[str]] = defaultdict(set)
    for path, tree in TREES.items():
        found[path.stem] |= names_in(tree.body)
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                attributes = {
                    target.attr
                    for assignment in ast.walk(node)
                    if isinstance(assignment, ast.Assign | ast.AnnAssign)
                    for each in (assignment.targets if isinstance(assignment, ast.Assign) else [assignment.target])
                    for target in ast.walk(each)
                    if isinstance(target, ast.Attribute)
                }
                found[node.name] |= names_in(node.body) | attributes
    return found


def test_references_in_docstrings_are_not_stale():
    known = members()
    settings = {name.lower().removesuffix("settings") for name in known if name.endswith("Settings")}
    rooms = {part.stem for path in FILES for part in (path, path.parent)}
    stale = []
    for path in FILES:
        for line, text in enumerate(path.read_text().splitlines(), 1):
            for reference in re.findall(r"`([A-Za-z_][\w.]*\.\w+)`", text):
                *_, owner, name = reference.split(".")
                if owner not in known or owner in settings or name in rooms | DATA_FILES:
                    continue
                # A parameter may be called like the module of its class: `plan.parts`.
                if name not in known[owner] | known.get(owner.title(), set()):
                    stale.append(f"{path.relative_to(ROOT)}:{line}: {reference}")
    assert stale == []


def test_modules_that_docstrings_name_exist():
    names = {path.name for path in ROOT.rglob("*.py") if ".venv" not in path.parts}
    stale = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in FILES
        for name in re.findall(r"([a-z_]+\.py)\b", path.read_text())
        if name not in names
    ]
    assert stale == []


def test_the_check_knows_a_stale_reference():
    known = members()
    assert "find_resume_point" in known["resume"]
    assert "restore" in known["Trainer"]
    assert "vanished" not in known["resume"]
