"""What may still be taken: of the machine's memory and of the cgroup's, from folders made here."""

import math
import os
from pathlib import Path

import pytest

from model.backends.memory import available, resident

MIB = 2**20
MEMINFO = f"""MemTotal:       {64 * 1024} kB
MemFree:        {1 * 1024} kB
MemAvailable:   {32 * 1024} kB
HugePages_Total:       0

a line: of: another kind
"""


def folder(path: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(text)
    return path


def v2(most: str, held: int, statistics: str | None = None) -> dict[str, str]:
    files = {"memory.max": f"{most}\n", "memory.current": f"{held}\n"}
    return files if statistics is None else files | {"memory.stat": statistics}


def v1(most: int, held: int, statistics: str | None = None) -> dict[str, str]:
    files = {"memory/memory.limit_in_bytes": f"{most}\n", "memory/memory.usage_in_bytes": f"{held}\n"}
    return files if statistics is None else files | {"memory/memory.stat": statistics}


@pytest.mark.parametrize(
    ("meminfo", "cgroup", "expected"),
    [
        (MEMINFO, {}, 32 * MIB),
        ("", {}, math.inf),
        ("MemTotal: 5 kB\n", {}, math.inf),
        (None, {}, math.inf),
        # v2
        (MEMINFO, v2(str(10 * MIB), 4 * MIB), 6 * MIB),
        (None, v2(str(10 * MIB), 4 * MIB), 6 * MIB),
        (MEMINFO, v2(str(100 * MIB), 4 * MIB), 32 * MIB),  # the machine has less than the cgroup allows
        (MEMINFO, v2("max", 4 * MIB), 32 * MIB),
        (None, v2("max", 4 * MIB), math.inf),
        (MEMINFO, v2(str(10 * MIB), 11 * MIB), 0),  # more than is allowed: a limit lowered afterwards
        (MEMINFO, {"memory.max": "5"}, 32 * MIB),  # without the other file it says nothing
        # v1
        (MEMINFO, v1(10 * MIB, 4 * MIB), 6 * MIB),
        (MEMINFO, v1(9223372036854771712, 4 * MIB), 32 * MIB),  # v1's word for no limit
        (MEMINFO, v1(10 * MIB, 11 * MIB), 0),
        # Both: the tighter counts
        (None, v2(str(10 * MIB), 4 * MIB) | v1(10 * MIB, 5 * MIB), 5 * MIB),
        # Files that were read make room
        (None, v2(str(10 * MIB), 9 * MIB, f"anon 5\ninactive_file {3 * MIB}\nactive_file 7\n"), 4 * MIB),
        (None, v1(10 * MIB, 9 * MIB, f"inactive_file 1\ntotal_inactive_file {2 * MIB}\n"), 3 * MIB),
        (None, v2(str(10 * MIB), 9 * MIB, "anon 5\n"), 1 * MIB),
    ],
)
def test_available(meminfo: str | None, cgroup: dict[str, str], expected: float, tmp_path: Path) -> None:
    proc = folder(tmp_path / "proc", {} if meminfo is None else {"meminfo": meminfo})
    assert available(proc, folder(tmp_path / "cgroup", cgroup)) == expected


def test_what_is_available_here() -> None:
    assert available() > 0


def test_resident_grows_with_what_is_held() -> None:
    if not Path("/proc/self/statm").exists():
        assert resident() == 0
        return
    before = resident()
    held = os.urandom(64 * MIB)
    assert resident() - before > len(held) / 2
