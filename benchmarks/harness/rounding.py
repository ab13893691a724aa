"""Rounding a pruned weight to whole multiples of a scale, its zeros held: to the nearest, or as the hessian says.

Shapes: O outputs, D inputs, G groups of inputs, B columns of one block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from optima.core.hessian import Hessian

BLOCK = 128  # columns whose change reaches the others in one product


def scales(weight_OD: Tensor, bits: int, group: int | None = None) -> Tensor:
    """Of each weight: its group's largest magnitude is the largest multiple."""
    groups_OGD = weight_OD.float().unflatten(1, (-1, group or weight_OD.shape[1]))
    scale_OG1 = groups_OGD.abs().amax(dim=2, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    return (scale_OG1 / _most(bits)).expand_as(groups_OGD).flatten(1)


def nearest(weight_OD: Tensor, scale_OD: Tensor, bits: int) -> Tensor:
    """What is zero stays zero."""
    return (weight_OD.float() / scale_OD).round().clamp(-_most(bits), _most(bits)) * scale_OD


def compensated(weight_OD: Tensor, scale_OD: Tensor, bits: int, hessian: Hessian) -> Tensor:
    """Column by column, each error made up for by the kept weights to come (GPTQ, arXiv 2210.17323, zeros held)."""
    upper_DD = hessian.inverse_factor_DD.float()
    keep_OD = weight_OD != 0
    left_OD = weight_OD.float().clone()
    for begin in range(0, left_OD.shape[1], BLOCK):
        block = slice(begin, begin + BLOCK)
        error_OB = torch.zeros_like(left_OD[:, block])
        for column in range(error_OB.shape[1]):
            at = begin + column
            was_O = left_OD[:, at].clone()
            left_OD[:, at] = nearest(was_O, scale_OD[:, at], bits)
            error_OB[:, column] = (was_O - left_OD[:, at]) / upper_DD[at, at]
            to_come = slice(at + 1, begin + BLOCK)
            left_OD[:, to_come] -= error_OB[:, column, None] * upper_DD[at, to_come] * keep_OD[:, to_come]
        left_OD[:, begin + BLOCK :] -= (error_OB @ upper_DD[block, begin + BLOCK :]) * keep_OD[:, begin + BLOCK :]
    return left_OD


def descended(
    weight_OD: Tensor, start_OD: Tensor, scale_OD: Tensor, bits: int, hessian: Hessian, passes: int = 3
) -> Tensor:
    """One kept weight of every row at a time at its best multiple, the others held (QuantEase, arXiv 2309.01885).

    Args:
        weight_OD: pruned, and not rounded.
        start_OD: rounded in some way.
        scale_OD: of each weight.
        bits: of the multiples.
        hessian: of the linear's inputs.
        passes: over all columns.

    Returns:
        Weights of shape (O, D) whose error under the damped hessian is at most that of ``start_OD``.
    """
    damped_DD = hessian.damped_DD.float()
    keep_OD = weight_OD != 0
    found_OD = start_OD.clone()
    for _ in range(passes):
        gradient_OD = (found_OD - weight_OD.float()) @ damped_DD  # anew, for rounding adds up
        for begin in range(0, found_OD.shape[1], BLOCK):
            block = slice(begin, begin + BLOCK)
            before_OB = found_OD[:, block].clone()
            for at in range(begin, min(begin + BLOCK, found_OD.shape[1])):
                best_O = nearest(found_OD[:, at] - gradient_OD[:, at] / damped_DD[at, at], scale_OD[:, at], bits)
                change_O = (best_O - found_OD[:, at]) * keep_OD[:, at]
                found_OD[:, at] += change_O
                gradient_OD[:, block] += change_O[:, None] * damped_DD[at, block]
            change_OB = found_OD[:, block] - before_OB
            gradient_OD[:, :begin] += change_OB @ damped_DD[block, :begin]
            gradient_OD[:, begin + BLOCK :] += change_OB @ damped_DD[block, begin + BLOCK :]
    return found_OD


def _most(bits: int) -> int:
    return 2 ** (bits - 1) - 1
