"""The price of re-solving in a whole run: `optima prune` with Wanda alone and with Wanda + OPTIMA, as commands.

All else is alike: without an objective the second run would run the gradient pass too.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from harness.table import Claim

GOAL = 2.0


def wall_time(model: str, calibration: list[str], threads: int) -> Claim:
    """Two runs of 64 sequences of 512 tokens, 50 %, gap 1e-4, timed from start to exit."""
    seconds = {solver: _prune(model, calibration, solver, threads) for solver in ("none", "auto")}
    ratio = seconds["auto"] / seconds["none"]
    figure = f"{ratio:.2f}x: {seconds['none']:.1f} s and {seconds['auto']:.1f} s"
    return Claim(f"pruning {model} with Wanda + OPTIMA takes at most {GOAL:g}x Wanda alone", ratio <= GOAL, figure)


def _prune(model: str, calibration: list[str], solver: str, threads: int) -> float:
    with tempfile.TemporaryDirectory() as directory:
        command = [
            sys.executable, "-m", "optima", "prune", model, "--output-dir", str(Path(directory) / "pruned"),
            "--selector", "wanda", "--objective", "plain", "--solver", solver, "--gap", "1e-4",
            "--sparsity", "0.5", "--device", "cpu",
            "--num-calibration-samples", "64", "--max-seq-length", "512", "--dataset", *calibration,
        ]  # fmt: skip
        begin = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=_environment(threads))
        return time.perf_counter() - begin


def _environment(threads: int) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
