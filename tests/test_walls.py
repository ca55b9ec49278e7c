"""The walls between rooms: a module at a stage's root is a command, everything else lives in a named folder of two to
nine modules, and imports run one way (architecture.md)."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STAGES = ("tokenize_stage", "train_stage")
LAYERS = {
    "": [["cli"], ["studies", "throughput"], ["quickstart"], list(STAGES), ["shared"]],
    "shared": [
        ["doctor"],
        ["tokens"],
        ["images", "report", "artifacts"],
        ["sources"],
        ["labels"],
        ["storage", "runtime"],
        ["errors", "randomness"],
        ["printable"],
    ],
    "tokenize_stage": [
        ["build_codebook", "encode_shards", "inspect", "verify", "import_tokens"],
        ["importing", "pages"],
        ["encoding", "quality"],
        ["kmeans", "tokenizers", "inspection"],
        ["towers", "counting"],
    ],
    "train_stage": [
        [
            "pretrain",
            "finetune",
            "evaluate",
            "predict",
            "probe",
            "segment",
            "features",
            "report",
            "export",
            "import_weights",
        ],
        ["runs", "tasks", "scoring"],
        ["training", "classification", "segmentation"],
        ["probing", "masked"],
        ["data", "evaluation"],
        ["objectives"],
        ["settings", "weights"],
        ["model"],
    ],
}
"""The rooms of each house from the top floor down. A room may import from the floors below its own and from itself;
rooms of one floor do not import each other."""
FEWEST, MOST = 2, 9


def modules() -> list[Path]:
    return [
        path
        for room in ("studies", "quickstart", "throughput", "shared", *STAGES)
        for path in sorted((ROOT / room).rglob("*.py"))
    ]


def imported(path: Path, root: Path = ROOT) -> set[tuple[str, ...]]:
    """The modules of this package that a file imports, relative or absolute, at any depth, as paths from its root."""
    found = set()
    package = path.relative_to(root).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {tuple(alias.name.split(".")[1:]) for alias in node.names if alias.name.startswith("mapet.")}
        elif isinstance(node, ast.ImportFrom):
            base = tuple(filter(None, (node.module or "").split(".")))
            if node.level:
                base = (*package[: len(package) - node.level + 1], *base)
            elif base[:1] == ("mapet",):
                base = base[1:]
            else:
                continue
            found |= {base} if base else {(alias.name,) for alias in node.names}
    return found


def breaches(root: Path, house: str, path: Path) -> list[str]:
    """Imports of `path` that run upwards or sideways between the rooms of `house`."""
    floors = {room: floor for floor, rooms in enumerate(LAYERS[house]) for room in rooms}
    inside = (house,) if house else ()
    depth = len(inside)
    own = path.relative_to(root).with_suffix("").parts[depth]
    found = []
    for target in imported(path, root):
        if target[:depth] == inside and len(target) > depth:
            other = target[depth]
            if other != own and floors[own] >= floors[other]:
                found.append(f"{path.relative_to(root)} imports {'.'.join(target)}")
    return found


@pytest.mark.parametrize("house", LAYERS)
def test_imports_run_from_the_top_floor_down(house: str):
    paths = [path for path in modules() if not house or path.is_relative_to(ROOT / house)]
    paths = [path for path in paths if path.parent != ROOT / house or path.name != "__init__.py"]
    assert paths
    assert [breach for path in paths for breach in breaches(ROOT, house, path)] == []


@pytest.mark.parametrize("house", [house for house in LAYERS if house])
def test_every_room_has_a_floor_and_no_floor_is_of_another_house(house: str):
    rooms = {path.stem for path in (ROOT / house).iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert rooms - {"__init__"} == {room for floor in LAYERS[house] for room in floor}


def test_a_room_holds_two_to_nine_modules():
    rooms = [path.parent for path in modules() if path.name == "__init__.py" and path.parent.name not in STAGES]
    sizes = {
        room.relative_to(ROOT).as_posix(): sum(path.name != "__init__.py" for path in room.glob("*.py"))
        for room in rooms
    }
    assert {room: size for room, size in sizes.items() if not FEWEST <= size <= MOST} == {}


def test_a_module_at_a_stages_root_is_a_command():
    for stage in STAGES:
        for path in (ROOT / stage).glob("*.py"):
            if path.stem not in ("__init__", "settings"):
                functions = {
                    node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)
                }
                assert path.stem in functions, path
    assert {path.name for path in ROOT.glob("*.py")} == {"__init__.py", "cli.py"}


def test_tests_mirror_the_rooms():
    rooms = {
        path.relative_to(ROOT / "tests").as_posix()
        for path in (ROOT / "tests").rglob("*")
        if any(path.glob("test_*.py"))
        and path not in (ROOT / "tests", ROOT / "tests" / "compatibility", ROOT / "tests" / "situations")
    }
    assert {room for room in rooms if not (ROOT / room / "__init__.py").exists()} == set()


def test_the_stages_meet_in_the_quickstart_and_in_the_bench():
    for path in (ROOT / "quickstart" / "demo.py", ROOT / "throughput" / "bench.py"):
        assert {target[0] for target in imported(path)} >= set(STAGES)


def test_the_wall_check_sees_a_breach(tmp_path: Path):
    (tmp_path / "shared" / "runtime").mkdir(parents=True)
    breach = tmp_path / "shared" / "runtime" / "bad.py"
    for line in (
        "from ...train_stage.model import MaPeT",
        "import mapet.train_stage",
        "from mapet import train_stage",
    ):
        breach.write_text(f"def inner():\n    {line}\n")
        assert breaches(tmp_path, "", breach), line
    for line in ("from ..tokens.store import TokenStore", "from ..storage.files import written_whole"):
        breach.write_text(f"{line}\n")
        assert breaches(tmp_path, "shared", breach), line
