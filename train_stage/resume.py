"""May a run go on from the checkpoint that its folder holds? Only with what it was begun with."""

from pathlib import Path
from typing import Any

from ..shared.errors import DataError, FingerprintMismatch, UsageError
from ..shared.token_store import TokenStore
from .checkpoint import newest_checkpoint, read_state
from .data import TokenisedImages
from .interchange import load_weights
from .settings import Settings

RESUME = ("auto", "never")


def find_resumable(out: Path, resume: str, settings: Settings, store: TokenStore) -> Path | None:
    """The checkpoint in `out` to go on from, or None.

    Raises UsageError if `resume` forbids it, or settings or stored views differ that change what is computed,
    FingerprintMismatch if the tokens are of another codebook.
    """
    if resume not in RESUME:
        raise UsageError(f"--resume {resume} is unknown; choose {' or '.join(RESUME)}.")
    last = newest_checkpoint(out)
    if last is None:
        return None
    if resume == "never":
        raise UsageError(f"{out} already holds a run; choose another --out, or --resume auto to go on with it.")
    before = read_state(last)
    if before["codebook_fingerprint"] != store.fingerprint:
        raise FingerprintMismatch(
            f"{out} was trained on tokens of codebook {before['codebook_fingerprint'][:12]} and {store.path} holds "
            f"tokens of {store.fingerprint[:12]}; give the same tokens or another --out."
        )
    view = before.get("view", store.view)
    if view != store.view:
        raise UsageError(
            f"{out} was begun with the views {view} of each image and {store.path} now has {store.view}; "
            "give tokens with the same views or another --out."
        )
    changed = _differences(before["settings"], settings.to_json())
    if changed:
        raise UsageError(
            f"{out} was begun with other settings ({'; '.join(changed)}); give the same ones or another --out."
        )
    return last


def refuse_other_images(last: Path, before: dict[str, Any], data: TokenisedImages) -> None:
    """Raises DataError unless `data` has the images that the run of this checkpoint, in state `before`, began with."""
    if before["keys_sha256"] != data.keys_sha256:
        raise DataError(
            f"{last} was trained on {before['images']} images and --images now gives {len(data)}, not the same ones; "
            "give the same images or another --out."
        )


# These change how a run is executed or written down, never what is computed.
_FREE_TO_CHANGE = {"data.workers", "train.log_every", "train.checkpoint_every", "train.keep_last"}
_FREE_GROUP = "execution"


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    return [
        f"{group}.{name} was {before.get(group, {}).get(name)} and is {value}"
        for group, values in now.items()
        if group != _FREE_GROUP
        for name, value in values.items()
        if before.get(group, {}).get(name) != value and f"{group}.{name}" not in _FREE_TO_CHANGE
    ]


def refuse_other_start(last: Path, before: dict[str, str] | None, init: str | Path | None) -> None:
    """Raises UsageError if `init` is given and is not what the run of this checkpoint started from (`before`)."""
    if init is not None and (before is None or before["sha256"] != load_weights(init).sha256()):
        began = f"from {before['file']}" if before else "from fresh weights"
        raise UsageError(f"{last} belongs to a run that started {began}, not from --init {init}; choose another --out.")
