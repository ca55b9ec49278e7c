"""The command line: a table of commands. Each one's options are the parameters of the public function that it calls.

Defaults and help texts are read from the function's source (`shared.runtime.static_signature`); its module is imported
when the command runs. To add an option, add a parameter; to add a command, add a line to `COMMANDS`.
"""

# ruff: noqa: E402

import signal
import threading

_BEFORE = signal.getsignal(signal.SIGINT)


def _interrupts_end_the_process() -> None:
    """Until `main` handles it, and while this module is imported, Ctrl-C ends the process without a traceback."""
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


_interrupts_end_the_process()

import errno
import inspect
import logging
import re
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from . import __version__
from .shared.errors import MapetError, UsageError
from .shared.printable import printable
from .shared.runtime.console import log, running_command, stop_signals
from .shared.runtime.distributed import is_first_process
from .shared.runtime.memory import allow_enough_files, too_few_files
from .shared.runtime.static_signature import REQUIRED, Parameter, StaticSignature, read_signature

_PACKAGE = Path(__file__).parent


@dataclass(frozen=True)
class Command:
    """A command, and the function whose parameters are its options. Functions are written "module:function"."""

    summary: str
    function: str | Mapping[str, str]
    """With several functions by name, the options are all their parameters and `chosen_by` returns one of the names."""
    chosen_by: str | None = None
    arguments: tuple[str, ...] = ()
    """Parameters that are given by position; a trailing "..." takes one or more values."""
    renamed: Mapping[str, str] = field(default_factory=dict)
    """Options that are not spelled like their parameter."""
    at_least: Mapping[str, int] = field(default_factory=dict)
    """Lower bounds of integers, beside those in `_AT_LEAST`."""
    shown_by: str | None = None
    """Adds `--json`; this function prints the result and is told by `as_json` whether as JSON."""
    opened: Mapping[str, str] = field(default_factory=dict)
    """Options that are paths; the function of each opens what the parameter takes."""
    dry_run: tuple[str, str] | None = None
    """Adds `--dry-run`: a function that is called instead with those of the options that it takes, and the function
    that prints its result."""

    @property
    def functions(self) -> Mapping[str, str]:
        return {"": self.function} if isinstance(self.function, str) else self.function


