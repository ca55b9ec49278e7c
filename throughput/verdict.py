"""What bounds tokenizing and training on a machine, and what to change: sentences from measured rates alone."""

import math
from dataclasses import dataclass

STEP, LOADER = "step", "loader"
TOWER, DECODING, ASSIGNMENT = "tower", "decoding", "assignment"
_WAITING, _WORTH_SAYING = 0.1, 0.01
"""The share of the time from which on the wait for workers is the bound; that from which on a share is mentioned."""
_FAR_FROM_LIMIT = 0.4
_SPARE = 1.1
"""Workers are proposed with a tenth to spare."""


@dataclass(frozen=True)
class Machine:
    """What was measured, in images per second, and under which settings."""

    device: str
    """"cpu" or "cuda"."""
    cores: int
    workers: int
    """Processes that decoded images."""
    loader: float
    step: float
    encode: float
    """From encoded bytes to tokens."""
    tower: float
    """The bare forward pass on ready tensors."""
    assignment: float
    """From features to tokens."""
    share_of_limit: float
    """The step's FLOP/s over those of a large matrix product."""
    precision: str
    """Of the step: "float32" or "bfloat16"."""
    compiled: bool
    faiss_gpus: int = 0


@dataclass(frozen=True)
class Verdict:
    """What bounds a run."""

    bound: str
    sentences: tuple[str, ...]
    """The bound in words, and what to change."""


def of_training(machine: Machine) -> Verdict:
    """Whether the loader or the step bounds pre-training. Beside a GPU the two overlap; on the CPU they share cores."""
    supply = machine.loader / machine.step
    if supply >= 1:
        said = f"Training here is bound by the step: the loader delivers {_times(supply)} the images that it takes."
        return Verdict(STEP, (said, *_shared_time(machine), *_faster_step(machine)))
    waits = f", which waits {1 - supply:.0%} of the time" if machine.device == "cuda" else ""
    said = f"Training here is bound by the loader: it delivers {_times(supply)} what the step could take{waits}."
    return Verdict(LOADER, (said, *_shared_time(machine), *_faster_loading(machine, 1 / supply, "--set data.workers=")))


def of_tokenizing(machine: Machine) -> Verdict:
    """Whether decoding, the tower or the assignment to codes bounds encode-shards."""
    shares = tokenizing_shares(machine)
    bound = max(shares, key=lambda part: shares[part])
    if machine.workers and shares[DECODING] > _WAITING:
        bound = DECODING  # with workers it overlaps the rest, so that any time left for it is spent waiting for them
    parts = ", ".join(f"{part} {share:.0%}" for part, share in shares.items())
    said = f"Tokenizing here is bound by {_PHRASES[bound]} ({parts} of the time)."
    if bound == TOWER:
        return Verdict(bound, (said, _FASTER_TOWER))
    if bound == ASSIGNMENT:
        return Verdict(bound, (said, _faster_assignment(machine)))
    kept = 1 - shares[DECODING]
    needed = 1 / kept if kept > 0 else math.inf
    return Verdict(bound, (said, *_faster_loading(machine, needed, "--workers ")))


_PHRASES = {TOWER: "the tower", DECODING: "decoding and resizing", ASSIGNMENT: "the search for the nearest centroid"}
_FASTER_TOWER = (
    "A smaller --image-size of the tower helps most; --precision bfloat16 and a larger --batch-size help on a GPU. "
    "The first two give other tokens, and a codebook of their own."
)


def tokenizing_shares(machine: Machine) -> dict[str, float]:
    """Shares of the time of an image: the tower, the assignment, and the rest, which is decoding and resizing.

    They add up to 1: if the parts alone took longer than all of it, their shares are of the parts.
    """
    tower, assignment = 1 / machine.tower, 1 / machine.assignment
    whole = max(1 / machine.encode, tower + assignment)
    return {
        TOWER: tower / whole,
        ASSIGNMENT: assignment / whole,
        DECODING: max(0.0, whole - tower - assignment) / whole,
    }


def _shared_time(machine: Machine) -> list[str]:
    if machine.device != "cpu":
        return []
    share = machine.step / (machine.loader + machine.step)
    if share < _WORTH_SAYING:
        return []
    return [f"Both run on the same cores: loading takes {share:.0%} of the time."]


def _faster_step(machine: Machine) -> list[str]:
    tries = [] if machine.compiled else ["--set execution.compile=true"]
    if machine.precision == "float32":
        tries.append("--set train.precision=bfloat16")
    far = machine.share_of_limit < _FAR_FROM_LIMIT
    if far and machine.device == "cuda":
        tries.append("a larger --batch-size")
    said = f"The step does {machine.share_of_limit:.0%} of the FLOP/s of a large matrix product."
    advice = f"Compare with {_listed(tries)}" if tries else "Nothing that keeps the model is left to set"
    return [said, f"{advice}; a smaller model, model.image_size or objective.query_rows is less work."]


def _faster_loading(machine: Machine, factor: float, option: str) -> list[str]:
    """What helps where images arrive too slowly by `factor`."""
    smaller = "Store the images smaller: decoding takes time in proportion to their pixels."
    if machine.device == "cpu":
        if machine.workers or machine.cores == 1:
            return [smaller]
        return [f"Compare with {option}1, which decodes beside the model. {smaller}"]
    needed = max(machine.workers, 1) * factor * _SPARE
    wanted = math.ceil(min(needed, machine.cores))
    if wanted > machine.workers:
        return [f"Set {option}{wanted} (now {machine.workers}, {machine.cores} cores). {smaller}"]
    return [f"All {machine.cores} cores decode already. {smaller}"]


def _faster_assignment(machine: Machine) -> str:
    gpu = machine.device == "cuda" and not machine.faiss_gpus
    build = "Install FAISS with GPU support (mapet doctor says how). " if gpu else ""
    return f"{build}A smaller --k of the codebook takes time in proportion."


def _times(factor: float) -> str:
    return f"{factor:,.0f} times" if factor >= 10 else f"{factor:.2g} times"


def _listed(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
