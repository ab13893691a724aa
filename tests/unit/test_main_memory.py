"""A job's memory is its control groups' where they have less than the machine."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from optima.main_memory import available_memory, total_memory

GIB = 2**30


def make_group(folder: Path, limit: int | str, taken: int, of_files: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{taken}\n")
    (folder / "memory.stat").write_text(f"inactive_file {of_files}\nactive_file {of_files}\nanon 7\n")


def groups_of(directory: Path, path: str) -> tuple[Path, Path]:
    """Where groups are mounted, and the file that names those of the process."""
    own = directory / "own"
    own.write_text(f"9:pids:/else\n0::{path}\n")
    return directory / "groups", own


@pytest.mark.parametrize("above", [False, True], ids=["its own limit", "the limit of the group above"])
def test_the_least_of_all_limits(above: bool, tmp_path: Path) -> None:
    where = groups_of(tmp_path, "/job_7/step_0")
    job = where[0] / "job_7"
    for folder, limit in zip((job, job / "step_0"), (GIB, "max") if above else ("max", GIB), strict=True):
        make_group(folder, limit, taken=GIB // 2, of_files=GIB // 16)  # twice a sixteenth can be given up
    assert total_memory(*where) == GIB
    assert available_memory(*where) == GIB - GIB // 2 + GIB // 8


def test_inside_a_container_the_path_is_of_outside(tmp_path: Path) -> None:
    where = groups_of(tmp_path, "/docker/1f2e")
    make_group(where[0], GIB, taken=2 * GIB, of_files=0)
    assert total_memory(*where) == GIB
    assert available_memory(*where) == 0


def test_without_groups_it_is_the_machines(tmp_path: Path) -> None:
    for where in (groups_of(tmp_path, "/"), (tmp_path / "none", tmp_path / "nothing")):
        assert total_memory(*where) == psutil.virtual_memory().total
        assert 0 < available_memory(*where) <= psutil.virtual_memory().total
