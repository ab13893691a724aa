"""What every selector owes its callers, for every pattern and scope."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from layers import PATTERNS, check_counts, layer_of, make_layer
from torch import Tensor

from optima.core import BatchedCholesky, solve
from optima.patterns import NM, Pattern, Unstructured
from optima.selectors.admm import ADMM
from optima.selectors.alps import ALPS
from optima.selectors.base import SELECTORS as REGISTRY, LinearTask, Selection, Selector
from optima.selectors.optima import Optima
from optima.selectors.scores import RIA, Magnitude, Wanda
from optima.selectors.sparsegpt import SparseGPT
from optima.selectors.thanos import Thanos


class CoupledOptima(Optima):
    """Where rows are known to go together, the nearer the more."""

    def select(self, task: LinearTask, pattern: Pattern) -> Selection:
        row_O = torch.arange(len(task.weight_OD), dtype=torch.float32)
        return super().select(replace(task, coupling_OO=0.5 ** (row_O - row_O[:, None]).abs()), pattern)


SELECTORS: dict[str, Callable[[], Selector]] = {
    "magnitude": Magnitude,
    "wanda": Wanda,
    "ria": RIA,
    "sparsegpt": SparseGPT,
    "sparsegpt-16": lambda: SparseGPT(16),
    "thanos": Thanos,
    "thanos-16": lambda: Thanos(16, 16),
    "admm": ADMM,
    "alps": ALPS,
    "optima": Optima,
    "optima-coupled": CoupledOptima,
}
# Their many iterations end in one of several masks that are as good.
MAGNIFY_ROUNDING = ("optima", "optima-coupled")
EXTREMES = [Unstructured(0.01), Unstructured(0.99, "layer")]
SHAPES = [(7, 32), (32, 8), (3, 40), (1, 8)]


def check(selection: Selection, task: LinearTask, pattern: Pattern) -> None:
    """Exact counts, a boolean mask, and finite weights of the layer's dtype, zero off the mask."""
    assert selection.keep_OD.dtype == torch.bool
    assert selection.keep_OD.shape == task.weight_OD.shape
    check_counts(selection.keep_OD, pattern)
    if selection.weight_OD is not None:
        assert selection.weight_OD.dtype == task.weight_OD.dtype
        assert selection.weight_OD.isfinite().all()
        assert not selection.weight_OD[~selection.keep_OD].any()


def check_as_good(first_OD: Tensor, second_OD: Tensor, task: LinearTask) -> None:
    assert (first_OD != second_OD).double().mean() < 0.01
    first, second = (
        solve(task.hessian, task.weight_OD.double(), keep_OD, solver=BatchedCholesky()).error_R.sum()
        for keep_OD in (first_OD, second_OD)
    )
    assert 0.995 < first / second < 1.005


def check_same(first: Selection, second: Selection, tolerance: float = 0.0) -> None:
    assert torch.equal(first.keep_OD, second.keep_OD)
    assert (first.weight_OD is None) == (second.weight_OD is None)
    if first.weight_OD is not None and second.weight_OD is not None:
        torch.testing.assert_close(first.weight_OD.double(), second.weight_OD.double(), rtol=tolerance, atol=tolerance)


def degenerate(kind: str) -> LinearTask:
    """Layers in which scores tie, vanish or cannot be told apart."""
    weight_OD, inputs_TD = make_layer(6, 16, dtype=torch.float32)
    if kind == "equal weights":
        weight_OD = torch.ones_like(weight_OD)
    elif kind == "rows of zeros":
        weight_OD[[0, 3]] = 0
    elif kind == "all zero":
        weight_OD = torch.zeros_like(weight_OD)
    elif kind == "columns of zeros":
        weight_OD[:, [1, 2, 3]] = 0
    elif kind == "dead inputs":
        inputs_TD[:, 4:9] = 0
    elif kind == "all inputs dead":
        inputs_TD = torch.zeros_like(inputs_TD)
    elif kind == "duplicated inputs":
        inputs_TD[:, 8:] = inputs_TD[:, :8]
    elif kind == "duplicated weights and inputs":
        inputs_TD[:, 8:], weight_OD[:, 8:] = inputs_TD[:, :8], weight_OD[:, :8]
    elif kind == "one token":
        inputs_TD = inputs_TD[:1]
    else:
        raise AssertionError(kind)
    return layer_of(weight_OD, inputs_TD)


