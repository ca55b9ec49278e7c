"""What is installed: the wheel's files, and the package's own size."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    out, source = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("source") / "tree"
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    for name in filter(None, listed):
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, source]
    subprocess.run(command, check=True, capture_output=True)
    return next(out.glob("*.whl"))


def test_the_wheel_holds_the_rooms_the_recipes_and_the_demo_and_nothing_else(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    modules = {
        f"mapet/{path.relative_to(ROOT).as_posix()}"
        for room in ("shared", "studies", "tokenize_stage", "train_stage", "throughput")
        for path in (ROOT / room).rglob("*.py")
    } | {
        "mapet/__init__.py",
        "mapet/cli.py",
        "mapet/py.typed",
        *(f"mapet/quickstart/{name}.py" for name in ("__init__", "demo", "drawings", "train_tower", "train_weights")),
    }
    pretraining = ("vit-tiny-16", "vit-small-16", "vit-small-16-one-gpu", "vit-base-16", "efficient")
    finetuning = ("finetune-vit-tiny-16", "finetune-vit-small-16", "finetune-vit-base-16", "finetune-small-data")
    segmentation = ("segment-vit-base-16", "segment-small-data")
    recipes = {f"mapet/recipes/{name}.yaml" for name in (*pretraining, *finetuning, *segmentation)}
    tower = {
        f"mapet/quickstart/tower/{name}"
        for name in ("README.md", "open_clip_config.json", "open_clip_model.safetensors")
    }
    pages = ("run", "store", "study", "classifier", "segmentation")
    report = {
        f"mapet/shared/report/{name}"
        for name in (
            *(f"templates/{name}.html" for name in ("page", *pages)),
            *(f"static/{name}" for name in ("page.css", *(f"{page}.js" for page in ("page", *pages)))),
            *(f"vendor/{name}" for name in ("README.md", "d3.LICENSE", "d3.min.js", "plot.LICENSE", "plot.min.js")),
        )
    }
    studies = {f"mapet/studies/shipped/{name}.yaml" for name in ("paper-imagenet", "smoke", "tiny", "tiny-rows")}
    weights = {
        f"mapet/train_stage/weights/shipped/mapet-drawings-tiny/{name}"
        for name in ("README.md", "config.json", "model.safetensors")
    }
    assert names == modules | recipes | studies | tower | weights | report


def test_the_tower_is_at_most_5_mb_and_the_weights_10(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        sizes = {info.filename: info.file_size for info in archive.infolist()}
    assert sum(size for name, size in sizes.items() if "quickstart" in name) <= 5_000_000
    assert sum(size for name, size in sizes.items() if "shipped/mapet-drawings-tiny" in name) <= 10_000_000
