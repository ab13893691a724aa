"""What every selector owes its callers, for every pattern and scope."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from closeness import assert_masks_alike
from layers import PATTERNS, check_alike, check_counts, layer_of, make_layer
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
# Of the inputs' Hessian, about: what a solve in float32 loses.
CONDITION = 2.0**11
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
    assert_masks_alike(first_OD, second_OD)
    first, second = (
        solve(task.hessian, task.weight_OD.double(), keep_OD, solver=BatchedCholesky()).error_R.sum()
        for keep_OD in (first_OD, second_OD)
    )
    assert 0.995 < first / second < 1.005


def check_same(first: Selection, second: Selection) -> None:
    check_alike(first, second, eps=0.0, share=0.0)


def degenerate() -> list[LinearTask]:
    """Layers in which scores tie, vanish or cannot be told apart."""
    weight_OD, inputs_TD = make_layer(6, 16, dtype=torch.float32)
    twins_OD, twins_TD = (each[:, :8].repeat(1, 2) for each in (weight_OD, inputs_TD))
    kinds = {
        "equal weights": (torch.ones_like(weight_OD), inputs_TD),
        "rows of zeros": (weight_OD.index_fill(0, torch.tensor([0, 3]), 0.0), inputs_TD),
        "all zero": (torch.zeros_like(weight_OD), inputs_TD),
        "columns of zeros": (weight_OD.index_fill(1, torch.tensor([1, 2, 3]), 0.0), inputs_TD),
        "dead inputs": (weight_OD, inputs_TD.index_fill(1, torch.arange(4, 9), 0.0)),
        "all inputs dead": (weight_OD, torch.zeros_like(inputs_TD)),
        "duplicated inputs": (weight_OD, twins_TD),
        "duplicated weights and inputs": (twins_OD, twins_TD),
        "one token": (weight_OD, inputs_TD[:1]),
    }
    return [layer_of(*pair, name=kind) for kind, pair in kinds.items()]


def test_no_selector_is_left_out() -> None:
    """External masks have tests of their own."""
    assert {name.partition("-")[0] for name in SELECTORS} == set(REGISTRY)


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
        selector = SELECTORS[name]()
        for task, again in zip(degenerate(), degenerate(), strict=True):
            selection = selector.select(task, pattern)
            check(selection, task, pattern)
            check_same(selection, selector.select(again, pattern))

    @pytest.mark.parametrize("pattern", PATTERNS, ids=str)
    def test_float32_agrees_with_float64(self, name: str, pattern: Pattern) -> None:
        weight_OD, inputs_TD = make_layer(40, 64, dtype=torch.float32)
        task = layer_of(weight_OD, inputs_TD)
        single = SELECTORS[name]().select(task, pattern)
        double = SELECTORS[name]().select(replace(task, weight_OD=weight_OD.double()), pattern)
        check_as_good(single.keep_OD, double.keep_OD, task)
        check_alike(single, double, CONDITION)

    @pytest.mark.parametrize("pattern", PATTERNS, ids=str)
    def test_the_same_bits_again_alike_by_other_strides_and_nothing_changed(self, name: str, pattern: Pattern) -> None:
        weight_OD, inputs_TD = make_layer(dtype=torch.float32)
        task = layer_of(weight_OD.clone(), inputs_TD)
        first = SELECTORS[name]().select(task, pattern)
        assert torch.equal(task.weight_OD, weight_OD), "the weight is the caller's"
        check_same(first, SELECTORS[name]().select(layer_of(weight_OD, inputs_TD, name="other"), pattern))
        transposed_OD, wide_OD = weight_OD.T.contiguous().T, weight_OD.repeat_interleave(2, dim=1)
        for other_OD in (transposed_OD, wide_OD[:, ::2]):
            check_alike(SELECTORS[name]().select(layer_of(other_OD, inputs_TD), pattern), first, CONDITION)

    def test_numbers_on_another_scale(self, name: str) -> None:
        """Inputs a million times smaller: the same mask."""
        weight_OD, inputs_TD = make_layer(dtype=torch.float32)
        expected, found = (
            SELECTORS[name]().select(layer_of(weight_OD, scale * inputs_TD), NM(2, 4)) for scale in (1.0, 2.0**-20)
        )
        assert_masks_alike(found.keep_OD, expected.keep_OD)

    def test_moved_weights_beat_the_mask_alone(self, name: str) -> None:
        weight_OD, inputs_TD = make_layer(40, 64)
        selection = SELECTORS[name]().select(layer_of(weight_OD, inputs_TD), Unstructured(0.5))
        assert (selection.weight_OD is not None) == (name.split("-")[0] in MOVING)
        if selection.weight_OD is not None:

            def loss(pruned_OD: Tensor) -> Tensor:
                return (inputs_TD @ (pruned_OD - weight_OD).T).norm()

            assert loss(selection.weight_OD) < 0.9 * loss(weight_OD * selection.keep_OD)
