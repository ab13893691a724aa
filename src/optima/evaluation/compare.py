"""Paired comparison of two models on the same items. Shapes: N windows."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from scipy.stats import binomtest, bootstrap
from torch import Tensor

from optima.errors import ModelError
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
    if reference.data_hash != model.data_hash:
        raise ModelError(f"{reference.task}: the models answered other items, and cannot be compared")
    for metric in reference.correct.keys() & model.correct.keys():
        pairs = zip(reference.correct[metric], model.correct[metric], strict=True)
        change_N = np.array([int(b) - int(a) for a, b in pairs])
        only_reference, only_model = int((change_N < 0).sum()), int((change_N > 0).sum())
        difference = low = high = float(change_N.mean())
        if len(change_N) > 1:
            low, high = bootstrap(
                (change_N,),
                np.mean,
                n_resamples=RESAMPLES,
                batch=500,
                method="percentile",
                rng=np.random.default_rng(seed),
            ).confidence_interval
        discordant = only_reference + only_model
        p_value = float(binomtest(only_model, discordant).pvalue) if discordant else 1.0
        yield PairedRecord(
            reference.task, metric, difference, float(low), float(high), only_reference, only_model, p_value
        )
