"""Paired comparison of two models on the same items. Shapes: N windows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from scipy.stats import binomtest, bootstrap
from torch import Tensor

from optima.evaluation.record import Estimate, PairedRecord, TaskRecord

RESAMPLES = 10_000


def estimate(values_N: Tensor) -> Estimate:
    """Mean and standard error of the mean; a single value has none."""
    stderr = None if len(values_N) < 2 else values_N.std().item() / math.sqrt(len(values_N))
    return Estimate(values_N.mean().item(), stderr)


def compare(reference: TaskRecord, model: TaskRecord, seed: int = 0) -> Iterator[PairedRecord]:
    """The accuracy of ``model`` minus that of ``reference`` on the same items, metric by metric.

    The p-value is McNemar's exact test: of the items that exactly one model answers correctly, each is equally likely
    to be either's under the null hypothesis. The interval is the 95% percentile bootstrap over items.
    """
    assert reference.data_hash == model.data_hash, "not the same items"
    for metric in reference.correct.keys() & model.correct.keys():
        change = [int(b) - int(a) for a, b in zip(reference.correct[metric], model.correct[metric], strict=True)]
        only_reference, only_model = change.count(-1), change.count(1)
        difference = (only_model - only_reference) / len(change)
        low, high = _interval(change, seed) if len(change) > 1 else (difference, difference)
        discordant = only_reference + only_model
        yield PairedRecord(
            task=reference.task,
            metric=metric,
            difference=difference,
            low=low,
            high=high,
            only_reference=only_reference,
            only_model=only_model,
            p_value=float(binomtest(only_model, discordant).pvalue) if discordant else 1.0,
        )


def _interval(change: Sequence[int], seed: int) -> tuple[float, float]:
    generator = np.random.default_rng(seed)
    options: dict[str, Any] = {"n_resamples": RESAMPLES, "batch": 500, "method": "percentile", "rng": generator}
    low, high = bootstrap((change,), np.mean, **options).confidence_interval
    return float(low), float(high)
