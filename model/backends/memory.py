"""Memory: what this process holds, and what it may still take. Where the system does not tell, there is no limit."""

import math
import os
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
    try:
        facts = dict(line.split(":") for line in (proc / "meminfo").read_text().splitlines())
        left = int(facts["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        pass
    for limit, usage in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            most, held = ((cgroup / name).read_text().strip() for name in (limit, usage))
        except OSError:
            continue
        if most != "max":
            left = min(left, int(most) - int(held))
    return max(0, left)
