"""Sparsity allocation: one threshold over the whole model gives each linear its sparsity.

The saliency of a weight is r_o w_oi^2 / K_ii, K = H^-1: that of the optimal brain surgeon (Hassibi & Stork, 1993) in
units of the loss, see ``optima.calibration.fisher``. The share of a linear's weights below the threshold is cut at a
distance from the global sparsity, because the second-order loss of one linear knows nothing of what the others lose.
Then all shares move by one constant, so that their mean, weighted by the numbers of weights, is the global sparsity.

Shapes: O outputs, D inputs, N weights of a linear, L linears, Q quantiles.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from optima.core.products import sampling_step
from optima.patterns import Pattern, Unstructured
from optima.selectors.base import LinearTask

SPARSEST, DENSEST = 0.99, 0.01  # of a linear, however far the global sparsity and the spread reach
SPREAD = 0.1  # how far a share may depart from the global sparsity
QUANTILES = 1001  # of a linear's saliencies
SAMPLE = 2**18  # saliencies of a linear that they are taken of


def saliency_quantiles(task: LinearTask) -> Tensor:
    """Quantiles of the saliencies of a dense linear, or of a sample of them: float64, (Q,), in main memory."""
    saliency_N = saliency(task).flatten()
    sorted_N = saliency_N[:: sampling_step(len(saliency_N), SAMPLE)].sort().values
    # float32 knows no odd number beyond 2^24
    place_Q = torch.linspace(0, len(sorted_N) - 1, QUANTILES, dtype=torch.float64).round().long()
    return sorted_N[place_Q.to(sorted_N.device)].cpu()


def saliency(task: LinearTask) -> Tensor:
    """r_o w_oi^2 / K_ii: what the loss gains when a weight goes and the others of its row compensate; float64."""
    saliency_OD = task.weight_OD.double().square() / task.hessian.inverse_diagonal_D
    if task.row_weight_O is not None:
        saliency_OD = saliency_OD * task.row_weight_O.to(saliency_OD)[:, None]
    return saliency_OD.masked_fill(task.hessian.dead_D, 0.0)


def allocate(
    sparsity: float, quantiles: Mapping[str, Tensor], sizes: Mapping[str, int], spread: float = SPREAD
) -> dict[str, float]:
    """The sparsity of each linear.

    Args:
        sparsity: of all linears together.
        quantiles: ``saliency_quantiles`` of each linear, by its full name.
        sizes: numbers of weights.
        spread: most that a sparsity may differ from the global one, before all move by one constant.
    """
    if not quantiles:  # no linear was called
        return {}
    value_LQ = torch.stack(list(quantiles.values()))
    size_L = torch.tensor([sizes[name] for name in quantiles], dtype=torch.float64)
    # The quantiles of all linears, each for as many weights as lie between two.
    order = value_LQ.flatten().argsort()
    weight = size_L.repeat_interleave(QUANTILES)[order].cumsum(0)
    last = int(torch.searchsorted(weight, sparsity * float(weight[-1])).clamp_max(len(weight) - 1))
    below_L = (value_LQ <= value_LQ.flatten()[order[last]]).double().mean(dim=1)
    found_L = with_mean(below_L.clamp(sparsity - spread, sparsity + spread), size_L, sparsity)
    return dict(zip(quantiles, found_L.tolist(), strict=True))


def with_mean(value_L: Tensor, size_L: Tensor, mean: float) -> Tensor:
    """``value_L`` shifted by one constant and cut to [DENSEST, SPARSEST] so that its weighted mean is ``mean``.

    The cut reaches as far as ``mean`` where that is outside. float64, shape (L,).
    """
    lowest, highest = min(DENSEST, mean), max(SPARSEST, mean)
    # The mean grows with the shift: bisect between where all are cut at one end or at the other.
    below, above = lowest - float(value_L.max()), highest - float(value_L.min())
    for _ in range(200):
        middle = 0.5 * (below + above)
        excess = float(((value_L + middle).clamp(lowest, highest) - mean) @ size_L)
        below, above = (middle, above) if excess < 0.0 else (below, middle)
    return (value_L + above).clamp(lowest, highest)


def with_shares(patterns: Mapping[str, Pattern], shares: Mapping[str, float]) -> dict[str, Pattern]:
    """The patterns of all linears, with the sparsities of ``shares`` where those have one."""
    return {
        name: replace(each, sparsity=shares[name]) if name in shares and isinstance(each, Unstructured) else each
        for name, each in patterns.items()
    }
