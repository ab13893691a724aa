"""The typed record of an evaluation, and its file ``evaluation.json``: standard JSON, as ``report.json`` is.

A number that JSON cannot hold is written as the string ``"Infinity"``, ``"-Infinity"`` or ``"NaN"``. ``null`` means
that something was not measured, or that a standard error has too few values to be known.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic_core import to_json

from optima.errors import ModelError, OptimaError
from optima.models.files import explain_write_errors, write_whole
from optima.reporting.record import Int, Record, load_record

SCHEMA_VERSION = 1
EVALUATION_NAME = "evaluation.json"


@dataclass(frozen=True)
class Estimate(Record):
    """A mean and its standard error."""

    value: float
    stderr: float | None  # None where there is but one value


@dataclass(frozen=True)
class PerplexityRecord(Record):
    """Perplexity on windows of text."""

    perplexity: float  # exp(loss)
    loss: Estimate  # mean negative log-likelihood of a next token, in nats; the standard error is over windows
    protocol: str  # one of ``PROTOCOLS``
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
    """How far a model's predictions are from the reference's, on the windows of the perplexity."""

    kl: Estimate  # mean over tokens of KL(reference || model), in nats; the standard error is over windows
    top1: Estimate  # share of tokens for which both find the same next token likeliest; likewise


@dataclass(frozen=True)
class TaskRecord(Record):
    """Zero-shot accuracy on one task of lm-eval, or on a group of them."""

    task: str
    items: Int
    metrics: dict[str, Estimate]  # acc, acc_norm: shares of items, with lm-eval's standard errors
    correct: dict[str, str]  # metric whose items are right or wrong -> a character an item in their order, 1: right
    data_hash: str  # SHA-256 of lm-eval's hashes of the items
    cut: Int = 0  # choices behind a prompt that lost its beginning, for the model reads no more


@dataclass(frozen=True)
class ModelRecord(Record):
    """What was measured of one model."""

    model: str  # as given
    revision: str | None  # commit of a hub model; None if unknown
    fingerprint: str  # hash of its weights, as in a report
    dtype: str  # that it ran in
    seconds: float  # of measuring, loading left out
    perplexity: PerplexityRecord | None = None
    divergence: DivergenceRecord | None = None  # from the reference; the reference itself has none
    tasks: tuple[TaskRecord, ...] = ()


@dataclass(frozen=True)
class PairedRecord(Record):
    """Two models on the same items: accuracy of the model minus that of the reference."""

    task: str
    metric: str
    difference: float
    low: float  # of the bootstrap's 95% interval of the difference, over items
    high: float
    only_reference: Int  # items that only the reference has right
    only_model: Int  # items that only the model has right
    p_value: float  # McNemar's exact test, two-sided: that these two counts differ by chance


@dataclass(frozen=True)
class ComparisonRecord(Record):
    """One model compared with the reference."""

    model: str
    loss_difference: Estimate | None  # loss minus the reference's loss, paired by window; None on other tokens
    tasks: tuple[PairedRecord, ...]


@dataclass(frozen=True)
class Evaluation(Record):
    """The record of an evaluation of one or several models; the first is the reference."""

    settings: dict[str, Any]  # of ``EvaluationSettings``, as plain values
    versions: dict[str, str]  # library name -> version; lm_eval among them where there are tasks
    device: str
    created: str  # ISO 8601 in UTC
    models: tuple[ModelRecord, ...]
    comparisons: tuple[ComparisonRecord, ...] = ()  # of each model but the first, in their order
    schema_version: Int = SCHEMA_VERSION

    def save(self, path: str | Path) -> Path:
        """Write the record, whole or not at all, and return its file: ``path``, or ``evaluation.json`` in it.

        Raises:
            ModelError: if it cannot be written.
        """
        file = record_file(Path(path).expanduser())
        with explain_write_errors(file, "free some space, or choose another place"):
            write_whole(file, to_json(self, indent=2, inf_nan_mode="strings") + b"\n")
        return file


def record_file(path: Path) -> Path:
    """A record's file: ``path``, or ``evaluation.json`` in it."""
    return path / EVALUATION_NAME if path.is_dir() else path


def check_free(path: Path, overwrite: bool) -> None:
    """Raise ``ModelError`` if a record cannot be written to ``path``, its file or the directory of that."""
    file = record_file(path)
    if file.exists() and not overwrite:
        raise ModelError(f"{file} exists: replace it with --overwrite, or choose another place")
    if file.exists():
        try:
            load_evaluation(file)
        except OptimaError as error:
            raise ModelError(
                f"{file} is no earlier evaluation ({error}), and is not replaced: choose another place, or remove it"
            ) from error
    if not file.parent.is_dir():
        raise ModelError(f"{file.parent} is no directory: make it, or choose another place for {file.name}")
    if not os.access(file.parent, os.W_OK):
        raise ModelError(f"{file.parent} cannot be written to: choose another place for {file.name}")


def load_evaluation(path: str | Path) -> Evaluation:
    """Read a record from its file, or from the directory that holds ``evaluation.json``.

    Raises:
        OptimaError: as ``load_report``.
    """
    return load_record(path, Evaluation, EVALUATION_NAME, SCHEMA_VERSION)
