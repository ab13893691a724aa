"""Selectors against a few lines of float64 written from their papers, which share nothing with the package."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from layers import DAMPING, layer_of, make_layer
from torch import Tensor

from optima.errors import RecipeError
from optima.patterns import NM, Pattern, Unstructured
from optima.qp import Hessian
from optima.selectors.base import SELECTOR_NAMES, Selector, make_selector
from optima.selectors.magnitude import Magnitude
from optima.selectors.sparsegpt import SparseGPT
from optima.selectors.wanda import Wanda

PATTERNS = [
    Unstructured(0.5, "row"),
    Unstructured(0.5, "layer"),
    Unstructured(0.7, "row"),
    Unstructured(0.3, "layer"),
    Unstructured(0.6, "group", 16),
    Unstructured(0.45, "group", 20),
    NM(2, 4),
    NM(4, 8),
    NM(1, 4),
    NM(3, 8),
]


def lowest(score_RN: Tensor, count: int | list[int]) -> Tensor:
    """Mask of each row's ``count`` lowest scores, the first of equals first: plain Python, to be independent."""
    mask_RN = torch.zeros_like(score_RN, dtype=torch.bool)
    for row, score_N in enumerate(score_RN.tolist()):
        own = count if isinstance(count, int) else count[row]
        for index in sorted(range(len(score_N)), key=lambda i: (score_N[i], i))[:own]:
            mask_RN[row, index] = True
    return mask_RN


def steps(sparsity: float, sizes: list[int]) -> list[int]:
    """How many more weights are pruned of each size than of the one before, the first of which is 0."""
    return [round(sparsity * after) - round(sparsity * before) for before, after in pairwise(sizes)]


def row_counts(pattern: Unstructured, outputs: int, inputs: int) -> list[int]:
    return steps(pattern.sparsity, [row * inputs for row in range(outputs + 1)])


def group_edges(pattern: Unstructured, inputs: int) -> list[int]:
    return [*range(0, inputs, pattern.group_size if pattern.scope == "group" else inputs), inputs]


def plain_keep(score_OD: Tensor, pattern: Pattern) -> Tensor:
    outputs, inputs = score_OD.shape
    if isinstance(pattern, NM):
        return ~lowest(score_OD.reshape(-1, pattern.m), pattern.m - pattern.n).reshape(outputs, inputs)
    if pattern.scope == "row":
        return ~lowest(score_OD, row_counts(pattern, outputs, inputs))
    edges = group_edges(pattern, inputs)
    counts = steps(pattern.sparsity, [outputs * edge for edge in edges])
    groups = [score_OD[:, begin:end].reshape(1, -1) for begin, end in pairwise(edges)]
    masks = [lowest(group, count).reshape(outputs, -1) for group, count in zip(groups, counts, strict=True)]
    return ~torch.cat(masks, dim=1)


def plain_sparsegpt(weight_OD: Tensor, inputs_TD: Tensor, pattern: Pattern, blocksize: int) -> tuple[Tensor, Tensor]:
    """Optimal brain surgeon, column by column: the columns before j are fixed, the rest has the inverse Hessian
    inv(H[j:, j:]), inverted anew in every column. Removing w_j costs w_j^2 / inv_jj (up to a factor) and moves the
    columns from j by -w_j / inv_jj times its first row. A block's mask is chosen when the sweep reaches it.
    """
    weight_OD = weight_OD.clone()
    outputs, inputs = weight_OD.shape
    hessian_DD = inputs_TD.T @ inputs_TD / len(inputs_TD)
    dead = hessian_DD.diagonal() == 0
    hessian_DD += DAMPING * hessian_DD.diagonal()[~dead].mean() * torch.eye(inputs, dtype=torch.float64)
    hessian_DD[dead, dead] = 1
    weight_OD[:, dead] = 0
    inverses = [torch.linalg.inv(hessian_DD[j:, j:]) for j in range(inputs)]
    pruned_OD = torch.zeros_like(weight_OD, dtype=torch.bool)
    width = blocksize
    if isinstance(pattern, NM):
        width = pattern.m
    elif pattern.scope == "group":
        width = pattern.group_size
    for j in range(inputs):
        if j % width == 0:
            block = range(j, min(j + width, inputs))
            score_OB = torch.stack([weight_OD[:, i] ** 2 / inverses[i][0, 0] for i in block], dim=1)
            end = block[-1] + 1
            if isinstance(pattern, NM):
                pruned_OD[:, j:end] = lowest(score_OB, pattern.m - pattern.n)
            elif pattern.scope == "row":
                shares = [count / inputs for count in row_counts(pattern, outputs, inputs)]
                pruned_OD[:, j:end] = lowest(score_OB, [round(share * end) - round(share * j) for share in shares])
            else:
                (count,) = steps(pattern.sparsity, [outputs * j, outputs * end])
                pruned_OD[:, j:end] = lowest(score_OB.reshape(1, -1), count).reshape(outputs, -1)
        error_O = weight_OD[:, j] * pruned_OD[:, j] / inverses[j][0, 0]
        weight_OD[:, j:] -= error_O[:, None] * inverses[j][0]
        weight_OD[pruned_OD[:, j], j] = 0
    return ~pruned_OD, weight_OD


