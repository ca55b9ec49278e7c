"""Errors that end a command with one sentence instead of a traceback, and with an exit code."""

from .printable import printable


class MapetError(Exception):
    """An expected failure: the message names the file or option, says what is wrong and what to do; exit code 1.

    Messages often quote names and text from files; their control characters are shown as escapes (see `printable`).
    """

    exit_code = 1

    def __init__(self, message: str = "") -> None:
        super().__init__(printable(str(message)))


class DataError(MapetError):
    """A file or folder is missing, damaged or does not match; exit code 1."""


class UsageError(MapetError):
    """An option or setting is wrong; exit code 2."""

    exit_code = 2


class FingerprintMismatch(DataError):
    """Two artifacts come from different tokenizers; the message names both. Exit code 1."""


class Interrupted(MapetError):
    """The user or the scheduler stopped the command; the message says how to resume. Exit code 130."""

    exit_code = 130
