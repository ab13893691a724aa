"""What options of a run there are: their names, their defaults, and how one is declared. No torch is imported here."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import field
from pathlib import Path
from typing import Any

# The names are here so that no method is imported to check one; a test holds them to the registries.
SELECTOR_NAMES = (
    "magnitude", "wanda", "ria", "sparsegpt", "thanos", "admm", "alps", "optima", "external",
)  # fmt: skip
UNDAMPED = ("magnitude", "wanda", "ria", "admm", "external")  # they look at no inverse of a hessian
SOLVER_NAMES = ("auto", "low-rank-cg", "cholesky", "none")
ALLOCATION_NAMES = ("uniform", "loss")
OBJECTIVES = ("loss", "sink", "plain")
DTYPES = ("auto", "float32", "bfloat16", "float16")
DEFAULT_SPARSITY = 0.5
LEARNING_RATE, EPOCHS = 4.5e-3, 2  # of tuning
EXPERT_TOKENS = 256
LEAST_SAMPLES = 128  # of calibration, as in the papers
FILES = (".txt", ".jsonl", ".json", ".parquet")  # how those that are local files end
CONFIGS = {"allenai/c4": "en"}  # of datasets with several configurations and no default
TOKENS_PER_INPUT = 32  # of the widest linear: with fewer, its hessian is that of the sample
DEMO_MODELS = ("gemma-3-270m", "smollm2-135m")
SINK_WEIGHT = 0.04  # 0.2 is as good where all sequences begin with BOS

GROUPS = {
    "mask": "which weights survive",
    "objective": "what is minimised",
    "solve": "what becomes of the survivors",
    "tuning": "gradient steps on a block's survivors",
    "calibration": "the text that decides",
    "model": "what is pruned, and how it is read",
    "run": "where it runs",
}


def is_file(name: str) -> bool:
    """Whether a data set is a local file, by its name or because it is there."""
    with suppress(OSError):  # a text in place of a name is too long for one
        return Path(name).suffix.lower() in FILES or Path(name).is_file()
    return False


def parse_hub_id(name: str) -> tuple[str, str | None, str | None]:
    """The id, the configuration and the revision in ``owner/name:config@revision``; the last two may be missing."""
    name, _, revision = name.partition("@")
    name, _, config = name.partition(":")
    return name, config or CONFIGS.get(name), revision or None


def option(group: str, default: Any, text: str, choices: Sequence[str] = (), shown: str | None = None) -> Any:
    """A field: its group and sentence of help, the names it takes, its default in words."""
    metadata = {"group": group, "help": text, "choices": tuple(choices), "shown": shown}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)
