"""The command line as a user meets it: real processes, exit codes, one sentence for what is wrong."""

import importlib
import inspect
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import mapet
import pytest
import torch
from mapet import cli
from mapet.quickstart.drawings import write_drawings
from mapet.shared.doctor import doctor
from mapet.tokenize_stage.build_codebook import build_codebook

from .warm import warm_command

PUBLISHED = Path(__file__).parent / "train_stage" / "oracle" / "pretrain.pth.tar"
MODEL = ["model.name=null", "model.dim=32", "model.depth=1", "model.heads=2", "model.image_size=64"]
TRAIN = ["model.patch_size=8", "train.epochs=1", "train.batch_size=32", "optimizer.warmup_epochs=0"]


def mapet_command(*arguments: object, **environment: str) -> subprocess.CompletedProcess:
    command = [*warm_command(), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=120)


def settings(*pairs: str) -> list[str]:
    return [word for pair in (*MODEL, *TRAIN, *pairs) for word in ("--set", pair)]


def test_help_and_completion_import_nothing_heavy():
    heavy = ("torch", "open_clip", "timm", "faiss", "zarr", "numpy", "PIL", "torchvision", "webdataset")
    for words, environment in (
        (["--help"], {}),
        (["tokenize", "build-codebook", "--help"], {}),
        (["train", "--help"], {}),
        ([], {"_MAPET_COMPLETE": "complete_bash", "COMP_WORDS": "mapet tok", "COMP_CWORD": "1"}),
    ):
        code = (
            "import atexit, sys; from mapet import cli\n"
            f"atexit.register(lambda: print('LOADED', [name for name in {heavy!r} if name in sys.modules]))\n"
            f"sys.argv = {['mapet', *words]!r}\n"
            "cli.main()"
        )
        result = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}
        )
        assert "LOADED []" in result.stdout, result