def loss(weight_OD: Tensor, dense_OD: Tensor, inputs_TD: Tensor) -> float:
    return float((inputs_TD @ (weight_OD.double() - dense_OD.double()).T).square().sum())


def check_counts(keep_OD: Tensor, pattern: Pattern) -> None:
    outputs, inputs = keep_OD.shape
    if isinstance(pattern, NM):
        assert (keep_OD.reshape(-1, pattern.m).sum(dim=1) == pattern.n).all()
        return
    assert (~keep_OD).sum() == round(pattern.sparsity * outputs * inputs)
    if pattern.scope == "row":
        assert (~keep_OD).sum(dim=1).tolist() == row_counts(pattern, outputs, inputs)
    if pattern.scope == "group":
        edges = group_edges(pattern, inputs)
        found = [int((~keep_OD[:, begin:end]).sum()) for begin, end in pairwise(edges)]
        assert found == steps(pattern.sparsity, [outputs * edge for edge in edges])


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_magnitude(pattern: Pattern) -> None:
    weight_OD, inputs_TD = make_layer()
    selection = Magnitude().select(layer_of(weight_OD, inputs_TD), pattern)
    assert torch.equal(selection.keep_OD, plain_keep(weight_OD.abs(), pattern))
    assert selection.weight_OD is None


