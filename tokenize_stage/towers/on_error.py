"""The meaning of --on-error."""

from ...shared.errors import UsageError

ON_ERROR = ("stop", "skip")


def skips(on_error: str) -> bool:
    """Whether --on-error says to leave out what cannot be read; UsageError for what it cannot say."""
    if on_error not in ON_ERROR:
        raise UsageError(f"--on-error {on_error} is unknown; choose {' or '.join(ON_ERROR)}.")
    return on_error == "skip"
