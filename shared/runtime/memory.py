"""How much memory and how many open files a command may use: memory as given, or most of what is free."""

import os
import re
import resource
from contextlib import suppress
from pathlib import Path

from ..errors import UsageError

_ENOUGH_FILES, _FEWEST_FILES = 4096, 64
_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([kKMGT]?i?)B?")


def memory_budget(memory: str | None) -> int:
    """Bytes of a size such as "800MB", "1GB", "8GiB" or "2.5G"; for None three quarters of the free memory.

    Raises UsageError if `memory` is not a valid size.
    """
    if memory is None:
        return free_bytes() * 3 // 4
    match = _SIZE.fullmatch(memory.strip())
    unit = match and (match[2] if match[2] != "K" else "k")
    if match is None or unit not in _UNITS or float(match[1]) <= 0:
        raise UsageError(f"--memory {memory} is not a valid size; give one such as 800MB, 1GB or 8GiB.")
    return int(float(match[1]) * _UNITS[unit])


def free_bytes() -> int:
    """Bytes that can be used without swapping, within the limit of this process's control group."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(fields["MemAvailable"].split()[0]) * 1024
        group = Path("/sys/fs/cgroup")
        free = min(free, int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    except (OSError, KeyError, ValueError):  # not Linux, or no limit ("max")
        pass
    return max(free, 0)


def allow_enough_files() -> None:
    """Lets a command open as many files as the system allows it without asking, up to `_ENOUGH_FILES`.

    Raises UsageError if those are too few for any command.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = _ENOUGH_FILES if hard == resource.RLIM_INFINITY else min(hard, _ENOUGH_FILES)
    if soft != resource.RLIM_INFINITY and soft < highest:
        with suppress(OSError, ValueError):  # some systems allow fewer than they say
            resource.setrlimit(resource.RLIMIT_NOFILE, (highest, hard))
            soft = highest
    if soft != resource.RLIM_INFINITY and soft < _FEWEST_FILES:
        raise too_few_files()


def too_few_files() -> UsageError:
    """The error of a process that cannot open another file."""
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return UsageError(
        f"This process may open {allowed} files at once, and that is too few; raise the limit (ulimit -n "
        f"{_ENOUGH_FILES}) or use fewer workers."
    )


def as_text(count: float) -> str:
    """A number of bytes for people: 1_500_000_000 -> "1.5 GB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
