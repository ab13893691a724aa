"""A job's memory is its control groups', of either version, where they have less than the machine."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from optima.main_memory import available_memory, total_memory

GIB = 2**30
FILES = {
    "v2": ("", ("memory.max", "memory.current"), "inactive_file {}\nactive_file {}\nanon 7\n"),
    "v1": (
        "memory",
        ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        "cache 9\ntotal_inactive_file {}\ntotal_active_file {}\n",
    ),
}


def make_group(folder: Path, version: str, limit: int | str, taken: int, of_files: int) -> None:
    _, names, stat = FILES[version]
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in zip(names, (limit, taken), strict=True):
        (folder / name).write_text(f"{value}\n")
    (folder / "memory.stat").write_text(stat.format(of_files, of_files))


def groups_of(directory: Path, version: str, path: str) -> tuple[Path, Path]:
    """Where groups are mounted, and the file that names those of the process."""
    own = directory / "own"
    own.write_text(f"9:pids:/else\n0::{path}\n" if version == "v2" else f"0::/\n4:cpu,memory:{path}\n3:cpuset:/\n")
    return directory / "groups", own


@pytest.mark.parametrize("version", FILES)
@pytest.mark.parametrize("above", [False, True], ids=["its own limit", "the limit of the group above"])
def test_the_least_of_all_limits(version: str, above: bool, tmp_path: Path) -> None:
    where = groups_of(tmp_path, version, "/job_7/step_0")
    job = where[0] / FILES[version][0] / "job_7"
    no_limit = "max" if version == "v2" else 2**63 - 4096
    limits = (GIB, no_limit) if above else (no_limit, GIB)
    for folder, limit in zip((job, job / "step_0"), limits, strict=True):
        make_group(folder, version, limit, taken=GIB // 2, of_files=GIB // 16)  # twice a sixteenth can be given up
    assert total_memory(*where) == GIB
    assert available_memory(*where) == GIB - GIB // 2 + GIB // 8


@pytest.mark.parametrize("version", FILES)
def test_inside_a_container_the_path_is_of_outside(version: str, tmp_path: Path) -> None:
    where = groups_of(tmp_path, version, "/docker/1f2e")
    make_group(where[0] / FILES[version][0], version, GIB, taken=2 * GIB, of_files=0)
    assert total_memory(*where) == GIB
    assert available_memory(*where) == 0


def test_without_groups_it_is_the_machines(tmp_path: Path) -> None:
    for where in (groups_of(tmp_path, "v2", "/"), (tmp_path / "none", tmp_path / "nothing")):
        assert total_memory(*where) == psutil.virtual_memory().total
        assert 0 < available_memory(*where) <= psutil.virtual_memory().total
