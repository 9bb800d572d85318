"""The cgroups that this process is in, v1 and v2, and their limits. Where the system does not tell, there is none.

A limit binds all cgroups below the one that has it, so those of the process's own cgroup and of every ancestor count.
What is above the root of a cgroup namespace, or of a mount, cannot be seen.
"""

import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import NamedTuple

ROOT = Path("/")


class Cgroup(NamedTuple):
    """A cgroup that limits this process.

    Attributes:
        folder: with its files.
        version: 1 or 2, which decides their names.
    """

    folder: Path
    version: int


class _Mount(NamedTuple):
    root: PurePosixPath  # the cgroup that is seen at the mount point
    point: PurePosixPath
    version: int


def found(controller: str, root: Path = ROOT) -> list[Cgroup]:
    """The process's own cgroup and its ancestors, the innermost first.

    Args:
        controller: as `cpu` or `memory`.
        root: the folder with `proc` and with what is mounted.
    """
    try:
        memberships = (root / "proc/self/cgroup").read_text().splitlines()
        mounts = (root / "proc/self/mountinfo").read_text().splitlines()
    except (OSError, ValueError):
        return []
    # The two versions may be mounted side by side; a controller is then in one of them.
    return [
        Cgroup(root / folder.relative_to("/"), version)
        for version, path in _memberships(memberships, controller)
        for folder in _folders(path, [mount for mount in _mounts(mounts, controller) if mount.version == version])
    ]


def cores(root: Path = ROOT) -> float | None:
    """The tightest CPU quota, in cores; None without one."""
    quotas = []
    for folder, version in found("cpu", root):
        with suppress(OSError, ValueError, ZeroDivisionError):
            if version == 2:
                quota, period = (folder / "cpu.max").read_text().split()
            else:
                quota, period = ((folder / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
            if quota != "max" and int(quota) > 0:
                quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def _memberships(lines: list[str], controller: str) -> Iterator[tuple[int, PurePosixPath]]:
    """The version and the path of each cgroup of the process. Lines are `4:cpu,cpuacct:/path`, or v2's `0::/path`."""
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            yield 2, PurePosixPath(path)
        elif controller in controllers.split(","):
            yield 1, PurePosixPath(path)


def _mounts(lines: list[str], controller: str) -> Iterator[_Mount]:
    """Where hierarchies with a controller are mounted. See proc_pid_mountinfo(5)."""
    for line in lines:
        before, _, after = line.partition(" - ")
        kind, _, options = after.split(" ", 2)
        root, point = (PurePosixPath(_unescaped(field)) for field in before.split(" ")[3:5])
        if kind == "cgroup2":
            yield _Mount(root, point, 2)
        elif kind == "cgroup" and controller in options.split(","):
            yield _Mount(root, point, 1)


def _unescaped(field: str) -> str:
    """A field of mountinfo, where a blank is \\040."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)


def _folders(path: PurePosixPath, mounts: list[_Mount]) -> list[PurePosixPath]:
    """The folders of a cgroup and of its ancestors, as far as a mount shows them.

    A container may see a mount whose root is not above its path: both are then told from different places, and the
    mount point is the best that is known.
    """
    above = [mount for mount in mounts if path.is_relative_to(mount.root)]
    if not above:
        return [mount.point for mount in mounts]
    mount = min(above, key=lambda mount: len(mount.root.parts))  # the one that shows the most ancestors
    own = mount.point / path.relative_to(mount.root)
    return [own, *(folder for folder in own.parents if folder.is_relative_to(mount.point))]
