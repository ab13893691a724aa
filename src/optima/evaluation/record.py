"""The record of an evaluation, and its JSON file.

Infinite and undefined numbers are written as the strings ``"Infinity"`` and ``"NaN"``. ``null`` is what was not
measured, or a standard error of a single value.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic_core import to_json

from optima.errors import ModelError
from optima.files import explain_write_errors, write_whole
from optima.reporting.record import Int, Record, load_record

SCHEMA_VERSION = 2
EVALUATION_NAME = "evaluation.json"


@dataclass(frozen=True)
class Estimate(Record):
    """A mean and its standard error."""

    value: float
    stderr: float | None


@dataclass(frozen=True)
class PerplexityRecord(Record):
    """Perplexity on windows of text."""

    perplexity: float  # exp(loss)
    loss: Estimate  # mean negative log-likelihood of a next token, in nats; the standard error is over windows
    protocol: str
    windows: Int
    length: Int  # tokens in a window
    data_hash: str  # SHA-256 of the tokens
    dataset_revision: str | None = None  # commit of a hub dataset; None for several, and for local files

    @property
    def stderr(self) -> float | None:
        """Standard error of the perplexity, to first order."""
        return None if self.loss.stderr is None else self.perplexity * self.loss.stderr


@dataclass(frozen=True)
class DivergenceRecord(Record):
    """Difference of a model's predictions from the reference's, on the windows of the perplexity."""

    kl: Estimate  # mean over tokens of KL(reference || model), in nats; the standard error is over windows
    top1: Estimate  # fraction of tokens for which both predict the same next token; likewise


@dataclass(frozen=True)
class TaskRecord(Record):
    """Accuracy on one task of lm-eval, or on a group of tasks."""

    task: str
    items: Int
    metrics: dict[str, Estimate]  # acc, acc_norm, with lm-eval's standard errors
    correct: dict[str, str]  # metric -> "1" or "0" for each item in order, where the metric is a mean of those
    data_hash: str  # SHA-256 of lm-eval's hashes of the items


@dataclass(frozen=True)
class SpeedRecord(Record):
    """Tokens per second, one sequence at a time, with no other model at work."""

    prompt: Int  # tokens that are read
    new: Int  # tokens that are generated after them
    prefill: float  # tokens of the prompt per second
    decode: float | None  # generated tokens per second; None for a model that generates none


@dataclass(frozen=True)
class ModelRecord(Record):
    """What was measured of one model."""

    model: str
    revision: str | None  # commit of a hub model
    dtype: str
    seconds: float  # without loading
    perplexity: PerplexityRecord | None = None
    divergence: DivergenceRecord | None = None  # from the first model
    tasks: tuple[TaskRecord, ...] = ()
    speed: SpeedRecord | None = None


@dataclass(frozen=True)
class PairedRecord(Record):
    """Accuracy of a model minus that of the reference, on the same items."""

    task: str
    metric: str
    difference: float
    low: float  # of the 95% bootstrap interval of the difference
    high: float
    only_reference: Int  # items that only the reference answers correctly
    only_model: Int  # items that only the model answers correctly
    p_value: float  # McNemar's exact test, two-sided


@dataclass(frozen=True)
class ComparisonRecord(Record):
    """One model compared with the reference."""

    model: str
    loss_difference: Estimate | None  # loss minus the reference's, paired by window; None on other tokens
    tasks: tuple[PairedRecord, ...]


@dataclass(frozen=True)
class Evaluation(Record):
    """An evaluation of one or several models; the first is the reference."""

    settings: dict[str, Any]  # arguments of ``evaluate``
    versions: dict[str, str]  # library name -> version
    device: str
    created: str  # ISO 8601 in UTC
    models: tuple[ModelRecord, ...]
    comparisons: tuple[ComparisonRecord, ...] = ()  # of each model but the first
    schema_version: Int = SCHEMA_VERSION

    def save(self, path: str | Path) -> None:
        """Write the record to a file, atomically."""
        with explain_write_errors(Path(path), "free some space, or choose another --output"):
            write_whole(Path(path), to_json(self, indent=2, inf_nan_mode="strings") + b"\n")


def check_output(path: str | Path) -> None:
    """Raise ``ModelError`` if ``path`` exists or its directory does not."""
    file = Path(path)
    if file.is_dir() or not file.parent.is_dir():
        raise ModelError(f"--output {file} must name a file in a directory that exists")
    if file.exists():
        raise ModelError(f"{file} exists: delete it, or choose another --output")


def load_evaluation(path: str | Path) -> Evaluation:
    """Read a record from its file, or from the directory that holds ``evaluation.json``.

    Raises:
        OptimaError: as ``load_report``.
    """
    return load_record(path, Evaluation, EVALUATION_NAME, SCHEMA_VERSION)
