"""What a process holds in memory. Linux only."""

import re
from pathlib import Path
from typing import NamedTuple


class Held(NamedTuple):
    """Bytes of a process.

    Attributes:
        peak: the most that was resident so far.
        resident: now.
        mapped: of these, pages of files, which the system takes back where memory is short.
    """

    peak: int
    resident: int
    mapped: int


def held(pid: int | str = "self") -> Held:
    """What a process holds, by default this one."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = dict(re.findall(r"(VmHWM|VmRSS|RssFile):\s+(\d+) kB", status))
    return Held(*(1024 * int(found[name]) for name in ("VmHWM", "VmRSS", "RssFile")))


def peak_bytes() -> int:
    """The peak of this process's resident memory, in bytes."""
    return held().peak
