"""Memory that this process may still take, by the machine and by cgroups, in folders made here."""

import math
import os
from pathlib import Path

import pytest

from model.backends.memory import available, resident
from tests.cgroup_files import Layout, layouts, write

MIB = 2**20
MEMINFO = f"""MemTotal:       {64 * 1024} kB
MemFree:        {1 * 1024} kB
MemAvailable:   {32 * 1024} kB
HugePages_Total:       0

a line: of: another kind
"""


LAYOUTS = layouts("memory")
V2 = LAYOUTS["v2, a systemd unit"]
V1 = LAYOUTS["v1, a host"]


def v2(most: str, held: int, statistics: str | None = None, high: str = "max") -> dict[str, str]:
    files = {"memory.max": f"{most}\n", "memory.high": f"{high}\n", "memory.current": f"{held}\n"}
    return files if statistics is None else files | {"memory.stat": statistics}


def v1(most: int, held: int, statistics: str | None = None) -> dict[str, str]:
    files = {"memory.limit_in_bytes": f"{most}\n", "memory.usage_in_bytes": f"{held}\n"}
    return files if statistics is None else files | {"memory.stat": statistics}


def machine(root: Path, layout: Layout, meminfo: str | None, *cgroups: dict[str, str]) -> Path:
    """Write the machine's memory, and the files of the cgroup and its ancestors, innermost first."""
    write(root, layout)
    if meminfo is not None:
        (root / "proc/meminfo").write_text(meminfo)
    for folder, files in zip(layout.folders, cgroups, strict=False):
        for name, text in files.items():
            (root / folder[1:] / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("meminfo", "layout", "files", "expected"),
    [
        (MEMINFO, V2, {}, 32 * MIB),
        ("", V2, {}, math.inf),
        ("MemTotal: 5 kB\n", V2, {}, math.inf),
        (None, V2, {}, math.inf),
        # v2
        (MEMINFO, V2, v2(str(10 * MIB), 4 * MIB), 6 * MIB),
        (None, V2, v2(str(10 * MIB), 4 * MIB), 6 * MIB),
        (None, V2, v2("max", 4 * MIB, high=str(10 * MIB)), 6 * MIB),
        (None, V2, v2(str(20 * MIB), 4 * MIB, high=str(10 * MIB)), 6 * MIB),
        (MEMINFO, V2, v2(str(100 * MIB), 4 * MIB), 32 * MIB),  # the machine has less than the cgroup allows
        (MEMINFO, V2, v2("max", 4 * MIB), 32 * MIB),
        (None, V2, v2("max", 4 * MIB), math.inf),
        (MEMINFO, V2, v2(str(10 * MIB), 11 * MIB), 0),  # above the limit, which was lowered afterwards
        (MEMINFO, V2, {"memory.max": "5"}, 32 * MIB),  # ignored without the other file
        (MEMINFO, V2, v2("much", 4 * MIB), 32 * MIB),
        # v1
        (MEMINFO, V1, v1(10 * MIB, 4 * MIB), 6 * MIB),
        (MEMINFO, V1, v1(9223372036854771712, 4 * MIB), 32 * MIB),  # v1's value for no limit
        (MEMINFO, V1, v1(10 * MIB, 11 * MIB), 0),
        # Cached files do not count
        (None, V2, v2(str(10 * MIB), 9 * MIB, f"anon 5\ninactive_file {3 * MIB}\nactive_file 7\n"), 4 * MIB),
        (None, V1, v1(10 * MIB, 9 * MIB, f"inactive_file 1\ntotal_inactive_file {2 * MIB}\n"), 3 * MIB),
        (None, V2, v2(str(10 * MIB), 9 * MIB, "anon 5\n"), 1 * MIB),
    ],
)
def test_available(meminfo: str | None, layout: Layout, files: dict[str, str], expected: float, tmp_path: Path) -> None:
    assert available(machine(tmp_path, layout, meminfo, files)) == expected


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_limit_binds_wherever_it_is(layout: Layout, tmp_path: Path) -> None:
    limit = v2(str(10 * MIB), 4 * MIB) if layout.version == 2 else v1(10 * MIB, 4 * MIB)
    folders = [folder for folder in layout.folders if "(deleted)" not in folder]
    for i in range(len(folders)):
        seen = layout._replace(folders=folders)
        root = machine(tmp_path / str(i), seen, MEMINFO, *({} for _ in range(i)), limit)
        assert available(root) == 6 * MIB


def test_each_limit_is_held_against_its_own_usage(tmp_path: Path) -> None:
    """An ancestor's usage includes all processes below it."""
    for i, (inner, outer) in enumerate([((10, 4), (100, 97)), ((10, 7), (100, 50))]):
        files = [v2(str(most * MIB), held * MIB) for most, held in (inner, outer)]
        assert available(machine(tmp_path / str(i), V2, None, *files)) == 3 * MIB


def test_what_is_available_here() -> None:
    assert available() > 0


def test_resident_grows_with_what_is_held() -> None:
    if not Path("/proc/self/statm").exists():
        assert resident() == 0
        return
    before = resident()
    held = os.urandom(64 * MIB)
    assert resident() - before > len(held) / 2
