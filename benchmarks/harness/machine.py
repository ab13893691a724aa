"""The machine that a script runs on: its name, its threads, its clock."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

Result = TypeVar("Result")


def machine(device: torch.device, threads: int) -> str:
    """What the figures were measured on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return f"{name}, {threads} threads, torch {torch.__version__}, Python {platform.python_version()}"


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def use_threads(threads: int) -> None:
    """Restrict this process (torch, and XLA if imported later) to ``threads`` cores."""
    if hasattr(os, "sched_setaffinity"):
        available = sorted(os.sched_getaffinity(0))
        if threads < len(available):
            os.sched_setaffinity(0, available[:threads])
    torch.set_num_threads(threads)


def timed(function: Callable[[], Result], device: torch.device) -> tuple[float, Result]:
    """Wall-clock seconds of a call, with the work that it queued on a GPU, and its result."""
    _synchronise(device)
    begin = time.perf_counter()
    result = function()
    _synchronise(device)
    return time.perf_counter() - begin, result


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