COMMANDS: dict[str, dict[str, Command]] = {
    "tokenize": {
        "build-codebook": Command(
            "Train a k-means codebook over the patch features of a frozen CLIP tower.",
            "tokenize_stage.build_codebook:build_codebook",
            arguments=("images...",),
            at_least={"image_size": 8},
        ),
        "encode-shards": Command(
            "Write the visual tokens of every image to shards. Run it again to add images or views.",
            "tokenize_stage.encode_shards:encode_shards",
            arguments=("images...",),
            dry_run=(
                "tokenize_stage.encode_shards:encode_shards_dry_run",
                "tokenize_stage.encode_shards:show_estimate",
            ),
        ),
        "inspect": Command(
            "Show how a codebook or a token store was made, how its codes are used, and what is suspicious about it.",
            "tokenize_stage.inspect:inspect",
            arguments=("path",),
            shown_by="tokenize_stage.inspect:show",
        ),
        "verify": Command(
            "Check that every shard is present, complete, checksummed and made with the codebook it names.",
            "tokenize_stage.verify:verify",
            arguments=("tokens",),
        ),
        "import": Command(
            "Import centroids (--centroids), a published tokenizer (--vqkd, --dvae) or tokens (--tokens --csv ...).",
            {
                "codebook": "tokenize_stage.import_tokens:import_codebook",
                "tokenizer": "tokenize_stage.import_tokens:import_tokenizer",
                "tokens": "tokenize_stage.import_tokens:import_tokens",
            },
            chosen_by="tokenize_stage.import_tokens:which_import",
            at_least={"image_size": 8},
        ),
    },
    "train": {
        "pretrain": Command(
            "Pre-train MaPeT on images and their precomputed tokens.",
            "train_stage.pretrain:pretrain",
            renamed={"overrides": "--set"},
            at_least={"extend": 1},
            opened={"teacher": "tokenize_stage.tokenizers.opening:read_tokenizer"},
            dry_run=("train_stage.pretrain:pretrain_dry_run", "train_stage.training.dry_run:show_estimate"),
        ),
        "finetune": Command(
            "Fine-tune pre-trained weights for classification.",
            "train_stage.finetune:finetune",
            arguments=("weights",),
            renamed={"overrides": "--set"},
            at_least={"freeze": 0},
            dry_run=("train_stage.finetune:finetune_dry_run", "train_stage.training.dry_run:show_estimate"),
        ),
        "evaluate": Command(
            "Measure a fine-tuned classifier on labelled images: accuracy, calibration, confusions.",
            "train_stage.evaluate:evaluate",
            arguments=("weights",),
            shown_by="train_stage.evaluate:show",
        ),
        "predict": Command(
            "Predict the classes of images with a fine-tuned classifier (--json: one line per image).",
            "train_stage.predict:predict",
            arguments=("weights", "images..."),
            at_least={"top": 1},
            shown_by="train_stage.predict:show",
        ),
        "probe": Command(
            "Measure frozen features: linear and attentive probe, k-NN, few labels, effective rank.",
            "train_stage.probe:probe",
            arguments=("weights",),
            renamed={"everything": "--all"},
            shown_by="train_stage.probe:show",
        ),
        "segment": Command(
            "Measure semantic segmentation: frozen patches, a linear head, or fine-tuning with UPerNet.",
            "train_stage.segment:segment",
            arguments=("weights",),
            renamed={"overrides": "--set"},
            dry_run=("train_stage.segment:segment_dry_run", "train_stage.training.dry_run:show_estimate"),
            shown_by="train_stage.segment:show",
        ),
        "report": Command(
            "Write runs as an HTML page: curves, probes, settings and predictions.",
            "train_stage.report:report",
            arguments=("runs...",),
        ),
        "features": Command(
            "Write frozen features to a Zarr group: keys, one vector per image, one per patch, labels.",
            "train_stage.features:features",
            arguments=("images...",),
        ),
        "export": Command(
            'Write a folder that timm.create_model("local-dir:OUT", pretrained=True) opens.',
            "train_stage.export:export",
            arguments=("weights",),
        ),
        "import": Command(
            "Read weights of other formats, without running code in them, into a folder that every command takes.",
            "train_stage.import_weights:import_weights",
            arguments=("file",),
        ),
    },
    "mapet": {
        "demo": Command(
            "Run the whole chain in a few minutes, offline, on images drawn by this package.",
            "quickstart.demo:demo",
        ),
        "bench": Command(
            "Measure decode, loader, tower, k-means and step beside bare libraries, and say what bounds a run here.",
            "throughput.bench:bench",
            renamed={"overrides": "--set"},
            at_least={"k": 2},
            shown_by="throughput.bench:show",
        ),
        "study": Command(
            "Compare tokenizers, objectives and models over seeds under one protocol; resumable, on many machines.",
            {"study": "studies.study:study", "plan": "studies.plan:study_dry_run"},
            chosen_by="studies.study:which_study",
            arguments=("study",),
            dry_run=("studies.plan:study_dry_run", "studies.plan:show_plan"),
            shown_by="studies.study:show",
        ),
        "doctor": Command(
            "Print versions, devices, the FAISS build and what is missing, for a bug report.",
            "shared.doctor:doctor",
            shown_by="shared.doctor:show",
        ),
    },
}
_AT_LEAST = {
    "batch_size": 1,
    "heads": 1,
    "image_size": 1,
    "iteration_batch": 1,
    "iterations": 1,
    "max_images": 1,
    "max_patches": 1,
    "max_pixels": 1,
    "patches": 1,
    "workers": 0,
}


