"""Errors that end a command with one sentence instead of a traceback."""


class MapetError(Exception):
    """An expected failure: its text names the file or option, what is wrong and what to do."""

    exit_code = 1


class DataError(MapetError):
    """Something on disk is missing, damaged or does not fit; exit code 1."""


class UsageError(MapetError):
    """An option or setting is wrong; exit code 2."""

    exit_code = 2


class FingerprintMismatch(DataError):
    """Two artifacts that must come from the same codebook do not; the text names both sides."""


class Interrupted(MapetError):
    """The user or the scheduler stopped the command; its text says how to go on."""

    exit_code = 130
