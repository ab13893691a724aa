"""Peak memory, measured on the device or, on a CPU, of the process."""

from __future__ import annotations

import contextlib
import resource
import sys
from pathlib import Path

import psutil
import torch

_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


class PeakMemory:
    """Highest memory in use on ``device`` since construction, in bytes.

    On a CPU this is the process's resident memory. Linux can restart its high-water mark; elsewhere, and where that is
    not permitted, it covers the life of the process.

    Attributes:
        baseline: in use at construction.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.baseline = torch.cuda.memory_allocated(device)
        else:
            with contextlib.suppress(OSError):
                _CLEAR_REFS.write_text("5")
            self.baseline = psutil.Process().memory_info().rss

    def peak(self) -> int:
        """The highest value until now."""
        return torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else _process_peak()


def _process_peak() -> int:
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
