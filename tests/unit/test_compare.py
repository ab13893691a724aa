"""The paired comparison against independent computations, and the tables of an evaluation."""

import math

import pytest
import torch
from hypothesis import given, settings, strategies as st

from optima.evaluation.compare import compare
from optima.evaluation.record import (
    ComparisonRecord,
    Estimate,
    Evaluation,
    ModelRecord,
    PerplexityRecord,
    TaskRecord,
)  # fmt: skip
from optima.evaluation.table import render_evaluation


def answers(correct: str) -> TaskRecord:
    value = correct.count("1") / len(correct)
    return TaskRecord("piqa", len(correct), {"acc": Estimate(value, None)}, {"acc": correct}, "same")


@settings(max_examples=20, deadline=None)
@given(first=st.integers(0, 40), second=st.integers(0, 40), both=st.integers(1, 40))
def test_mcnemar_is_exact(first: int, second: int, both: int) -> None:
    reference, model = "1" * first + "0" * second + "1" * both, "0" * first + "1" * second + "1" * both
    (found,) = compare(answers(reference), answers(model))
    assert (found.only_reference, found.only_model) == (first, second)
    assert found.difference == pytest.approx((second - first) / len(reference))
    total = first + second  # a two-sided sign test on the discordant items
    tail = sum(math.comb(total, i) for i in range(min(first, second) + 1))
    assert found.p_value == pytest.approx(min(1.0, 2 * tail / 2**total), rel=1e-9)


def test_interval_agrees_with_drawing_items() -> None:
    items, lost, gained = 400, 60, 25
    change_N = torch.cat([-torch.ones(lost), torch.ones(gained), torch.zeros(items - lost - gained)])
    draws = torch.randint(items, (20_000, items), generator=torch.Generator().manual_seed(3))
    expected = change_N[draws].mean(dim=1).quantile(torch.tensor([0.025, 0.975])).tolist()
    reference = "".join("1" if change < 0 else "0" for change in change_N.tolist())
    model = "".join("1" if change > 0 else "0" for change in change_N.tolist())
    (found,) = compare(answers(reference), answers(model))
    assert [found.low, found.high] == pytest.approx(expected, abs=0.004)
    assert [found] == list(compare(answers(reference), answers(model))), "the seed decides"


def evaluation(*hashes: str) -> Evaluation:
    """Of dense, a, b, ... with perplexities 10, 20, 30, ..."""
    models = tuple(
        ModelRecord(
            name, None, "float32", 1.0,
            PerplexityRecord(10.0 * i, Estimate(3.0, 0.1), "windows", 2, 16, digest),
            tasks=(answers("1100" if i == 1 else "1010"),),
        )
        for i, (name, digest) in enumerate(zip(("dense", "a", "b"), hashes, strict=False), 1)
    )  # fmt: skip
    paired = tuple(compare(models[0].tasks[0], models[1].tasks[0]))
    comparisons = tuple(ComparisonRecord(each.model, Estimate(0.7, 0.02), paired) for each in models[1:])
    return Evaluation({}, {}, "cpu", "today", models, comparisons)


def test_tables() -> None:
    text = render_evaluation(evaluation("x", "x"))
    assert "Δ loss" in text
    assert "| a     |     20.000 | 2.000 | 0.7000 ± 0.0200 |" in text
    assert "| piqa | acc    |     4 | 50.00% | 50.00% |" in text
    assert "do not compare" not in text
    assert "b reads other tokens than dense: do not compare" in render_evaluation(evaluation("x", "x", "y"))
