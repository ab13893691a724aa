"""Layers that tests of selectors are run on, and masks in plain Python to compare with."""

from __future__ import annotations

from itertools import pairwise

import torch
from closeness import assert_close_in_norm, assert_masks_alike
from torch import Tensor

from optima.core import Hessian
from optima.patterns import NM, Pattern, Unstructured
from optima.selectors.base import LinearTask, Selection

DAMPING = 0.01
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


def make_layer(
    outputs: int = 20, inputs: int = 48, dead: tuple[int, ...] = (), dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """(weight_OD, inputs_TD): correlated inputs on scales that differ a hundredfold."""
    generator = torch.Generator().manual_seed(outputs * inputs)
    mixing_DD = torch.randn(inputs, inputs, generator=generator, dtype=torch.float64) / inputs**0.5
    inputs_TD = torch.randn(200, inputs, generator=generator, dtype=torch.float64) @ (torch.eye(inputs) + mixing_DD)
    inputs_TD *= torch.logspace(-1, 1, inputs, dtype=torch.float64)[torch.randperm(inputs, generator=generator)]
    inputs_TD[:, list(dead)] = 0
    weight_OD = torch.randn(outputs, inputs, generator=generator, dtype=torch.float64)
    return weight_OD.to(dtype), inputs_TD


def hessian_of(inputs_TD: Tensor, damping: float = DAMPING) -> Hessian:
    return Hessian(inputs_TD.T @ inputs_TD / len(inputs_TD), damping)


def layer_of(weight_OD: Tensor, inputs: Tensor | Hessian, damping: float = DAMPING, name: str = "linear") -> LinearTask:
    """A layer from its weight and its inputs (T x D), or their Hessian."""
    hessian = inputs if isinstance(inputs, Hessian) else hessian_of(inputs, damping)
    return LinearTask(name, weight_OD, hessian)


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


def check_alike(found: Selection, expected: Selection, eps: float, share: float = 0.01) -> None:
    """Masks differ in few entries; rows with the same mask have the same weights, up to ``eps`` of their norm."""
    assert_masks_alike(found.keep_OD, expected.keep_OD, share)
    assert (found.weight_OD is None) == (expected.weight_OD is None)
    if found.weight_OD is not None and expected.weight_OD is not None:
        same_O = (found.keep_OD == expected.keep_OD).all(dim=1)
        assert_close_in_norm(found.weight_OD[same_O], expected.weight_OD[same_O], eps)


def loss(weight_OD: Tensor, dense_OD: Tensor, inputs_TD: Tensor) -> float:
    return float((inputs_TD @ (weight_OD.double() - dense_OD.double()).T).square().sum())
