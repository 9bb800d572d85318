"""This process's cgroups, v1 and v2, and their limits. If the system does not say, there is no limit.

A limit holds for all cgroups below it, so the process's own cgroup and all its ancestors count. We cannot see above the
root of a cgroup namespace or of a mount.
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
        folder: holds its files.
        version: 1 or 2; the files' names depend on it.
    """

    folder: Path
    version: int


class _Mount(NamedTuple):
    root: PurePosixPath  # the cgroup at the mount point
    point: PurePosixPath
    version: int


def found(controller: str, root: Path = ROOT) -> list[Cgroup]:
    """The process's own cgroup and its ancestors, innermost first.

    Args:
        controller: for example `cpu` or `memory`.
        root: the folder that holds `proc` and the mounts.
    """
    try:
        memberships = (root / "proc/self/cgroup").read_text().splitlines()
        mounts = (root / "proc/self/mountinfo").read_text().splitlines()
    except (OSError, ValueError):
        return []
    # Both versions may be mounted; a controller is in one of them.
    return [
        Cgroup(root / folder.relative_to("/"), version)
        for version, path in _memberships(memberships, controller)
        for folder in _folders(path, [mount for mount in _mounts(mounts, controller) if mount.version == version])
    ]


def cores(root: Path = ROOT) -> float | None:
    """The smallest CPU quota, in cores; None without a quota."""
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
    """The version and path of each cgroup of the process. Lines are `4:cpu,cpuacct:/path`, or for v2 `0::/path`."""
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            yield 2, PurePosixPath(path)
        elif controller in controllers.split(","):
            yield 1, PurePosixPath(path)


def _mounts(lines: list[str], controller: str) -> Iterator[_Mount]:
    """The mounts of hierarchies with this controller. See proc_pid_mountinfo(5)."""
    for line in lines:
        before, _, after = line.partition(" - ")
        kind, _, options = after.split(" ", 2)
        root, point = (PurePosixPath(_unescaped(field)) for field in before.split(" ")[3:5])
        if kind == "cgroup2":
            yield _Mount(root, point, 2)
        elif kind == "cgroup" and controller in options.split(","):
            yield _Mount(root, point, 1)


def _unescaped(field: str) -> str:
    """A field of mountinfo, in which a space is \\040."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)


def _folders(path: PurePosixPath, mounts: list[_Mount]) -> list[PurePosixPath]:
    """The folders of a cgroup and its ancestors, as far as a mount shows them.

    In a container the path may not be below any mount's root, because they are relative to different namespaces. Then
    the mount points are the best we know.
    """
    above = [mount for mount in mounts if path.is_relative_to(mount.root)]
    if not above:
        return [mount.point for mount in mounts]
    mount = min(above, key=lambda mount: len(mount.root.parts))  # shows the most ancestors
    own = mount.point / path.relative_to(mount.root)
    return [own, *(folder for folder in own.parents if folder.is_relative_to(mount.point))]
