"""Main memory that a process may take: the machine's or, in a job or a container, what its control groups leave it.

Slurm, Docker and Kubernetes kill a process that takes more than its group may, however much the machine has.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

import psutil

GROUPS, OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")  # cgroups(7)
# Of both versions: limit, what is taken, and of that the pages of files, which the kernel gives up when asked.
UNIFIED = "memory.max", "memory.current", ("inactive_file", "active_file")
LEGACY = "memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")


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
        for line in own_groups.read_text().splitlines():
            _, kinds, path = line.split(":", 2)
            if kinds and "memory" not in kinds.split(","):
                continue
            root, names = (groups / "memory", LEGACY) if kinds else (groups, UNIFIED)
            inside = PurePosixPath(path.lstrip("/"))
            for folder in (inside, *inside.parents):
                with suppress(OSError, ValueError):  # the path may be that outside a container; "max" is no limit
                    yield _limit(root / folder, *names)


def _limit(folder: Path, limit: str, taken: str, of_files: tuple[str, ...]) -> tuple[int, int]:
    parts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    files = sum(int(parts.get(name, 0)) for name in of_files)
    return int((folder / limit).read_text()), int((folder / taken).read_text()) - files