def test_no_selector_is_left_out() -> None:
    """External masks have tests of their own."""
    assert {name.partition("-")[0] for name in SELECTORS} == set(REGISTRY)


DEGENERATE = [
    "equal weights", "rows of zeros", "all zero", "columns of zeros", "dead inputs", "all inputs dead",
    "duplicated inputs", "duplicated weights and inputs", "one token",
]  # fmt: skip


MOVING = {"sparsegpt", "thanos", "admm", "alps"}  # whose method finds weights beside the mask


@pytest.mark.parametrize("name", SELECTORS)
class TestEverySelector:
    @pytest.mark.parametrize("pattern", [*PATTERNS, *EXTREMES], ids=str)
    def test_exactly_the_pattern(self, name: str, pattern: Pattern) -> None:
        for shape in SHAPES:
            weight_OD, inputs_TD = make_layer(*shape, dead=(1,), dtype=torch.float32)
            task = layer_of(weight_OD, inputs_TD)
            check(SELECTORS[name]().select(task, pattern), task, pattern)

    @pytest.mark.parametrize("pattern", PATTERNS, ids=str)
    def test_degenerate_layers(self, name: str, pattern: Pattern) -> None:
        for kind in DEGENERATE:
            task = degenerate(kind)
            selector = SELECTORS[name]()
            selection = selector.select(task, pattern)
            check(selection, task, pattern)
            check_same(selection, selector.select(degenerate(kind), pattern))

    @pytest.mark.parametrize("pattern", PATTERNS, ids=str)
    def test_float32_agrees_with_float64(self, name: str, pattern: Pattern) -> None:
        weight_OD, inputs_TD = make_layer(40, 64, dtype=torch.float32)
        task = layer_of(weight_OD, inputs_TD)
        single = SELECTORS[name]().select(task, pattern)
        double = SELECTORS[name]().select(replace(task, weight_OD=weight_OD.double()), pattern)
        if name in MAGNIFY_ROUNDING:
            check_as_good(single.keep_OD, double.keep_OD, task)
        else:
            check_same(single, double, tolerance=1e-4)

    @pytest.mark.parametrize("pattern", PATTERNS, ids=str)
    def test_the_same_bits_whatever_the_strides_and_nothing_changed(self, name: str, pattern: Pattern) -> None:
        weight_OD, inputs_TD = make_layer(dtype=torch.float32)
        task = layer_of(weight_OD.clone(), inputs_TD)
        first = SELECTORS[name]().select(task, pattern)
        assert torch.equal(task.weight_OD, weight_OD), "the weight is the caller's"
        check_same(first, SELECTORS[name]().select(layer_of(weight_OD, inputs_TD, name="other"), pattern))
        transposed_OD, wide_OD = weight_OD.T.contiguous().T, weight_OD.repeat_interleave(2, dim=1)
        for other_OD in (transposed_OD, wide_OD[:, ::2]):
            found = SELECTORS[name]().select(layer_of(other_OD, inputs_TD), pattern)
            check_same(found, first, tolerance=1e-5)

    def test_numbers_on_another_scale(self, name: str) -> None:
        """Inputs a million times smaller: the same mask."""
        weight_OD, inputs_TD = make_layer(dtype=torch.float32)
        expected, found = (
            SELECTORS[name]().select(layer_of(weight_OD, scale * inputs_TD), NM(2, 4)) for scale in (1.0, 2.0**-20)
        )
        assert torch.equal(expected.keep_OD, found.keep_OD)

    def test_moved_weights_beat_the_mask_alone(self, name: str) -> None:
        weight_OD, inputs_TD = make_layer(40, 64)
        selection = SELECTORS[name]().select(layer_of(weight_OD, inputs_TD), Unstructured(0.5))
        assert (selection.weight_OD is not None) == (name.split("-")[0] in MOVING)
        if selection.weight_OD is not None:

            def loss(pruned_OD: Tensor) -> Tensor:
                return (inputs_TD @ (pruned_OD - weight_OD).T).norm()

            assert loss(selection.weight_OD) < 0.9 * loss(weight_OD * selection.keep_OD)
