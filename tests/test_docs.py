"""What README and docs/ show is true: examples run, commands parse, links work, quoted messages are in the code."""

import ast
import difflib
import doctest
import inspect
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import mapet
import pytest
import typer
from mapet import cli
from mapet.train_stage.settings import FinetuneSettings, SegmentSettings, Settings, resolve

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (*ROOT.glob("*.md"), *DOCS.rglob("*.md"), *ROOT.glob(".github/**/*.md"))
)
EXAMPLES = [name for name in PAGES if ">>> " in (ROOT / name).read_text()]
GAP = "…"
"""Stands for names and numbers in a quoted message."""


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", read(page), flags=re.MULTILINE | re.DOTALL)


def without_code(page: str) -> str:
    text = re.sub(r"^```.*?^```$", "", read(page), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`\n]*`", "", text)


# Examples


def test_some_page_has_examples():
    assert EXAMPLES


@pytest.mark.parametrize("page", EXAMPLES)
def test_the_examples_of_a_page_run_as_they_are_shown(chain, page: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(chain.tokens.parent)
    result = doctest.testfile(str(ROOT / page), module_relative=False, optionflags=doctest.ELLIPSIS)
    assert result.attempted > 0
    assert result.failed == 0


# Commands


def commands(page: str) -> list[list[str]]:
    """The arguments of every `mapet` command in the bash blocks of a page, whatever starts it."""
    lines = [line for block in blocks(page, "bash") for line in block.replace("\\\n", " ").splitlines()]
    words = [shlex.split(part, comments=True) for line in lines for part in re.split(r"&&|;", line)]
    found = []
    for line in words:
        at = next((place for place, word in enumerate(line) if Path(word).name == "mapet"), None)
        if at is not None and line[0] not in ("pip", "scripts/types.sh"):
            found.append(line[at + 1 :])
    return found


COMMANDS = [(page, arguments) for page in PAGES for arguments in commands(page)]


@cache
def resolve_command(*names: str) -> Any:
    """The group or command behind `mapet NAMES`, as the command line finds it. Raises its UsageError for others."""
    if not names:
        return typer.main.get_command(cli.app)
    group = resolve_command(*names[:-1])
    return group.resolve_command(typer.Context(group), [names[-1]])[1]


def is_group(command: Any) -> bool:
    return hasattr(command, "resolve_command")


def all_commands(*names: str) -> Iterator[tuple[str, ...]]:
    group = resolve_command(*names)
    for name in group.commands:
        yield from all_commands(*names, name) if is_group(resolve_command(*names, name)) else [(*names, name)]


def options_of(command: Any) -> set[str]:
    return {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)} | {
        "--help"
    }


def name_of(arguments: list[str]) -> tuple[str, ...]:
    """Those of the arguments that name a command."""
    words = [word for word in arguments if not word.startswith("-")]
    depth = 0
    while is_group(resolve_command(*words[:depth])):
        assert depth < len(words), f"mapet {shlex.join(arguments)} names no command"
        depth += 1
    return tuple(words[:depth])


def parse(arguments: list[str]) -> dict[str, Any]:
    """Parses a command without running it, and returns its parameters. Fails the test if it does not parse."""
    if arguments in (["--help"], ["--version"]):
        return {}
    names = name_of(arguments)
    command, rest = resolve_command(*names), arguments[arguments.index(names[-1]) + 1 :]
    unknown = [word for word in rest if re.match(r"--\w", word) and word.partition("=")[0] not in options_of(command)]
    assert unknown == [], f"mapet {shlex.join(arguments)}"
    return command.make_context(names[-1], rest).params


@pytest.mark.parametrize(("page", "arguments"), COMMANDS, ids=lambda value: value if isinstance(value, str) else None)
def test_a_shown_command_parses(page: str, arguments: list[str]):
    overrides = parse(arguments).get("overrides") or ()
    resolve(None, list(overrides))


def test_a_command_with_an_unknown_option_would_be_found():
    with pytest.raises(AssertionError, match="--colour"):
        parse(["tokenize", "inspect", "tokens", "--colour", "red"])


def test_the_pages_show_every_command():
    assert set(all_commands()) - {name_of(arguments) for _, arguments in COMMANDS} == set()


@pytest.mark.parametrize("page", PAGES)
def test_options_and_settings_in_the_text_exist(page: str):
    groups: dict[str, set[str]] = {}
    for field in [*fields(Settings), *fields(FinetuneSettings), *fields(SegmentSettings)]:
        groups.setdefault(field.name, set()).update(inner.name for inner in fields(field.default_factory))
    text = read(page)
    names = re.findall(rf"`(?:--set )?({'|'.join(groups)})\.(?!safetensors|onnx)(\w+)(?:=[^`]*)?`", text)
    assert [f"{group}.{name}" for group, name in names if name not in groups[group]] == []
    for span in re.findall(r"`(mapet (?:tokenize|train)? ?[a-z-]+[^`]*)`", text):
        for option in re.findall(r" (--[a-z-]+)", span):
            assert option in known_options(), f"{page}: {span}"


@cache
def known_options() -> set[str]:
    of_commands = {option for names in all_commands() for option in options_of(resolve_command(*names))}
    return of_commands | options_of(resolve_command())


# Python


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_calls_of_mapet_in_python_blocks_fit_its_functions(page: str):
    for block in blocks(page, "python"):
        code = "\n".join(example.source for example in doctest.DocTestParser().get_examples(block)) or block
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "mapet":
                assert node.attr in mapet.__all__, f"{page}: mapet.{node.attr}"
            if isinstance(node, ast.Call) and ast.unparse(node.func).removeprefix("mapet.") in mapet.__all__:
                function = getattr(mapet, ast.unparse(node.func).removeprefix("mapet."))
                keywords = {keyword.arg: None for keyword in node.keywords if keyword.arg}
                inspect.signature(function).bind(*node.args, **keywords)


def test_the_reference_lists_every_public_name():
    listed = set(re.findall(r"^::: mapet\.(\w+)$", read("docs/api.md"), flags=re.MULTILINE))
    assert set(mapet.__all__) - listed == set()


# Links


def slug(heading: str) -> str:
    """A heading's anchor, as GitHub and the site make it."""
    plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").lower()
    return re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", plain).strip())


def anchors(path: Path) -> set[str]:
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return {slug(heading) for heading in re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_pages_and_headings(page: str):
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code(page)):
        if re.match(r"[a-z]+://", link):
            continue
        name, _, anchor = link.partition("#")
        target = (ROOT / page).parent / name if name else ROOT / page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("page", PAGES)
def test_files_named_in_the_text_exist(page: str):
    rooms = "tokenize_stage|train_stage|shared|quickstart|throughput|studies|benchmarks|recipes|tests|scripts|docs"
    text = re.sub(r"^```.*?^```$", "", read(page), flags=re.MULTILINE | re.DOTALL)
    named = re.findall(rf"`((?:{rooms})/[\w./-]*)`", text)
    missing = {name for name in named if "NAME" not in name and not (ROOT / name).exists()}
    assert missing == set()


# The pages themselves


def test_the_readme_is_short_and_holds_the_two_commands():
    lines = read("README.md").splitlines()
    assert len(lines) <= 150
    test = lines[lines.index("<!-- tests -->") + 1 : lines.index("<!-- end -->")]
    assert [line for line in test if line.startswith("python3 -m venv")] == test[1:2]
    assert sum(line.startswith("python3 -m venv") for line in lines) == 2


def test_the_readme_and_the_site_lead_to_every_page():
    pages = {path.name for path in DOCS.glob("*.md")}
    linked = set(re.findall(r"\]\(docs/([\w-]+\.md)\)", read("README.md")))
    assert pages - linked == {"index.md"}
    assert {name for name in pages if f"{name}\n" not in (ROOT / "mkdocs.yml").read_text()} == set()


def test_every_decision_is_listed_and_numbered_once():
    files = sorted(path.name for path in (DOCS / "decisions").glob("0*.md"))
    assert re.findall(r"\]\((0[\w-]+\.md)\)", read("docs/decisions/index.md")) == files
    assert [int(name[:4]) for name in files] == list(range(1, len(files) + 1))
    for name in files:
        text = read(f"docs/decisions/{name}")
        assert [part for part in ("Context", "Decision", "Consequence") if f"## {part}\n" not in text] == [], name


def test_the_settings_page_is_what_the_code_says():
    result = subprocess.run([sys.executable, DOCS / "gen_settings.py", "--check"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    page = read("docs/settings.md")
    names = [f"{field.name}.{inner.name}" for field in fields(Settings) for inner in fields(field.default_factory)]
    assert [name for name in names if page.count(f"| `{name}` |") != 1] == []
    assert "|  |" not in page, "a setting has no docstring"


def test_settings_that_are_read_statically_have_their_defaults():
    groups = runpy.run_path(str(DOCS / "gen_settings.py"))["read_groups"](
        (ROOT / "train_stage" / "settings.py").read_text()
    )
    shown = {f"{group.name}.{setting.name}": setting.default for group in groups for setting in group.settings}
    defaults = resolve(None, [f"{name}={value}" for name, value in shown.items() if value != "derived"])
    assert defaults == resolve()


# Messages


@cache
def messages() -> list[str]:
    """Every string in the code, with a gap where it has a value."""
    found = []

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.JoinedStr):
            parts = (part.value if isinstance(part, ast.Constant) else GAP for part in node.values)
            found.append("".join(map(str, parts)))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
        for child in ast.iter_child_nodes(node):
            visit(child)

    for room in ("shared", "tokenize_stage", "train_stage", "quickstart", "throughput", "studies"):
        for path in sorted((ROOT / room).rglob("*.py")):
            visit(ast.parse(path.read_text()))
    return found


def holds(message: str, quoted: str) -> bool:
    """Whether a message of the code holds the parts of a quoted one, in their order."""
    at = 0
    for part in quoted.split(GAP):
        found = message.find(part, at)
        if found < 0:
            return False
        at = found + len(part)
    return True


def test_messages_that_the_page_quotes_are_in_the_code():
    quoted = re.findall(r"^\| `(.*?)` \|", read("docs/troubleshooting.md"), flags=re.MULTILINE)
    assert len(quoted) > 50
    stale = [quote for quote in quoted if not any(holds(message, quote) for message in messages())]
    closest = {quote: difflib.get_close_matches(quote, messages(), n=1, cutoff=0.3) for quote in stale}
    assert stale == [], f"reword docs/troubleshooting.md; the closest in the code are {closest}"


# The site


def test_the_site_builds_without_a_warning(tmp_path: Path):
    pytest.importorskip("mkdocs", reason="the docs extra is not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path / "site"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    reference = (tmp_path / "site" / "api.html").read_text()
    assert [name for name in mapet.__all__ if f'id="mapet.{name}"' not in reference] == []
    scripts = re.findall(r'(?:src|href)="(https?://[^"]+)"', (tmp_path / "site" / "index.html").read_text())
    assert [url for url in scripts if url.endswith((".js", ".css")) or "font" in url] == []