@pytest.mark.parametrize(
    ("modules", "not_needed"),
    [
        (
            ["train_stage.pretrain", "tokenize_stage.encode_shards", "tokenize_stage.build_codebook"],
            ["timm", "torchvision", "zarr", "open_clip", "faiss"],
        ),
        (["tokenize_stage.verify", "tokenize_stage.inspect"], ["torch", "timm", "zarr"]),
        (["shared.doctor"], ["torch", "timm", "zarr", "numpy"]),
    ],
)
def test_a_command_imports_only_what_it_needs(modules: list[str], not_needed: list[str]):
    """One process imports all commands that must not need something: the first that does is named."""
    code = (
        f"import importlib, sys\nfor module in {modules!r}:\n    importlib.import_module(f'mapet.{{module}}')\n"
        f"    print(module, [name for name in {not_needed!r} if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.splitlines() == [f"{module} []" for module in modules], result


@pytest.mark.parametrize(("group", "name"), [(group, name) for group in cli.COMMANDS for name in cli.COMMANDS[group]])
def test_each_command_has_the_parameters_and_defaults_of_its_functions(group: str, name: str):
    command = cli.COMMANDS[group][name]
    options = {option.name: option for option in cli.build(name, command).params}
    names = {"json"} if command.shown_by else set()
    for function in command.functions.values():
        module, _, function_name = function.partition(":")
        parameters = inspect.signature(getattr(importlib.import_module(f"mapet.{module}"), function_name)).parameters
        names |= set(parameters)
        for parameter in parameters.values():
            option = options[parameter.name]
            if parameter.default is not inspect.Parameter.empty:
                assert (option.default or None) == (parameter.default or None), parameter
                assert not option.required, parameter
            elif len(command.functions) == 1:
                assert option.required == ("None" not in str(parameter.annotation)), parameter
    assert set(options) - {"dry_run"} == names - {"dry_run"}


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A folder with a copy of the package, whose source a test may change."""
    skipped = shutil.ignore_patterns("tests", "docs", "benchmarks", "tower", "vendor", ".*", "__pycache__")
    return shutil.copytree(Path(mapet.__file__).parent, tmp_path / "copy" / "mapet", ignore=skipped)


def command_of_copy(package: Path, *words: str, setup: str = "") -> subprocess.CompletedProcess:
    """Runs the command line of the copy, after `setup`."""
    code = f"from mapet import cli\n{setup}\ncli.main()"
    environment = {**os.environ, "PYTHONPATH": str(package.parent), "COLUMNS": "200"}
    return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, env=environment)


RETRIED = '''
def doctor(*, retries: int = 7):
    """Checks.

    Args:
        retries: How often `doctor` tries.
    """
    return {"retries": retries}
'''


def test_a_parameter_added_to_a_function_is_an_option_without_a_change_of_the_command_line(package: Path):
    with (package / "shared" / "doctor.py").open("a") as module:
        module.write("\n\ndel doctor\n")
    path = package / "shared" / "doctor.py"
    path.write_text(path.read_text().replace("def doctor(", "def former_doctor(").replace("\ndel doctor\n", RETRIED))
    shown = command_of_copy(package, "doctor", "--help").stdout
    assert re.search(r"--retries +<int> +How often doctor tries. \[default: 7\]", shown), shown
    assert json.loads(command_of_copy(package, "doctor", "--retries", "3", "--json").stdout) == {"retries": 3}


PAIR = '''
def cut(out: str, *, length: float, edge: str | None = None):
    """Cuts.

    Args:
        out: Where to, for `length` [in metres].
        length: Of the piece.
        edge: How smooth.
    """
    print("cut", out, length, edge)

def glue(out: str, *, parts: int):
    """Glues.

    Args:
        out: Where to.
        parts: How many.
    """
    print("glue", out, parts)

def which(*, length, parts):
    return "glue" if length is None else "cut"

def rehearse(out: str):
    """Only tells what would be done."""
    return f"rehearsal {out}"

def show(estimate):
    print(estimate)
'''
PAIR_COMMAND = """
cli.COMMANDS["mapet"]["pair"] = cli.Command(
    "Cut or glue.", {"cut": "shared.pair:cut", "glue": "shared.pair:glue"}, chosen_by="shared.pair:which",
    arguments=("out",), dry_run=("shared.pair:rehearse", "shared.pair:show"),
)
"""


def test_a_command_can_join_two_functions_and_have_a_dry_run(package: Path):
    (package / "shared" / "pair.py").write_text(PAIR)

    def pair(*words: str) -> str:
        return command_of_copy(package, "pair", *words, setup=PAIR_COMMAND).stdout

    shown = pair("--help")
    for words in (
        "Cut or glue.",
        "Where to, for --length [in metres]. Or: Where to.",
        "Of the piece.",
        "How smooth.",
        "How many.",
        "Only tells what would be done.",
    ):
        assert words in shown
    assert pair("here", "--length", "2", "--edge", "x") == "cut here 2.0 x\n"
    assert pair("here", "--parts", "3") == "glue here 3\n"
    assert pair("here", "--parts", "3", "--dry-run") == "rehearsal here\n"


def test_the_version():
    assert mapet_command("--version").stdout == f"mapet {mapet.__version__}\n"


def test_debug_shows_what_is_behind_a_sentence(tmp_path: Path):
    (tmp_path / "broken.pth.tar").write_bytes(b"not a checkpoint")
    words = ["train", "import", tmp_path / "broken.pth.tar", "--out", tmp_path / "out"]
    plain = mapet_command(*words)
    assert plain.stderr.count("\n") == 1
    for result in (mapet_command("--debug", *words), mapet_command(*words, MAPET_DEBUG="1")):
        assert (result.returncode, result.stdout) == (1, "")
        assert result.stderr.endswith(f"\n{plain.stderr}")
        # The library's own error, which the sentence hides, and where the sentence was written.
        assert result.stderr.count("Traceback (most recent call last):") >= 2
        assert "During handling of the above exception" in result.stderr


def test_every_public_name_is_there():
    assert {name for name in mapet.__all__ if not callable(getattr(mapet, name))} == set()
    with pytest.raises(AttributeError, match="nothing"):
        mapet.nothing  # noqa: B018


def test_the_whole_chain_by_command(chain, tower, tmp_path: Path):
    codebook, tokens, run = tmp_path / "codebook", tmp_path / "tokens", tmp_path / "run"
    steps = [
        ("tokenize", "build-codebook", chain.images, "--out", codebook, "--tower", tower, "--k", 16, "--restarts", 1),
        ("tokenize", "encode-shards", chain.images, "--codebook", codebook, "--out", tokens),
        ("tokenize", "verify", tokens, "--codebook", codebook, "--images", chain.images),
        ("train", "pretrain", "--images", chain.images, "--tokens", tokens, "--out", run, *settings()),
        ("train", "probe", run, "--images", chain.images, "--val", chain.images, "--random-init"),
        ("train", "import", run, "--out", tmp_path / "ours"),
        ("train", "export", tmp_path / "ours", "--out", tmp_path / "timm", "--image-size", 96),
        ("train", "features", chain.images, "--weights", tmp_path / "timm", "--out", tmp_path / "a.zarr"),
    ]
    for step in steps:
        result = mapet_command(*step)
        assert result.returncode == 0, result.stderr
        assert result.stdout.strip(), step
    about = json.loads(mapet_command("tokenize", "inspect", tokens, "--json").stdout)
    assert (about["images"], about["k"], about["grid"]) == (96, 16, [8, 8])
    assert (
        about["fingerprint"]
        == json.loads(mapet_command("tokenize", "inspect", codebook, "--json").stdout)["fingerprint"]
    )
    key = json.loads(mapet_command("tokenize", "inspect", tokens, "--json").stdout)
    assert key["usage"]["used"] + key["usage"]["dead"] == 16


PARTS = 8  # each case starts a command, and several processes share the tests


def broken(chain, tower: str, folder: Path) -> dict[str, tuple[list, int, str]]:
    """Arguments, exit code and words of the sentence, for each thing that can be wrong."""
    (folder / "empty.tar").write_bytes(b"")
    write_drawings(folder / "more", 8, seed=9)
    text = folder / "texts.tar"
    with tarfile.open(text, "w") as tar:
        tar.add(__file__, "notes.txt")
    shutil.copytree(chain.tokens, folder / "truncated")
    shard = sorted((folder / "truncated" / "shards").glob("*.zip"))[0]
    shard.write_bytes(shard.read_bytes()[:-7])
    build_codebook(chain.images, folder / "other", tower=tower, k=16, restarts=1, iterations=1, seed=1)
    config = Path(tower.removeprefix("local-dir:")) / "open_clip_config.json"
    (folder / "weightless").mkdir()
    shutil.copy(config, folder / "weightless")
    build = ["tokenize", "build-codebook"]
    out = ["--out", folder / "out"]
    train = ["train", "pretrain", "--images", chain.images, "--out", folder / "run", "--tokens"]
    return {
        "missing path": ([*build, folder / "nothing", *out, "--tower", tower], 1, "does not exist"),
        "empty tar": ([*build, folder / "empty.tar", *out, "--tower", tower], 1, "is empty"),
        "tar without images": ([*build, text, *out, "--tower", tower], 1, "holds no images"),
        "unknown tower": ([*build, chain.images, *out, "--tower", "ViT-Z-99"], 2, "did you mean"),
        "unknown tag": ([*build, chain.images, *out, "--tower", "ViT-B-32", "--pretrained", "x"], 2, "its tags are"),
        "weights missing": (
            [*build, chain.images, *out, "--tower", f"local-dir:{folder / 'weightless'}"],
            1,
            "no weights",
        ),
        "weights out of reach": ([*build, chain.images, *out, "--tower", "RN50"], 1, "could not be fetched"),
        "K larger than the sample": (
            [*build, chain.images, *out, "--tower", tower, "--k", 16, "--patches", 15],
            1,
            "larger than the sample",
        ),
        "tokens of another codebook": (
            ["tokenize", "encode-shards", chain.images, "--codebook", folder / "other", "--out", chain.tokens],
            1,
            "was begun",
        ),
        "another codebook to verify": (
            ["tokenize", "verify", chain.tokens, "--codebook", folder / "other"],
            1,
            "was made with codebook",
        ),
        "grid mismatch": ([*train, chain.tokens, *settings("model.patch_size=16")], 2, "these would fit"),
        "tokens missing for an image": (
            [
                "train",
                "pretrain",
                "--images",
                folder / "more",
                "--out",
                folder / "run",
                "--tokens",
                chain.tokens,
                *settings(),
            ],
            1,
            "have no tokens",
        ),
        "truncated token shard": ([*train, folder / "truncated", *settings()], 1, "bytes instead of"),
        "truncated token shard, verified": (["tokenize", "verify", folder / "truncated"], 1, "bytes instead of"),
        "unknown setting": ([*train, chain.tokens, *settings("optimizer.learning_rate=1")], 2, "optimizer.lr"),
        "no weights": (["train", "export", folder / "nothing", *out], 1, "does not exist"),
        "no checkpoint": (["train", "import", text, *out], 1, "not a published checkpoint"),
        "patches do not fill the image": (["train", "export", PUBLISHED, *out, "--image-size", 50], 2, "a multiple"),
        "taken": (["train", "import", PUBLISHED, "--out", folder / "more"], 2, "already exists"),
        "no image of that key": (["tokenize", "inspect", chain.tokens, "--key", "nobody"], 1, "no image with key"),
        "a store against a codebook": (
            ["tokenize", "inspect", chain.tokens, "--against", chain.codebook],
            2,
            "is a codebook and",
        ),
        "neither codebook nor store": (["tokenize", "inspect", folder], 1, "neither a codebook"),
        "no CUDA": ([*build, chain.images, *out, "--tower", tower, "--device", "cuda"], 2, "no CUDA device"),
    }


@pytest.mark.parametrize("part", range(PARTS))
def test_what_is_wrong_is_said_in_one_sentence_and_leaves_nothing_behind(chain, tower, tmp_path: Path, part: int):
    if torch.cuda.is_available():
        pytest.skip("one of the cases needs a machine without CUDA")
    for name, (arguments, code, words) in list(broken(chain, tower, tmp_path).items())[part::PARTS]:
        result = mapet_command(*arguments)
        said = [line for line in result.stderr.splitlines() if line.startswith("mapet: ")]
        assert result.returncode == code, (name, result)
        assert len(said) == 1, (name, result.stderr)
        assert words in said[0], (name, said)
        assert "Traceback" not in result.stderr + result.stdout, name
        assert not (tmp_path / "out").exists(), name
        assert not (tmp_path / "run" / "checkpoints").exists(), name


class Malicious:
    def __init__(self, witness: Path):
        self.witness = witness

    def __reduce__(self):
        return os.system, (f"touch {self.witness}",)


def test_a_malicious_checkpoint_is_refused_in_one_sentence_and_runs_nothing(tmp_path: Path):
    published = torch.load(PUBLISHED, weights_only=False)
    torch.save({**published, "args": Malicious(tmp_path / "witness")}, tmp_path / "bad.pth.tar")
    result = mapet_command("train", "import", tmp_path / "bad.pth.tar", "--out", tmp_path / "out")
    assert (result.returncode, result.stdout, len(result.stderr.splitlines())) == (1, "", 1), result
    assert "bad.pth.tar" in result.stderr
    assert "nothing in it was run" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["bad.pth.tar"]


def test_a_wrong_option_is_a_usage_error():
    assert mapet_command("tokenize", "build-codebook", "x", "--nonsense").returncode == 2


def test_many_processes_are_refused_before_they_do_the_same_work_twice(chain, tmp_path: Path):
    encode = ["tokenize", "encode-shards", chain.images, "--codebook", chain.codebook, "--out", tmp_path / "out"]
    train = ["train", "pretrain", "--images", chain.images, "--tokens", chain.tokens, "--out", tmp_path / "out"]
    for arguments in (encode, train):
        result = mapet_command(*arguments, WORLD_SIZE="2", RANK="0")
        assert result.returncode == 2
        assert "torchrun" in result.stderr
        assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawings enough for an encoding to be still at it when a signal comes."""
    images = tmp_path_factory.mktemp("many")
    write_drawings(images, 200, seed=11, per_tar=10)
    return images


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_stopped_command_keeps_what_is_whole_and_says_how_to_go_on(
    chain, many: Path, tmp_path: Path, number: int, workers: int
):
    tokens, images = tmp_path / "tokens", many
    options = ["--codebook", chain.codebook, "--out", tokens, "--batch-size", 1, "--workers", workers]
    command = [*warm_command(), "tokenize", "encode-shards", images, *options]
    process = subprocess.Popen(
        list(map(str, command)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    first = tokens / "shards" / f"{min(images.iterdir()).stem}.json"
    deadline = time.monotonic() + 60
    while not first.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(number)
    _, errors = process.communicate(timeout=20)
    assert (process.returncode, errors.count("mapet: stopped")) == (130, 1), errors
    assert "give the same command" in errors
    assert "Traceback" not in errors
    assert not (tokens / "manifest.json").exists()
    assert not [path for path in tokens.rglob("*") if "partial" in path.name]
    assert len(mapet.encode_shards(images, chain.codebook, tokens)) == 200


def test_doctor_names_versions_devices_and_the_faiss_build():
    about = json.loads(mapet_command("doctor", "--json").stdout)
    assert about["packages"]["torch"] == torch.__version__.split("+")[0]
    assert about["faiss"]["version"] == __import__("faiss").__version__
    assert isinstance(about["devices"]["cuda"], list)
    assert "problems" in about
    assert "torch" in mapet_command("doctor").stdout


def test_doctor_names_builds_of_faiss_that_overwrite_each_other(tmp_path: Path, monkeypatch):
    for name in ("faiss-gpu", "faiss-gpu-cu12"):
        folder = tmp_path / f"{name.replace('-', '_')}-1.15.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.15.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    about = doctor()
    assert about["packages"]["faiss-gpu"] == "1.15.0"
    (said,) = [problem for problem in about["problems"] if "overwrite" in problem]
    assert "faiss-gpu and faiss-gpu-cu12 are installed together" in said
