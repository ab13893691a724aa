"""Allocations against the formulas of their papers."""

from __future__ import annotations

import pytest
import torch
from layers import hessian_of, layer_of, make_layer

from optima.allocation import Allocation, ByLoss, KeepDense, Owl, quantile_places, saliency_by_loss
from optima.build import build_allocation
from optima.linalg.statistics import Statistics
from optima.patterns import NM, Pattern, Unstructured
from optima.qp import Hessian
from optima.recipe import Recipe
from optima.selectors.base import LinearTask

HALF = Unstructured(0.5)


def observe(allocation: Allocation, block: int, task: LinearTask, pattern: Pattern) -> None:
    allocation.note(block, task.name, task.weight_OD.numel(), allocation.measure(task, pattern))


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
        observe(owl, block, task, HALF)
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


@pytest.mark.parametrize("allocation", [Owl(0.5), ByLoss(0.5)], ids=lambda each: type(each).__name__)
def test_linears_that_nothing_called(allocation: Owl | ByLoss) -> None:
    assert allocation.allocate() == {}


def test_alike_is_uniform() -> None:
    allocation = Owl(0.6)
    weight_OD, inputs_TD = make_layer()
    for block in range(3):
        observe(allocation, block, layer_of(weight_OD, inputs_TD, name=f"{block}"), HALF)
    sparsities = list(allocation.allocate().values())
    assert sum(sparsities) == pytest.approx(1.8, abs=1e-9)
    assert max(sparsities) - min(sparsities) < 1e-9


@pytest.mark.parametrize("sparsity", [0.005, 0.05, 0.97, 0.995])
def test_extreme_sparsities_stay_inside(sparsity: float) -> None:
    allocation = Owl(sparsity, spread=0.2)
    layers = make_layers()
    for block, task in layers:
        observe(allocation, block, task, HALF)
    found = allocation.allocate()
    assert all(0.0 < value < 1.0 for value in found.values())
    sizes = {task.name: task.weight_OD.numel() for _, task in layers}
    assert sum(found[n] * sizes[n] for n in sizes) == pytest.approx(sparsity * sum(sizes.values()), abs=1e-6)


def test_linears_that_carry_nothing() -> None:
    allocation = Owl(0.5)
    weight_OD, inputs_TD = make_layer()
    observe(allocation, 0, LinearTask("live", weight_OD, Statistics(hessian_of(inputs_TD))), HALF)
    observe(allocation, 1, LinearTask("dead", weight_OD, Statistics(Hessian(torch.zeros(48, 48)))), HALF)
    observe(allocation, 2, LinearTask("zero", torch.zeros_like(weight_OD), Statistics(hessian_of(inputs_TD))), HALF)
    found = allocation.allocate()
    assert sum(found.values()) == pytest.approx(1.5, abs=1e-9)


def test_defaults_are_the_published_ones() -> None:
    assert build_allocation(Recipe(sparsity=0.5)) == ByLoss(0.5, spread=0.1)
    assert build_allocation(Recipe(sparsity=0.5, selector="wanda")) == ByLoss(0.5, spread=0.1)
    for nothing_to_share in (
        {"objective": "sink"},
        {"solver": "none"},
        {"pattern": ["2:4"]},
        {"pattern": ["mlp=0.6", "0.5"]},
        {"allocation": "uniform"},
    ):
        assert build_allocation(Recipe(**nothing_to_share)) is None  # type: ignore[arg-type]
    assert build_allocation(Recipe(sparsity=0.7, allocation="owl")) == Owl(0.7, outlier_multiple=5.0, spread=0.08)


@pytest.mark.parametrize("count", [1, 1001, 2**24 + 2, 4096 * 11008, 8192 * 28672])
def test_quantiles_of_a_large_linear_are_inside(count: int) -> None:
    places = quantile_places(count)
    assert places[0] == 0
    assert places[-1] == count - 1
    assert bool((places.diff() >= 0).all())


def test_keep_dense_keeps_the_linears_that_lose_most_a_weight() -> None:
    """Against a loop over the groups in float64."""
    layers, allocation = make_layers(), KeepDense(0.5)
    for block, task in layers:
        observe(allocation, block, task, NM(2, 4))
    found = allocation.allocate()

    rates, sizes = {}, {task.name: task.weight_OD.numel() for _, task in layers}
    for _, task in layers:
        inverse_D = torch.linalg.inv(task.hessian.matrix_DD.double() + ridge(task)).diagonal()
        saliency_OD = task.weight_OD.double().square() / inverse_D
        lost = sum(float(group.sort().values[:2].sum()) for row in saliency_OD for group in row.split(4))
        rates[task.name] = lost / sizes[task.name]
    dense = {name for name, sparsity in found.items() if sparsity == 0.0}
    assert {found[name] for name in found if name not in dense} == {0.5}
    assert dense
    left = 0.5 * sum(sizes.values()) - sum(sizes[name] for name in dense)
    assert left >= 0
    for name in found.keys() - dense:  # what would still fit is worth less than all that stayed
        assert sizes[name] > left or rates[name] <= min(rates[own] for own in dense)


