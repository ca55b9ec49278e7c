"""The rooms' walls: who may import whom (architecture.md)."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "shared": {"shared"},
    "tokenize_stage": {"shared", "tokenize_stage"},
    "train_stage": {"shared", "train_stage"},
    "quickstart": {"shared", "tokenize_stage", "train_stage", "quickstart"},
}
STAGES = {"tokenize_stage", "train_stage"}


def imported_rooms(path: Path) -> set[str]:
    """The rooms (and root modules) of this package that a file imports, relative or absolute, at any depth."""
    rooms = set()
    package = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            rooms |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("mapet.")}
        elif isinstance(node, ast.ImportFrom):
            base = (node.module or "").split(".")
            if node.level:
                names = [*package[: len(package) - node.level + 1], *filter(None, base)]
                rooms |= {names[0]} if names else {alias.name for alias in node.names}
            elif base[0] == "mapet":
                rooms |= {base[1]} if len(base) > 1 else {alias.name for alias in node.names}
    return rooms


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_imports_only_from_below(room: str):
    files = [ROOT / room] if room.endswith(".py") else sorted((ROOT / room).rglob("*.py"))
    assert files
    for path in files:
        assert imported_rooms(path) <= MAY_IMPORT[room], path


def test_the_stages_meet_in_the_demo_only():
    assert imported_rooms(ROOT / "quickstart" / "demo.py") >= STAGES
    roots = {path.name for path in ROOT.glob("*.py")}
    assert roots == {"__init__.py", "cli.py"}


def test_the_wall_check_sees_a_breach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    (tmp_path / "shared").mkdir()
    breach = tmp_path / "shared" / "bad.py"
    for line in ("from ..train_stage.model import MaPeT", "import mapet.train_stage", "from mapet import train_stage"):
        breach.write_text(f"def inner():\n    {line}\n")
        assert imported_rooms(breach) == {"train_stage"}
