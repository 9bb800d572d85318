"""Memory: what this process holds, and what it may still take. Where the system does not tell, there is no limit."""

import math
import os
from contextlib import suppress
from pathlib import Path


def resident() -> int:
    """Bytes of memory that this process holds; 0 where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def available(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> float:
    """Bytes of memory that this process may still take: the machine's, and those of its cgroup, v2 or v1."""
    left = math.inf
    with suppress(OSError, KeyError):
        left = int(_facts(proc / "meminfo")["MemAvailable:"]) * 1024
    for limit, usage, statistics, idle in (
        ("memory.max", "memory.current", "memory.stat", "inactive_file"),
        (
            "memory/memory.limit_in_bytes",
            "memory/memory.usage_in_bytes",
            "memory/memory.stat",
            "total_inactive_file",
        ),
    ):
        try:
            most, held = ((cgroup / name).read_text().strip() for name in (limit, usage))
        except OSError:
            continue
        if most != "max":
            left = min(left, int(most) - int(held) + _cached(cgroup / statistics, idle))
    return max(0, left)


def _cached(statistics: Path, idle: str) -> int:
    """Bytes of files that were read, the weights' among them, which count as used and make room when there is need."""
    try:
        return int(_facts(statistics)[idle])
    except (OSError, KeyError):
        return 0


def _facts(path: Path) -> dict[str, str]:
    """The first two words of each line."""
    lines = (line.split() for line in path.read_text().splitlines())
    return {words[0]: words[1] for words in lines if len(words) > 1}