@pytest.mark.parametrize("dead", [(), (0, 7, 8, 47)], ids=["live", "dead"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_wanda(pattern: Pattern, dead: tuple[int, ...]) -> None:
    """|W_ij| times the norm of input j over all tokens, compared within each output (or wider, if asked)."""
    weight_OD, inputs_TD = make_layer(dead=dead)
    selection = Wanda().select(layer_of(weight_OD, inputs_TD), pattern)
    norm_D = torch.stack([column.norm(p=2) for column in inputs_TD.T])
    assert torch.equal(selection.keep_OD, plain_keep(weight_OD.abs() * norm_D, pattern))
    assert selection.weight_OD is None


def test_wanda_ignores_damping() -> None:
    weight_OD, inputs_TD = make_layer()
    first, second = (Wanda().select(layer_of(weight_OD, inputs_TD, d), NM(2, 4)).keep_OD for d in (0.0, 1.0))
    assert torch.equal(first, second)


# Blocks as wide as the layer, wider, dividing it, and leaving a remainder; 12 is no multiple of 8.
@pytest.mark.parametrize("blocksize", [48, 128, 16, 12, 20, 1])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_sparsegpt(pattern: Pattern, blocksize: int) -> None:
    weight_OD, inputs_TD = make_layer()
    before = weight_OD.clone()
    selection = SparseGPT(blocksize).select(layer_of(weight_OD, inputs_TD), pattern)
    keep_OD, expected_OD = plain_sparsegpt(weight_OD, inputs_TD, pattern, blocksize)
    assert torch.equal(selection.keep_OD, keep_OD)
    assert selection.weight_OD is not None
    torch.testing.assert_close(selection.weight_OD, expected_OD, rtol=1e-9, atol=1e-9)
    assert (selection.weight_OD[~keep_OD] == 0).all()
    assert torch.equal(weight_OD, before), "the dense weight is the caller's"


@pytest.mark.parametrize("dead", [(0,), (3, 4, 5, 6, 40), tuple(range(16, 32))], ids=["first", "some", "a block"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_sparsegpt_with_dead_inputs(pattern: Pattern, dead: tuple[int, ...]) -> None:
    weight_OD, inputs_TD = make_layer(dead=dead)
    selection = SparseGPT(16).select(layer_of(weight_OD, inputs_TD), pattern)
    keep_OD, expected_OD = plain_sparsegpt(weight_OD, inputs_TD, pattern, 16)
    assert torch.equal(selection.keep_OD, keep_OD)
    assert selection.weight_OD is not None
    torch.testing.assert_close(selection.weight_OD, expected_OD, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_sparsegpt_block_of_one_row(pattern: Pattern) -> None:
    weight_OD, inputs_TD = make_layer(outputs=1, inputs=24)
    selection = SparseGPT(8).select(layer_of(weight_OD, inputs_TD), pattern)
    keep_OD, expected_OD = plain_sparsegpt(weight_OD, inputs_TD, pattern, 8)
    assert torch.equal(selection.keep_OD, keep_OD)
    torch.testing.assert_close(selection.weight_OD, expected_OD, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_sparsegpt_beats_its_mask_alone(pattern: Pattern) -> None:
    weight_OD, inputs_TD = make_layer()
    selection = SparseGPT(16).select(layer_of(weight_OD, inputs_TD), pattern)
    assert selection.weight_OD is not None
    masked = loss(weight_OD * selection.keep_OD, weight_OD, inputs_TD)
    assert loss(selection.weight_OD, weight_OD, inputs_TD) < 0.9 * masked


def test_published_settings() -> None:
    assert SparseGPT() == SparseGPT(blocksize=128)
    scopes = {name: make_selector(name).published_scope for name in SELECTOR_NAMES}
    assert scopes == {"magnitude": "layer", "wanda": "row", "sparsegpt": "group"}


def test_unknown_selector_lists_the_known() -> None:
    with pytest.raises(RecipeError, match="unknown selector 'wonda': known selectors are magnitude, wanda, sparsegpt"):
        make_selector("wonda")


SELECTORS: dict[str, Callable[[], Selector]] = {
    "magnitude": Magnitude,
    "wanda": Wanda,
    "sparsegpt": SparseGPT,
    "sparsegpt-16": lambda: SparseGPT(16),
}


@pytest.mark.parametrize("name", SELECTORS)
class TestEverySelector:
    @pytest.mark.parametrize("shape", [(7, 32), (32, 8), (3, 40), (1, 8)], ids=str)
    @pytest.mark.parametrize("pattern", [*PATTERNS, Unstructured(0.01), Unstructured(0.99, "layer")], ids=str)
    def test_exactly_the_pattern(self, name: str, pattern: Pattern, shape: tuple[int, int]) -> None:
        weight_OD, inputs_TD = make_layer(*shape, dead=(1,), dtype=torch.float32)
        selection = SELECTORS[name]().select(layer_of(weight_OD, inputs_TD), pattern)
        assert selection.keep_OD.dtype == torch.bool
        check_counts(selection.keep_OD, pattern)
        if selection.weight_OD is not None:
            assert selection.weight_OD.dtype == torch.float32
            assert selection.weight_OD.isfinite().all()

    @pytest.mark.parametrize("pattern", PATTERNS, ids=str)
    def test_float32_agrees_with_float64(self, name: str, pattern: Pattern) -> None:
        weight_OD, inputs_TD = make_layer(40, 64, dtype=torch.float32)
        layer = layer_of(weight_OD, inputs_TD)
        single = SELECTORS[name]().select(layer, pattern)
        double = SELECTORS[name]().select(replace(layer, weight_OD=weight_OD.double()), pattern)
        assert torch.equal(single.keep_OD, double.keep_OD)
        if single.weight_OD is not None and double.weight_OD is not None:
            torch.testing.assert_close(single.weight_OD.double(), double.weight_OD, rtol=1e-4, atol=1e-4)

    def test_same_input_same_bits(self, name: str) -> None:
        weight_OD, inputs_TD = make_layer(dtype=torch.float32)
        first, second = (SELECTORS[name]().select(layer_of(weight_OD, inputs_TD), NM(2, 4)) for _ in range(2))
        assert torch.equal(first.keep_OD, second.keep_OD)
        if first.weight_OD is not None and second.weight_OD is not None:
            assert torch.equal(first.weight_OD, second.weight_OD)

    def test_all_weights_equal_and_all_inputs_dead(self, name: str) -> None:
        layer = layer_of(torch.ones(4, 8), Hessian(torch.zeros(8, 8)))
        for pattern in (Unstructured(0.5), NM(2, 4)):
            check_counts(SELECTORS[name]().select(layer, pattern).keep_OD, pattern)