class _Group(TyperGroup):
    """Lists the commands of `COMMANDS` by their summaries, and builds one only to run it, show its help or complete it:
    reading signatures takes a while."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self._table = COMMANDS[self.name or ""]
        summaries = {name: TyperCommand(name, help=command.summary) for name, command in self._table.items()}
        self.commands = {**summaries, **self.commands}

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        return name, build(name, self._table[name]) if name in self._table else command, rest


app = typer.Typer(
    name="mapet",
    cls=_Group,
    help="Tokenizer-first pre-training of Vision Transformers: k-CLIP tokens once, then MaPeT.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(
    typer.Typer(cls=_Group, help="Stage 1: images -> codebook -> token shards.", no_args_is_help=True), name="tokenize"
)
app.add_typer(
    typer.Typer(cls=_Group, help="Stage 2: images and tokens -> a pre-trained ViT.", no_args_is_help=True), name="train"
)


def _show_version(asked: bool) -> None:
    if asked:
        print(f"mapet {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", envvar="MAPET_DEBUG", help="Also show the traceback behind an error's sentence.")
    ] = False,
) -> None:
    if debug:
        log.setLevel(logging.DEBUG)


def build(name: str, command: Command) -> Any:
    """The typer command of an entry in `COMMANDS`."""
    parameters = _parameters(command)

    def run(**values: Any) -> None:
        _run(command, values)

    options = [
        inspect.Parameter(parameter, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        for parameter, (annotation, default) in _options_of(command, parameters).items()
    ]
    run.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]  # what typer reads
    run.__annotations__ = {option.name: option.annotation for option in options}
    single = typer.Typer(add_completion=False)
    single.command(name, help=command.summary)(run)
    return typer.main.get_command(single)


def _signature(function: str) -> StaticSignature:
    module, _, name = function.partition(":")
    return read_signature(_PACKAGE.joinpath(*module.split(".")).with_suffix(".py"), name)


def _parameters(command: Command) -> dict[str, Parameter]:
    """The parameters of all functions of a command. One that not every function has may be left out; the first function
    that has one says its type and default, and each what it does there."""
    parameters: dict[str, Parameter] = {}
    signatures = [_signature(function).parameters for function in command.functions.values()]
    for name in dict.fromkeys(name for signature in signatures for name in signature):
        declared = [signature[name] for signature in signatures if name in signature]
        types, default = declared[0].types, declared[0].default
        if name in command.opened:
            types = ("str", "Path", "None")
        if default is REQUIRED and len(declared) < len(signatures):
            types = (*types, "None")
        text = " Or: ".join(dict.fromkeys(parameter.help for parameter in declared))
        parameters[name] = Parameter(name, types, default, text)
    return parameters


def _options_of(command: Command, parameters: Mapping[str, Parameter]) -> dict[str, tuple[Any, Any]]:
    """Annotation and default of each option and argument, as typer reads them."""
    by_position = {argument.removesuffix("..."): argument.endswith("...") for argument in command.arguments}
    spelled = {name: command.renamed.get(name, f"--{name.replace('_', '-')}") for name in parameters}
    options = {}
    for name in [*by_position, *(name for name in parameters if name not in by_position)]:
        parameter = parameters[name]
        several = by_position.get(name, name not in by_position and "Sequence[str | Path]" in parameter.types)
        kind = _kind(parameter, several=several)
        text = _help(parameter.help, {name: option for name, option in spelled.items() if name not in by_position})
        if name in by_position:
            annotation: Any = Annotated[kind, typer.Argument(help=text)]
        else:
            declared = f"{spelled[name]}/--no-{spelled[name][2:]}" if kind is bool else spelled[name]
            minimum = command.at_least.get(name, _AT_LEAST.get(name)) if "int" in parameter.types else None
            metavar = "<path>" if "Path" in parameter.types else None
            annotation = Annotated[kind, typer.Option(declared, help=text, min=minimum, metavar=metavar)]
        default = None if parameter.default is REQUIRED and "None" in parameter.types else parameter.default
        options[name] = (annotation, default)
    if command.shown_by:
        flag = typer.Option("--json", help="Print JSON for machines instead of a table.")
        options["json"] = (Annotated[bool, flag], False)
    if command.dry_run and "dry_run" not in parameters:
        flag = typer.Option("--dry-run", help=_help(_signature(command.dry_run[0]).summary, spelled))
        options["dry_run"] = (Annotated[bool, flag], False)
    return options


def _kind(parameter: Parameter, *, several: bool) -> Any:
    """The type that typer converts to. Paths stay text, because most may also be URLs."""
    kinds: dict[str, Any] = {
        "str": str,
        "bool": bool,
        "int": int,
        "float": float,
        "tuple[float, float]": tuple[float, float],
        "Sequence[str]": list[str],
        "Sequence[int]": list[int],
    }
    kind = next((kinds[member] for member in parameter.types if member in kinds), None)
    if kind is None:
        raise TypeError(f"parameter {parameter.name}: no option for type {' | '.join(parameter.types)}")
    if several:
        kind = list[str]
    return kind | None if "None" in parameter.types else kind


def _help(text: str, options: Mapping[str, str]) -> str:
    """A docstring's text for the command line: options and commands instead of parameters and functions."""
    commands = {
        function.partition(":")[2]: name
        for group in COMMANDS.values()
        for name, command in group.items()
        for function in command.functions.values()
    }
    text = re.sub(r" \(see `[^`]+`\)", "", text)
    text = re.sub(r"`([^`]+)`", lambda match: {**commands, **options}.get(match[1], match[1]), text)
    if "[" in text:
        from rich.markup import escape

        text = escape(text)
    return text


