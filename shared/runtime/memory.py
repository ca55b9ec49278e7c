"""How much memory a command may use: the given amount, or most of the free memory."""

import os
import re
from pathlib import Path

from ..errors import UsageError

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


def as_text(count: float) -> str:
    """A number of bytes for people: 1_500_000_000 -> "1.5 GB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
