"""Allocations against the formulas of their papers, and the measured curves against all rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from layers import hessian_of, layer_of, make_layer

from optima.allocation import LeastError, Owl, error_curve, make_allocation
from optima.errors import RecipeError
from optima.linalg.statistics import Statistics
from optima.patterns import Unstructured
from optima.qp import Hessian, solve
from optima.selectors.base import LinearTask
from optima.selectors.ranking import top_scores


def make_layers() -> list[tuple[int, LinearTask]]:
    """Three blocks of two linears of different sizes; the weights have tails of different weight."""
    layers = []
    for block, power in enumerate((1.0, 3.0, 2.0)):
        for name, shape in {"a": (20, 48), "b": (31, 16)}.items():
            weight_OD, inputs_TD = make_layer(*shape)
            heavy_OD = weight_OD.sign() * weight_OD.abs() ** power
            layers.append((block, layer_of(heavy_OD, inputs_TD, name=f"{block}.{name}")))
    return layers


def test_owl() -> None:
    """Share of |W_ij| ||X_j|| beyond M times the block's mean, scaled to a width of 2 lambda and centred."""
    owl = Owl(0.6, outlier_multiple=3.0, spread=0.1)
    for block, task in make_layers():
        owl.observe(block, task)
    found = owl.allocate()

    ratios, sizes = [], []
    for block in range(3):
        scores = []
        for index, task in make_layers():
            if index == block:
                norm_D = (task.hessian.matrix_DD.diagonal() ** 0.5).tolist()
                scores += [abs(w) * n for row in task.weight_OD.tolist() for w, n in zip(row, norm_D, strict=True)]
        limit = 3.0 * sum(scores) / len(scores)
        ratios.append(sum(score > limit for score in scores) / len(scores))
        sizes.append(len(scores))
    scaled = [0.2 * (ratio - min(ratios)) / (max(ratios) - min(ratios)) for ratio in ratios]
    centre = sum(s * n for s, n in zip(scaled, sizes, strict=True)) / sum(sizes)
    for block in range(3):
        for name in "ab":
            assert found[f"{block}.{name}"] == pytest.approx(0.6 - (scaled[block] - centre), abs=1e-9)
    assert len(set(ratios)) == 3
    assert sorted(range(3), key=lambda block: ratios[block]) == sorted(range(3), key=lambda block: -found[f"{block}.a"])


@pytest.mark.parametrize("name", ["owl", "error"])
def test_alike_is_uniform(name: str) -> None:
    allocation = make_allocation(name, 0.6)
    assert allocation is not None
    weight_OD, inputs_TD = make_layer()
    for block in range(3):
        allocation.observe(block, layer_of(weight_OD, inputs_TD, name=f"{block}"))
    sparsities = list(allocation.allocate().values())
    assert sum(sparsities) == pytest.approx(1.8, abs=1e-9)
    assert max(sparsities) - min(sparsities) < 0.02, "equal linears differ by one step of the grid at most"


def true_error(task: LinearTask, sparsity: float) -> float:
    """Of all rows, Wanda's mask, solved to the end."""
    weight_OD, matrix_DD = task.weight_OD, task.hessian.matrix_DD
    keep_OD = top_scores(weight_OD.abs() * matrix_DD.diagonal().sqrt(), Unstructured(sparsity))
    change_OD = weight_OD - solve(task.hessian, weight_OD, keep_OD).weight_RD
    return float(((change_OD @ matrix_DD) * change_OD).sum() / ((weight_OD @ matrix_DD) * weight_OD).sum())


@pytest.mark.parametrize("dead", [(), (0, 5)], ids=["live", "dead"])
@pytest.mark.parametrize("rows", [32, 5000])
def test_error_curve(rows: int, dead: tuple[int, ...]) -> None:
    weight_OD, inputs_TD = make_layer(200, 48, dead)
    task = layer_of(weight_OD * torch.logspace(-2, 1, 200, dtype=torch.float64)[:, None], inputs_TD)
    sparsities = [0.4, 0.5, 0.6, 0.7]
    found = error_curve(task, sparsities, rows)
    # A share of 28.8 weights is 28 in some rows and 29 in others, not the same ones in the sample.
    assert found == pytest.approx([true_error(task, s) for s in sparsities], rel=0.1 if rows == 32 else 0.05)


@pytest.mark.parametrize("sparsity", [0.6, 0.7])
def test_least_error_lowers_the_sum(sparsity: float) -> None:
    layers = make_layers()
    allocation = LeastError(sparsity)
    for block, task in layers:
        allocation.observe(block, task)
    found = allocation.allocate()
    sizes = {task.name: task.weight_OD.numel() for _, task in layers}
    assert sum(found[n] * sizes[n] for n in sizes) == pytest.approx(sparsity * sum(sizes.values()), abs=1e-6)
    assert all(sparsity - 0.15 - 1e-9 <= value <= sparsity + 0.15 + 1e-9 for value in found.values())
    shared = sum(true_error(task, found[task.name]) for _, task in layers)
    uniform = sum(true_error(task, sparsity) for _, task in layers)
    assert shared < 0.97 * uniform


@pytest.mark.parametrize("sparsity", [0.005, 0.05, 0.97, 0.995])
@pytest.mark.parametrize("name", ["owl", "error"])
def test_extreme_sparsities_stay_inside(name: str, sparsity: float) -> None:
    allocation = make_allocation(name, sparsity, spread=0.2)
    assert allocation is not None
    layers = make_layers()
    for block, task in layers:
        allocation.observe(block, task)
    found = allocation.allocate()
    assert all(0.0 < value < 1.0 for value in found.values())
    sizes = {task.name: task.weight_OD.numel() for _, task in layers}
    assert sum(found[n] * sizes[n] for n in sizes) == pytest.approx(sparsity * sum(sizes.values()), abs=1e-6)


@pytest.mark.parametrize("name", ["owl", "error"])
def test_linears_that_carry_nothing(name: str) -> None:
    """Dead inputs or zero weights cost nothing: ``error`` prunes them as far as it may."""
    allocation = make_allocation(name, 0.5)
    assert allocation is not None
    weight_OD, inputs_TD = make_layer()
    allocation.observe(0, LinearTask("live", weight_OD, Statistics(hessian_of(inputs_TD))))
    allocation.observe(1, LinearTask("dead", weight_OD, Statistics(Hessian(torch.zeros(48, 48)))))
    allocation.observe(2, LinearTask("zero", torch.zeros_like(weight_OD), Statistics(hessian_of(inputs_TD))))
    found = allocation.allocate()
    assert sum(found.values()) == pytest.approx(1.5, abs=1e-9)
    if name == "error":
        assert found["live"] == pytest.approx(0.35)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "alps"}, "unknown allocation 'alps': known allocations are uniform, owl, error"),
        ({"name": "owl", "spread": 0.0}, "allocation_spread must be strictly between 0 and 1, got 0.0"),
        ({"name": "error", "spread": float("nan")}, "allocation_spread must be strictly between 0 and 1, got nan"),
        ({"name": "uniform", "spread": 0.1}, "allocation_spread is for allocation owl or error"),
        ({"name": "owl", "outlier_multiple": -1.0}, "outlier_multiple must be positive, got -1.0"),
    ],
)
def test_bad_values(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        make_allocation(**{"sparsity": 0.5} | options)
    assert message in str(caught.value)


def test_defaults_are_the_published_ones() -> None:
    assert make_allocation("uniform", 0.5) is None
    assert make_allocation("owl", 0.7) == Owl(0.7, outlier_multiple=5.0, spread=0.08)
    assert isinstance(make_allocation("error", 0.7), LeastError)
