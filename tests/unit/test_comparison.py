"""The paired comparison against scipy, and against a bootstrap that draws the items themselves."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from optima.evaluation.comparison import bootstrap_interval, compare, estimate, mcnemar
from optima.evaluation.record import Estimate, TaskRecord


def answers(correct: str, data: str = "same") -> TaskRecord:
    return TaskRecord("piqa", len(correct), {"acc": Estimate(0.5, None)}, {"acc": correct}, data)


class TestMcNemar:
    @given(st.integers(0, 60), st.integers(0, 60))
    def test_is_the_exact_binomial_test(self, first: int, second: int) -> None:
        expected = binomtest(first, first + second).pvalue if first + second else 1.0
        assert mcnemar(first, second) == pytest.approx(expected, rel=1e-9)
        assert mcnemar(first, second) == mcnemar(second, first)

    def test_many_items(self) -> None:
        assert mcnemar(3000, 3200) == pytest.approx(binomtest(3000, 6200).pvalue, rel=1e-9)
        assert 0 <= mcnemar(0, 5000) < 1e-300


class TestBootstrap:
    def test_agrees_with_drawing_items(self) -> None:
        items, lost, gained = 400, 60, 25
        difference_N = torch.cat([-torch.ones(lost), torch.ones(gained), torch.zeros(items - lost - gained)])
        draws = torch.randint(items, (20_000, items), generator=torch.Generator().manual_seed(3))
        expected = difference_N[draws].mean(dim=1).quantile(torch.tensor([0.025, 0.975])).tolist()
        assert bootstrap_interval(items, lost, gained, seed=0) == pytest.approx(expected, abs=0.004)

    def test_seed_decides(self) -> None:
        first = bootstrap_interval(1000, 70, 50, seed=1)
        assert first == bootstrap_interval(1000, 70, 50, seed=1)
        assert first != bootstrap_interval(1000, 70, 50, seed=2)

    @pytest.mark.parametrize(("lost", "gained", "value"), [(0, 0, 0.0), (0, 9, 1.0), (9, 0, -1.0)])
    def test_no_doubt_no_interval(self, lost: int, gained: int, value: float) -> None:
        assert bootstrap_interval(9, lost, gained, seed=0) == (value, value)


def test_compare_counts_items() -> None:
    (found,) = compare(answers("1101100011"), answers("0111010000"), seed=0)
    assert (found.task, found.metric) == ("piqa", "acc")
    assert (found.only_reference, found.only_model) == (4, 2)
    assert found.difference == pytest.approx(-0.2)
    assert found.low <= found.difference <= found.high
    assert found.p_value == pytest.approx(binomtest(2, 6).pvalue)


def test_estimate_is_a_mean_and_its_standard_error() -> None:
    found = estimate(torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64))
    assert found.value == pytest.approx(3.0)
    assert found.stderr == pytest.approx(math.sqrt(7.0 / 3))
    assert estimate(torch.tensor([4.0])) == Estimate(4.0, None)
