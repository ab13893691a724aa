"""Two models on the same items or windows: is the difference more than chance?

Shapes: N windows, S bootstrap samples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from optima.evaluation.record import Estimate, PairedRecord, TaskRecord

SAMPLES = 10_000
CONFIDENCE = 0.95


def estimate(values_N: Tensor) -> Estimate:
    """Mean and standard error of the mean; none from a single value."""
    num_values = len(values_N)
    stderr = None if num_values < 2 else values_N.std().item() / math.sqrt(num_values)
    return Estimate(values_N.mean().item(), stderr)


def mcnemar(only_first: int, only_second: int) -> float:
    """P-value of McNemar's exact test, two-sided.

    Of the items that exactly one of two models has right, each is as likely the one's as the other's under the null
    hypothesis: the smaller count is binomial (McNemar, Psychometrika 1947; exact form: Edwards 1948).
    """
    total, fewer = only_first + only_second, min(only_first, only_second)
    # Whole numbers: exact for any count, and a quotient of two that float cannot hold is still one that it can.
    tail = ways = 1
    for i in range(fewer):
        ways = ways * (total - i) // (i + 1)
        tail += ways
    return min(1.0, float(2 * tail / 2**total))


def bootstrap_interval(items: int, only_first: int, only_second: int, seed: int) -> tuple[float, float]:
    """Percentile interval of the accuracy of the second model minus that of the first, items drawn with replacement.

    An item adds -1, 0 or 1 to the difference, so a draw of all items is a draw of how often each occurs.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(count_S: Tensor, share_S: Tensor) -> Tensor:
        return torch.binomial(count_S, share_S, generator=generator)

    whole_S = torch.full((SAMPLES,), float(items), dtype=torch.float64)
    gained_S = draw(whole_S, torch.full_like(whole_S, only_second / items))
    rest = items - only_second
    lost_S = draw(whole_S - gained_S, torch.full_like(whole_S, only_first / rest if rest else 0.0))
    tails = torch.tensor([(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], dtype=torch.float64)
    low, high = ((gained_S - lost_S) / items).quantile(tails).tolist()
    return low, high


def compare(reference: TaskRecord, model: TaskRecord, seed: int) -> Iterator[PairedRecord]:
    """The model against the reference on one task, metric by metric."""
    assert reference.data_hash == model.data_hash, "not the same items"
    for metric, first in reference.correct.items():
        if metric not in model.correct:
            continue  # shares of a point, which happened to be whole in the reference
        pairs = list(zip(first, model.correct[metric], strict=True))
        only_reference, only_model = pairs.count(("1", "0")), pairs.count(("0", "1"))
        low, high = bootstrap_interval(len(pairs), only_reference, only_model, seed)
        yield PairedRecord(
            task=reference.task,
            metric=metric,
            difference=(only_model - only_reference) / len(pairs),
            low=low,
            high=high,
            only_reference=only_reference,
            only_model=only_model,
            p_value=mcnemar(only_reference, only_model),
        )
