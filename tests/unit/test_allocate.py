"""Sparsity allocation against its formula."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, strategies as st
from layers import hessian_of, layer_of, make_layer

from optima.allocate import DENSEST, SPARSEST, SPREAD, allocate, saliency, saliency_quantiles, with_mean, with_shares
from optima.core import Hessian
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


@pytest.mark.parametrize(("sparsity", "spread"), [(0.5, 0.4), (0.5, 0.05), (0.3, 0.3), (0.7, 0.3)])
def test_one_threshold_cut_at_the_spread(sparsity: float, spread: float) -> None:
    layers = make_layers()
    found = shares_of(layers, sparsity, spread)
    own = {t.name: (t.weight_OD.square() / torch.linalg.inv(t.hessian.damped_DD).diagonal()).flatten() for t in layers}
    limit = torch.cat(list(own.values())).quantile(sparsity)
    shares = {name: float((score_N <= limit).double().mean()) for name, score_N in own.items()}
    shift = [found[name] - min(max(share, sparsity - spread), sparsity + spread) for name, share in shares.items()]
    assert max(shift) - min(shift) < 5e-3
    total = sum(map(len, own.values()))
    assert sum(found[name] * len(score_N) for name, score_N in own.items()) == pytest.approx(sparsity * total)
    assert spread > 0.05 or max(shares.values()) - min(shares.values()) > 0.1, "it cuts some"


def test_linears_without_influence_and_dead_inputs() -> None:
    weight_OD, inputs_TD = make_layer(dead=(3, 7))
    tasks = [
        layer_of(weight_OD, inputs_TD, name="live"),
        layer_of(weight_OD, Hessian(torch.zeros(48, 48)), name="dead"),
        layer_of(torch.zeros_like(weight_OD), inputs_TD, name="zero"),
    ]
    assert sum(shares_of(tasks, 0.5).values()) == pytest.approx(1.5, abs=1e-9)
    assert not saliency(tasks[0])[:, [3, 7]].any()
    assert allocate(0.5, {}, {}) == {}


def test_rows_that_the_loss_weighs_more_keep_more() -> None:
    weight_OD, inputs_TD = make_layer(16, 32)
    hessian = hessian_of(inputs_TD)
    tasks = [
        LinearTask(name, weight_OD, hessian, row_weight_O=torch.full((16,), weight))
        for name, weight in {"more": 5.0, "less": 1.0}.items()
    ]
    found = shares_of(tasks, 0.5)
    assert found["more"] < 0.45 < 0.55 < found["less"]


def test_each_linear_takes_its_share_and_keeps_its_scope() -> None:
    patterns = {"a": Unstructured(0.5, "layer"), "b": Unstructured(0.5, "group"), "c": NM(2, 4)}
    found = with_shares(patterns, {"a": 0.4, "c": 0.6})
    assert found == {"a": Unstructured(0.4, "layer"), "b": Unstructured(0.5, "group"), "c": NM(2, 4)}
    assert patterns["a"] == Unstructured(0.5, "layer"), "the mapping is another"


def test_quantiles_of_a_sample_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose rows differ, the last from the first."""
    weight_OD, inputs_TD = make_layer(96, 48)
    task = layer_of(weight_OD * torch.linspace(0.1, 3.0, 96)[:, None], inputs_TD)
    whole_Q = saliency_quantiles(task)
    monkeypatch.setattr("optima.allocate.SAMPLE", 1024)
    sample_Q = saliency_quantiles(task)
    assert float((sample_Q <= whole_Q[500]).double().mean()) == pytest.approx(0.5, abs=0.03)


@given(
    sizes=st.lists(st.integers(1, 10**9), min_size=1, max_size=8),
    mean=st.floats(0.001, 0.999),
    spread=st.floats(0.0, 2.0),
    seed=st.integers(0, 99),
)
def test_shares_have_the_mean_and_stay_inside_their_bounds(
    sizes: list[int], mean: float, spread: float, seed: int
) -> None:
    value_N = spread * torch.rand(len(sizes), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    size_N = torch.tensor(sizes, dtype=torch.float64)
    weight_N = size_N / size_N.sum()
    share_N = with_mean(value_N, size_N, mean)
    assert float(share_N @ weight_N) == pytest.approx(mean, abs=1e-12)
    assert min(DENSEST, mean) <= share_N.min()
    assert share_N.max() <= max(SPARSEST, mean)
    assert (share_N[value_N.argsort()].diff() >= 0).all()
    plain_N = value_N - float(value_N @ weight_N) + mean
    if plain_N.min() > DENSEST and plain_N.max() < SPARSEST:
        torch.testing.assert_close(share_N, plain_N, rtol=0, atol=1e-12)
