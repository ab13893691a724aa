"""Sparsity allocation against its formula."""

from __future__ import annotations

import pytest
import torch
from layers import hessian_of, layer_of, make_layer

from optima.allocate import SPREAD, allocate, quantile_places, saliency, saliency_quantiles, with_shares
from optima.core import Hessian
from optima.core.statistics import Statistics
from optima.patterns import NM, Unstructured
from optima.selectors.base import LinearTask


def shares_of(tasks: list[LinearTask], sparsity: float, spread: float = SPREAD) -> dict[str, float]:
    sizes = {task.name: task.weight_OD.numel() for task in tasks}
    return allocate(sparsity, {task.name: saliency_quantiles(task) for task in tasks}, sizes, spread)


def make_layers() -> list[LinearTask]:
    """Three blocks of two linears of different sizes; the weights have tails of different weight."""
    layers = []
    for block, power in enumerate((1.0, 3.0, 2.0)):
        for name, shape in {"a": (20, 48), "b": (31, 16)}.items():
            weight_OD, inputs_TD = make_layer(*shape)
            heavy_OD = weight_OD.sign() * weight_OD.abs() ** power
            layers.append(layer_of(heavy_OD, inputs_TD, name=f"{block}.{name}"))
    return layers


def test_linears_that_nothing_called() -> None:
    assert allocate(0.5, {}, {}) == {}


def test_alike_is_uniform() -> None:
    weight_OD, inputs_TD = make_layer()
    sparsities = shares_of([layer_of(weight_OD, inputs_TD, name=f"{block}") for block in range(3)], 0.6).values()
    assert sum(sparsities) == pytest.approx(1.8, abs=1e-9)
    assert max(sparsities) - min(sparsities) < 1e-9


@pytest.mark.parametrize("sparsity", [0.005, 0.05, 0.97, 0.995])
def test_extreme_sparsities_stay_inside(sparsity: float) -> None:
    layers = make_layers()
    found = shares_of(layers, sparsity, spread=0.2)
    assert all(0.0 < value < 1.0 for value in found.values())
    sizes = {task.name: task.weight_OD.numel() for task in layers}
    assert sum(found[n] * sizes[n] for n in sizes) == pytest.approx(sparsity * sum(sizes.values()), abs=1e-6)


def test_linears_that_carry_nothing() -> None:
    weight_OD, inputs_TD = make_layer()
    live, dead = hessian_of(inputs_TD), Hessian(torch.zeros(48, 48))
    tasks = [
        LinearTask("live", weight_OD, Statistics(live)),
        LinearTask("dead", weight_OD, Statistics(dead)),
        LinearTask("zero", torch.zeros_like(weight_OD), Statistics(live)),
    ]
    assert sum(shares_of(tasks, 0.5).values()) == pytest.approx(1.5, abs=1e-9)


def test_rows_that_the_loss_weighs_more_keep_more() -> None:
    weight_OD, inputs_TD = make_layer(16, 32)
    statistics = Statistics(hessian_of(inputs_TD))
    tasks = [
        LinearTask(name, weight_OD, statistics, row_weight_O=torch.full((16,), weight))
        for name, weight in {"more": 5.0, "less": 1.0}.items()
    ]
    found = shares_of(tasks, 0.5)
    assert found["more"] < 0.45 < 0.55 < found["less"]


def test_each_linear_takes_its_share_and_keeps_its_scope() -> None:
    patterns = {"a": Unstructured(0.5, "layer"), "b": Unstructured(0.5, "group"), "c": NM(2, 4)}
    found = with_shares(patterns, {"a": 0.4, "c": 0.6})
    assert found == {"a": Unstructured(0.4, "layer"), "b": Unstructured(0.5, "group"), "c": NM(2, 4)}
    assert patterns["a"] == Unstructured(0.5, "layer"), "the mapping is another"


@pytest.mark.parametrize("count", [1, 1001, 2**24 + 2, 4096 * 11008, 8192 * 28672])
def test_quantiles_of_a_large_linear_are_inside(count: int) -> None:
    places = quantile_places(count)
    assert places[0] == 0
    assert places[-1] == count - 1
    assert bool((places.diff() >= 0).all())


@pytest.mark.parametrize("spread", [0.4, 0.05])
def test_by_loss_is_one_threshold_cut_at_the_spread(spread: float) -> None:
    layers = make_layers()
    found = shares_of(layers, 0.5, spread)
    own = {}
    for task in layers:
        inverse_D = torch.linalg.inv(task.hessian.damped_DD).diagonal()
        own[task.name] = (task.weight_OD.square() / inverse_D).flatten()
    limit = torch.cat(list(own.values())).median()
    shares = {name: float((score_N <= limit).double().mean()) for name, score_N in own.items()}
    shift = [found[name] - min(max(share, 0.5 - spread), 0.5 + spread) for name, share in shares.items()]
    assert max(shift) - min(shift) < 5e-3
    total = sum(map(len, own.values()))
    assert sum(found[name] * len(score_N) for name, score_N in own.items()) == pytest.approx(0.5 * total)
    assert max(shares.values()) - min(shares.values()) > 0.1, "a spread of 0.05 cuts some"


def test_quantiles_of_a_sample_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose rows differ, the last from the first."""
    weight_OD, inputs_TD = make_layer(96, 48)
    task = layer_of(weight_OD * torch.linspace(0.1, 3.0, 96)[:, None], inputs_TD)
    whole_Q = saliency_quantiles(task)
    monkeypatch.setattr("optima.allocate.SAMPLE", 1024)
    sample_Q = saliency_quantiles(task)
    assert float((sample_Q <= whole_Q[500]).double().mean()) == pytest.approx(0.5, abs=0.03)


def test_the_loss_feels_no_weight_of_a_dead_input() -> None:
    task = layer_of(*make_layer(8, 32, dead=(3, 7)))
    saliency_OD = saliency(task)
    assert not saliency_OD[:, [3, 7]].any()
    assert bool((saliency_OD.sum(dim=0) > 0).sum() == 30)


@pytest.mark.parametrize("sparsity", [0.3, 0.7])
def test_by_loss_takes_the_threshold_of_the_global_sparsity(sparsity: float) -> None:
    layers = make_layers()
    own = {t.name: (t.weight_OD.square() / torch.linalg.inv(t.hessian.damped_DD).diagonal()).flatten() for t in layers}
    limit = torch.cat(list(own.values())).quantile(sparsity)
    shares = {name: float((score_N <= limit).double().mean()) for name, score_N in own.items()}
    found = shares_of(layers, sparsity, 0.3)
    shift = [found[name] - min(max(share, sparsity - 0.3), sparsity + 0.3) for name, share in shares.items()]
    assert max(shift) - min(shift) < 5e-3
