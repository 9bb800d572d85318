"""Folders that look like a process's /proc and /sys/fs/cgroup on real systems."""

from pathlib import Path
from typing import NamedTuple


class Layout(NamedTuple):
    """A system's view of the cgroup of one controller.

    Attributes:
        membership: lines of /proc/self/cgroup.
        mountinfo: lines of /proc/self/mountinfo.
        folders: the visible cgroups: the process's own and its ancestors, innermost first.
        version: 1 or 2.
    """

    membership: str
    mountinfo: str
    folders: list[str]
    version: int


def _mount(kind: str, point: str, root: str = "/", options: str = "rw") -> str:
    return f"31 23 0:28 {root} {point} rw,relatime shared:9 - {kind} {kind} {options}\n"


def layouts(controller: str) -> dict[str, Layout]:
    """All layouts for one controller, `cpu` or `memory`."""
    both = {"cpu": "cpu,cpuacct", "memory": "memory"}[controller]
    v1 = f"/sys/fs/cgroup/{both}"
    v2 = "/sys/fs/cgroup"
    other = _mount("cgroup", "/sys/fs/cgroup/pids", options="rw,pids") + _mount("proc", "/proc")
    return {
        "v2, a systemd unit": Layout(
            "0::/system.slice/stepwise.service\n",
            _mount("cgroup2", v2) + other,
            [f"{v2}/system.slice/stepwise.service", f"{v2}/system.slice", v2],
            2,
        ),
        "v2, a container with a namespace": Layout("0::/\n", _mount("cgroup2", v2), [v2], 2),
        "v2, a cgroup in a container": Layout(
            "0::/job/7\n", _mount("cgroup2", v2), [f"{v2}/job/7", f"{v2}/job", v2], 2
        ),
        "v2, the host's mount seen from a namespace": Layout("0::/\n", _mount("cgroup2", v2, "/../.."), [v2], 2),
        "v2, a cgroup that is gone": Layout(
            "0::/a/b (deleted)\n", _mount("cgroup2", v2), [f"{v2}/a/b (deleted)", f"{v2}/a", v2], 2
        ),
        "v2, a blank in a path": Layout(
            "0::/a b\n", _mount("cgroup2", "/mnt/c\\040g"), ["/mnt/c g/a b", "/mnt/c g"], 2
        ),
        "v1, a host": Layout(
            f"9:pids:/user\n4:{both}:/kubepods/pod1/c2\n",
            other + _mount("cgroup", v1, options=f"rw,{both}"),
            [f"{v1}/kubepods/pod1/c2", f"{v1}/kubepods/pod1", f"{v1}/kubepods", v1],
            1,
        ),
        "v1, a container without a namespace": Layout(
            f"4:{both}:/docker/abc/worker\n",
            _mount("cgroup", v1, "/docker/abc", f"rw,{both}"),
            [f"{v1}/worker", v1],
            1,
        ),
        "v1, beside a v2 without the controller": Layout(
            f"4:{both}:/a\n0::/\n",
            _mount("cgroup", v1, options=f"rw,{both}") + _mount("cgroup2", f"{v2}/unified"),
            [f"{v1}/a", v1],
            1,
        ),
        "v1, mounted twice": Layout(
            f"4:{both}:/a/b\n",
            _mount("cgroup", "/elsewhere", "/a/b", f"rw,{both}") + _mount("cgroup", v1, options=f"rw,{both}"),
            [f"{v1}/a/b", f"{v1}/a", v1],
            1,
        ),
    }


def write(root: Path, layout: Layout) -> Path:
    """Write a layout's /proc below `root`, and the folders of its visible cgroups."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(layout.membership)
    (root / "proc/self/mountinfo").write_text(layout.mountinfo)
    for folder in layout.folders:
        if "(deleted)" not in folder:
            (root / folder[1:]).mkdir(parents=True, exist_ok=True)
    return root
