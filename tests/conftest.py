"""Set before the libraries are imported: nothing reaches for a hub, and a process uses one thread if not told more."""

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A tokenizer that was used before a fork warns otherwise.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# The paper's solver is a peer of the benchmarks; it keeps the contract of ours.
sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import pytest
import torch
from hypothesis import settings

# The same examples in every run: a test that fails once in a hundred runs tells nothing about the change at hand.
settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def threads() -> None:
    """Those of ``make test THREADS=...``, whatever a benchmark of an earlier test set."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