def ridge(task: LinearTask) -> torch.Tensor:
    matrix_DD = task.hessian.matrix_DD.double()
    return task.hessian.damping * matrix_DD.diagonal().mean() * torch.eye(len(matrix_DD), dtype=torch.float64)


def test_keep_dense_weighs_rows_by_the_loss() -> None:
    allocation = KeepDense(0.5)
    weight_OD, inputs_TD = make_layer(16, 32)
    for name, weight in {"felt": 5.0, "not felt": 1.0}.items():
        rows_O = torch.full((16,), weight)
        task = LinearTask(name, weight_OD, Statistics(hessian_of(inputs_TD)), row_weight_O=rows_O)
        observe(allocation, 0, task, NM(2, 4))
    assert allocation.allocate() == {"felt": 0.0, "not felt": 0.5}


@pytest.mark.parametrize("spread", [0.4, 0.05])
def test_by_loss_is_one_threshold_cut_at_the_spread(spread: float) -> None:
    allocation, layers = ByLoss(0.5, spread), make_layers()
    for block, task in layers:
        observe(allocation, block, task, HALF)
    found = allocation.allocate()
    own = {}
    for _, task in layers:
        inverse_D = torch.linalg.inv(task.hessian.damped_DD).diagonal()
        own[task.name] = (task.weight_OD.square() / inverse_D).flatten()
    limit = torch.cat(list(own.values())).median()
    shares = {name: float((score_N <= limit).double().mean()) for name, score_N in own.items()}
    shift = [found[name] - min(max(share, 0.5 - spread), 0.5 + spread) for name, share in shares.items()]
    assert max(shift) - min(shift) < 5e-3
    total = sum(map(len, own.values()))
    assert sum(found[name] * len(score_N) for name, score_N in own.items()) == pytest.approx(0.5 * total)
    assert max(shares.values()) - min(shares.values()) > 0.1, "a spread of 0.05 cuts some"


def test_keep_dense_goes_by_the_loss_of_a_weight_not_of_a_linear() -> None:
    allocation = KeepDense(0.7)
    for name, rows, felt in (("large", 16, 3.0), ("small", 8, 5.0)):
        weight_OD, inputs_TD = make_layer(16, 32)
        task = LinearTask(
            name, weight_OD[:rows], Statistics(hessian_of(inputs_TD)), row_weight_O=torch.full((rows,), felt)
        )
        allocation.note(0, name, task.weight_OD.numel(), allocation.measure(task, NM(2, 4)))
    assert allocation.allocate() == {"large": 0.5, "small": 0.0}


def test_quantiles_of_a_sample_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose rows differ, the last from the first."""
    weight_OD, inputs_TD = make_layer(96, 48)
    task = layer_of(weight_OD * torch.linspace(0.1, 3.0, 96)[:, None], inputs_TD)
    whole_Q = ByLoss(0.5).measure(task, Unstructured(0.5))
    monkeypatch.setattr("optima.allocation.SAMPLE", 1024)
    sample_Q = ByLoss(0.5).measure(task, Unstructured(0.5))
    assert float((sample_Q <= whole_Q[500]).double().mean()) == pytest.approx(0.5, abs=0.03)


def test_the_loss_feels_no_weight_of_a_dead_input() -> None:
    task = layer_of(*make_layer(8, 32, dead=(3, 7)))
    saliency_OD = saliency_by_loss(task)
    assert not saliency_OD[:, [3, 7]].any()
    assert bool((saliency_OD.sum(dim=0) > 0).sum() == 30)


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 4), NM(3, 4)], ids=str)
def test_keep_dense_loses_what_its_pattern_takes(pattern: NM) -> None:
    task = layer_of(*make_layer(16, 32))
    saliency_OD = task.weight_OD.square() / torch.linalg.inv(task.hessian.damped_DD).diagonal()
    expected = saliency_OD.reshape(-1, 4).sort(dim=1).values[:, : 4 - pattern.n].sum()
    lost, sparsity = KeepDense(0.5).measure(task, pattern)
    assert (float(lost), float(sparsity)) == (pytest.approx(float(expected)), pattern.sparsity)


@pytest.mark.parametrize("sparsity", [0.3, 0.7])
def test_by_loss_takes_the_threshold_of_the_global_sparsity(sparsity: float) -> None:
    allocation, layers = ByLoss(sparsity, spread=0.3), make_layers()
    for block, task in layers:
        observe(allocation, block, task, HALF)
    own = {
        t.name: (t.weight_OD.square() / torch.linalg.inv(t.hessian.damped_DD).diagonal()).flatten() for _, t in layers
    }
    limit = torch.cat(list(own.values())).quantile(sparsity)
    shares = {name: float((score_N <= limit).double().mean()) for name, score_N in own.items()}
    found = allocation.allocate()
    shift = [found[name] - min(max(share, sparsity - 0.3), sparsity + 0.3) for name, share in shares.items()]
    assert max(shift) - min(shift) < 5e-3
