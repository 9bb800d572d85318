"""Quotas of the process's own cgroup and its ancestors, in folders written by the test."""

import itertools
from pathlib import Path

import pytest

from model.backends import cgroups
from tests.cgroup_files import Layout, layouts, write

LAYOUTS = layouts("cpu")
SYSTEMD = LAYOUTS["v2, a systemd unit"]
KUBERNETES = LAYOUTS["v1, a host"]

layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


def put_quota(folder: Path, version: int, quota: str, period: str = "100000") -> None:
    if version == 2:
        (folder / "cpu.max").write_text(f"{quota} {period}\n")
    else:
        (folder / "cpu.cfs_quota_us").write_text(quota + "\n")
        (folder / "cpu.cfs_period_us").write_text(period + "\n")


@layout
def test_the_own_cgroup_and_all_its_ancestors_are_found(layout: Layout, tmp_path: Path) -> None:
    found = cgroups.found("cpu", write(tmp_path, layout))
    seen = [cgroup for cgroup in found if cgroup.version == layout.version]
    assert seen == [(tmp_path / folder[1:], layout.version) for folder in layout.folders]


@layout
def test_a_quota_binds_wherever_it_is(layout: Layout, tmp_path: Path) -> None:
    """An ancestor's quota was ignored: a systemd unit on a host with 64 cores started 64 threads."""
    folders = [folder for folder in layout.folders if "(deleted)" not in folder]
    for i, folder in enumerate(folders):
        root = write(tmp_path / str(i), layout)
        put_quota(root / folder[1:], layout.version, "150000")
        assert cgroups.cores(root) == 1.5


@pytest.mark.parametrize("layout", [SYSTEMD, KUBERNETES])
def test_the_tightest_quota_counts(layout: Layout, tmp_path: Path) -> None:
    for i, quotas in enumerate(itertools.permutations(["400000", "150000", "800000"])):
        root = write(tmp_path / str(i), layout)
        for folder, quota in zip(layout.folders, quotas, strict=False):
            put_quota(root / folder[1:], layout.version, quota)
        assert cgroups.cores(root) == 1.5


@pytest.mark.parametrize("layout", [SYSTEMD, KUBERNETES])
@pytest.mark.parametrize(
    ("quota", "period", "cores"),
    [
        ("max", "100000", None),
        ("-1", "100000", None),
        ("0", "100000", None),
        ("50000", "50000", 1.0),
        ("1000", "100000", 0.01),
        ("200000", "0", None),  # the kernel never writes these
        ("many", "100000", None),
        ("", "", None),
    ],
)
def test_a_quota_is_that_over_its_period(
    layout: Layout, quota: str, period: str, cores: float | None, tmp_path: Path
) -> None:
    root = write(tmp_path, layout)
    put_quota(root / layout.folders[0][1:], layout.version, quota, period)
    assert cgroups.cores(root) == cores


def test_half_a_quota_is_none(tmp_path: Path) -> None:
    root = write(tmp_path, KUBERNETES)
    (root / KUBERNETES.folders[0][1:] / "cpu.cfs_quota_us").write_text("150000")
    assert cgroups.cores(root) is None


def test_other_controllers_quotas_do_not_count(tmp_path: Path) -> None:
    root = write(tmp_path, KUBERNETES)
    pids = root / "sys/fs/cgroup/pids/user"
    pids.mkdir(parents=True)
    put_quota(pids, 1, "100000")
    assert cgroups.cores(root) is None


def test_a_system_without_cgroups_has_no_quota(tmp_path: Path) -> None:
    assert cgroups.found("cpu", tmp_path) == []
    assert cgroups.cores(tmp_path) is None


def test_what_is_found_here_is_there() -> None:
    for controller in ("cpu", "memory"):
        for folder, _ in cgroups.found(controller):
            assert folder.is_absolute()
    assert cgroups.cores() is None or cgroups.cores() > 0  # type: ignore[operator]
