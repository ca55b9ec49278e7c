"""The values of --on-error."""

from ..errors import UsageError

ON_ERROR = ("stop", "skip")


def skips(on_error: str) -> bool:
    """Whether unreadable images are skipped. Raises UsageError unless `on_error` is "stop" or "skip"."""
    if on_error not in ON_ERROR:
        raise UsageError(f"--on-error {on_error} is unknown; choose {' or '.join(ON_ERROR)}.")
    return on_error == "skip"