def _refuse_empty_paths(command: Command, values: Mapping[str, Any]) -> None:
    """An empty text would mean the current folder to some functions and nothing to others."""
    for name, parameter in _parameters(command).items():
        given = values.get(name)
        if "Path" in parameter.types and (given == "" or (isinstance(given, list) and "" in given)):
            by_position = {argument.removesuffix("...") for argument in command.arguments}
            spelled = name.upper() if name in by_position else f"--{name.replace('_', '-')}"
            raise UsageError(f"{spelled} is empty; give a path (is a variable of the shell unset?).")


def _run(command: Command, values: dict[str, Any]) -> None:
    _refuse_empty_paths(command, values)
    allow_enough_files()
    as_json = values.pop("json", False) if command.shown_by else False
    values |= {name: _imported(by)(values[name]) for name, by in command.opened.items() if values[name] is not None}
    if command.dry_run and values.get("dry_run") and "dry_run" not in _parameters(command):
        estimate, show = command.dry_run
        _imported(show)(_call(estimate, values), **({"as_json": as_json} if command.shown_by else {}))
        return
    choice = _call(command.chosen_by, values) if command.chosen_by else ""
    result = _call(command.functions[choice], values)
    if command.shown_by:
        _imported(command.shown_by)(result, as_json=as_json)


def _call(function: str, values: Mapping[str, Any]) -> Any:
    """Calls a function with those of the values that it takes."""
    called = _imported(function)
    return called(**{name: values[name] for name in inspect.signature(called).parameters if name in values})


def _imported(function: str) -> Callable[..., Any]:
    module, _, name = function.partition(":")
    imported: Callable[..., Any] = getattr(import_module(f".{module}", __package__), name)
    return imported


def main() -> None:
    """The `mapet` command: an expected failure ends with one sentence and its exit code, without a traceback."""
    _interrupts_end_the_process()
    with running_command():
        try:
            for number in stop_signals():
                signal.signal(number, signal.default_int_handler)
            app()
        except MapetError as error:
            _fail(str(error), error.exit_code)
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                _fail(str(too_few_files()), too_few_files().exit_code)
            _fail(f"{error.filename or 'a file'}: {error.strerror or error}.", 1)
        except SystemExit as end:
            if end.code == 130 and is_first_process():
                _fail("stopped. What was finished is kept; give the same command to go on.", 130)
            raise


def _fail(sentence: str, code: int) -> None:
    # What remains is Python's own end, in which a second Ctrl-C or torchrun's SIGTERM would print a traceback.
    for number in stop_signals():
        signal.signal(number, signal.SIG_DFL)
    error = sys.exception()
    if error is not None and log.isEnabledFor(logging.DEBUG):
        _reveal_contexts(error)
        traceback.print_exception(error)
    print(f"mapet: {printable(sentence)}", file=sys.stderr)
    sys.exit(code)


def _reveal_contexts(error: BaseException) -> None:
    """Makes a traceback show the exceptions that `raise ... from None` hides."""
    seen: BaseException | None = error
    while seen is not None:
        seen.__suppress_context__ = seen.__cause__ is not None
        seen = seen.__cause__ or seen.__context__


if threading.current_thread() is threading.main_thread() and _BEFORE is not None:
    signal.signal(signal.SIGINT, _BEFORE)
