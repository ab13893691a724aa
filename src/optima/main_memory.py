"""Main memory that a process may take: the machine's or, in a job or a container, what its control groups leave it.

Slurm, Docker and Kubernetes kill a process that takes more than its group may, however much the machine has.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

import psutil

GROUPS, OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")  # version 2 of cgroups(7)


def total_memory(groups: Path = GROUPS, own_groups: Path = OWN_GROUPS) -> int:
    """Bytes that a process could have if no other took any.

    Args:
        groups: where control groups are mounted.
        own_groups: names those of this process.
    """
    return min([int(psutil.virtual_memory().total), *(limit for limit, _ in _limits(groups, own_groups))])


def available_memory(groups: Path = GROUPS, own_groups: Path = OWN_GROUPS) -> int:
    """Bytes that are free, or could be at once. See ``total_memory``."""
    free = [limit - taken for limit, taken in _limits(groups, own_groups)]
    return max(min([int(psutil.virtual_memory().available), *free]), 0)


def _limits(groups: Path, own_groups: Path) -> Iterator[tuple[int, int]]:
    """What each group of this process may take, and takes; those above it too, whose limits hold as well."""
    with suppress(OSError):  # not Linux
        own = next((line[4:] for line in own_groups.read_text().splitlines() if line.startswith("0::/")), "")
        for inside in (PurePosixPath(own), *PurePosixPath(own).parents):
            folder = groups / inside
            with suppress(OSError, ValueError):  # the path may be that outside a container; "max" is no limit
                parts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                # The kernel gives up pages of files when asked.
                of_files = sum(int(parts.get(name, 0)) for name in ("inactive_file", "active_file"))
                taken = int((folder / "memory.current").read_text()) - of_files
                yield int((folder / "memory.max").read_text()), taken
