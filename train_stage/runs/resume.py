"""May a run go on from the checkpoint that its folder holds? Only with what it was begun with."""

from pathlib import Path
from typing import Any

from ...shared.errors import DataError, FingerprintMismatch, UsageError
from ...shared.tokens.store import TokenStore
from ..data.dataset import TokenisedImages
from ..settings import Settings
from ..weights.checkpoint import newest_checkpoint, newest_whole_checkpoint
from ..weights.read import load_weights

RESUME = ("auto", "never")


def find_resumable(out: Path, resume: str, settings: Settings, store: TokenStore) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint in `out` to go on from, and its state; or None.

    Raises UsageError if `resume` forbids it, or settings or stored views differ that change what is computed,
    FingerprintMismatch if the tokens are of another codebook.
    """
    if resume not in RESUME:
        raise UsageError(f"--resume {resume} is unknown; choose {' or '.join(RESUME)}.")
    if resume == "never" and newest_checkpoint(out):
        raise UsageError(f"{out} already holds a run; choose another --out, or --resume auto to go on with it.")
    found = newest_whole_checkpoint(out)
    if found is None:
        return None
    _, before = found
    if before["codebook_fingerprint"] != store.fingerprint:
        raise FingerprintMismatch(
            f"{out} was trained on tokens of codebook {before['codebook_fingerprint'][:12]} and {store.path} holds "
            f"tokens of {store.fingerprint[:12]}; give the same tokens or another --out."
        )
    view = before["view"]
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
    return found


def refuse_other_images(last: Path, before: dict[str, Any], data: TokenisedImages) -> None:
    """Raises DataError unless `data` has the images that the run of this checkpoint, in state `before`, began with."""
    if before["keys_sha256"] != data.keys_sha256:
        raise DataError(
            f"{last} was trained on {before['images']} images and --images now gives {len(data)}, not the same ones; "
            "give the same images or another --out."
        )


# These change how a run is executed or written down, never what is computed.
_FREE_TO_CHANGE = {
    *(f"data.{name}" for name in ("workers", "cache", "cache_gb")),
    *(f"train.{name}" for name in ("log_every", "log_keys", "checkpoint_every", "keep_last", "keep_every", "wandb")),
    # What is done about a bad step may be decided when one has come.
    *("train.on_bad_step", "train.spike"),
}
_FREE_GROUPS = ("execution", "probe")


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    return [
        f"{group}.{name} was {before.get(group, {}).get(name)} and is {value}"
        for group, values in now.items()
        if group not in _FREE_GROUPS
        for name, value in values.items()
        if before.get(group, {}).get(name) != value and f"{group}.{name}" not in _FREE_TO_CHANGE
    ]


def refuse_other_start(last: Path, before: dict[str, str] | None, init: str | Path | None) -> None:
    """Raises UsageError if `init` is given and is not what the run of this checkpoint started from (`before`)."""
    if init is not None and (before is None or before["sha256"] != load_weights(init).sha256()):
        began = f"from {before['file']}" if before else "from fresh weights"
        raise UsageError(f"{last} belongs to a run that started {began}, not from --init {init}; choose another --out.")
