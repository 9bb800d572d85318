"""Memory that this process holds, and may still take. If the system does not say, there is no limit."""

import math
import os
from contextlib import suppress
from pathlib import Path

from model.backends import cgroups
from model.backends.cgroups import Cgroup

# The files with limit and usage, and the field of memory.stat with cached file pages, such as the weights'. Those count
# as used, but the kernel frees them when memory runs short.
_LIMITS = {
    1: [("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")],
    2: [
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.high", "memory.current", "inactive_file"),  # above this limit the kernel slows the process down
    ],
}


def resident() -> int:
    """Bytes of memory that this process holds; 0 if the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def available(root: Path = cgroups.ROOT) -> float:
    """Bytes of memory that this process may still take: the least that the machine or a cgroup allows.

    Args:
        root: the folder that holds `proc` and the mounts.
    """
    left = math.inf
    with suppress(OSError, KeyError):
        left = int(_facts(root / "proc/meminfo")["MemAvailable:"]) * 1024
    return max(0, min([left, *map(_left, cgroups.found("memory", root))]))


def _left(cgroup: Cgroup) -> float:
    """Bytes that a cgroup still allows."""
    left = math.inf
    for limit, usage, idle in _LIMITS[cgroup.version]:
        with suppress(OSError, ValueError):
            most, held = ((cgroup.folder / name).read_text().strip() for name in (limit, usage))
            if most != "max":
                left = min(left, int(most) - int(held) + _cached(cgroup.folder / "memory.stat", idle))
    return left


def _cached(statistics: Path, idle: str) -> int:
    try:
        return int(_facts(statistics)[idle])
    except (OSError, KeyError):
        return 0


def _facts(path: Path) -> dict[str, str]:
    """The first word of each line → the second."""
    lines = (line.split() for line in path.read_text().splitlines())
    return {words[0]: words[1] for words in lines if len(words) > 1}
