"""Errors that end a command with one sentence instead of a traceback, and with an exit code."""


class MapetError(Exception):
    """An expected failure: the message names the file or option, says what is wrong and what to do; exit code 1."""

    exit_code = 1


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
