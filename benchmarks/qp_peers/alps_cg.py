"""Diagonal CG as ALPS runs it (Meng et al., NeurIPS 2024, sec. 3.3): the published method, not our best form of it.

Plain ``torch.mm`` in float32, the mask as a dense float matrix, all rows for as many iterations as the slowest needs,
no certificate. Two things are better than in the published code, so that nothing hangs on them: an iteration is one
product (there A P is computed twice, and A X once more for the residual norm), and the stop is an oracle's, free of
charge, instead of ten iterations or a relative residual of 1e-4. Its division of the inputs by their norms is the
diagonal preconditioner here.

Shapes: R rows, D inputs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from optima.core import Hessian, RowProblem
from qp_peers.diagonal_cg import PeerSolution

# More iterations than the trial run of ``diagonal_cg`` counted, where float32 alone is a little slower.
EXTRA = 40
TrueGap = Callable[[Tensor], float]


def fixed(hessian: Hessian, problem: RowProblem, iterations: int) -> PeerSolution:
    """Exactly ``iterations`` of every row, from the masked target."""
    matrix_DD = hessian.damped_DD.float()
    diagonal_D = matrix_DD.diagonal().clone()
    mask_RD = problem.keep_RD.float()
    target_RD = problem.target_RD.float()
    weight_RD = target_RD * mask_RD
    residual_RD = torch.mm(target_RD - weight_RD, matrix_DD) * mask_RD
    direction_RD = preconditioned_RD = residual_RD / diagonal_D
    slope_R1 = (residual_RD * preconditioned_RD).sum(dim=1, keepdim=True)
    for _ in range(iterations):
        image_RD = torch.mm(direction_RD, matrix_DD)
        curvature_R1 = (direction_RD * image_RD).sum(dim=1, keepdim=True)
        alpha_R1 = torch.where(curvature_R1 > 0, slope_R1 / curvature_R1, 0.0)
        weight_RD = weight_RD + alpha_R1 * direction_RD
        residual_RD = (residual_RD - alpha_R1 * image_RD) * mask_RD
        preconditioned_RD = residual_RD / diagonal_D
        last_R1, slope_R1 = slope_R1, (residual_RD * preconditioned_RD).sum(dim=1, keepdim=True)
        direction_RD = preconditioned_RD + torch.where(last_R1 > 0, slope_R1 / last_R1, 0.0) * direction_RD
    count_R = torch.full((len(weight_RD),), iterations, dtype=torch.int32, device=weight_RD.device)
    return PeerSolution(weight_RD, count_R)


def iterations_to(hessian: Hessian, problem: RowProblem, gap: float, first: int, true_gap: TrueGap) -> int:
    """Fewest iterations from ``first`` up that bring every row to a true gap of ``gap`` (untimed)."""
    for iterations in range(first, first + EXTRA):
        if true_gap(fixed(hessian, problem, iterations).weight_RD) <= gap:
            return iterations
    return first + EXTRA
