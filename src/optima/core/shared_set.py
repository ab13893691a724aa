"""One set of kept inputs for all rows: greedy removal by the optimal brain surgeon, and the exact re-solve.

Removing inputs E from V = W costs tr(G W_E (K_EE)^-1 W_E^T), K = H^-1 and G the metric of the rows, and the optimum on
the kept inputs A is V_A = W_A + W_E H_EA (H_AA)^-1, whatever G is (Hassibi and Stork, NeurIPS 1992; for structures of
language models OSSCAR, arXiv 2403.12983, with G = I).

Shapes: O outputs, D inputs, E removed and A kept inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from optima.core.certificate import Verifier
from optima.core.hessian import Hessian
from optima.core.problem import RowSolution, Status
from optima.core.solvers import make_problem
from optima.device import full_precision

STEPS = 64  # removals between two looks at the costs are this part of all: one by one takes D^2 each time


@torch.no_grad()
def remove_greedily(hessian: Hessian, weight_OD: Tensor, root_OO: Tensor, count: int, steps: int = STEPS) -> Tensor:
    """Choose ``count`` inputs to remove from all rows, those that cost least first; costs follow each removal.

    Args:
        hessian: of the inputs.
        weight_OD: the dense weight.
        root_OO: R of the metric of the rows, G = R^T R.
        count: inputs to remove.
        steps: looks at the costs at most; ``count`` removes one by one.

    Returns:
        keep_D: boolean, True = the input survives.
    """
    keep_D = torch.ones(hessian.num_inputs, dtype=torch.bool, device=hessian.device)
    # Rows of R W: their squared norms are w_j^T G w_j. What a dead input is multiplied by does not matter.
    rotated_OD = root_OO.to(hessian.device, torch.float64) @ (weight_OD.double() * ~hessian.dead_D)
    inverse_DD = hessian.inverse_DD.clone()
    for part in range(min(steps, count)):
        left = count - int((~keep_D).sum())
        size = -(-left // (min(steps, count) - part))
        cost_D = rotated_OD.square().sum(dim=0) / inverse_DD.diagonal()
        chosen_E = cost_D.masked_fill(~keep_D, torch.inf).argsort(stable=True)[:size]
        keep_D[chosen_E] = False
        factor_EE = torch.linalg.cholesky(inverse_DD[chosen_E][:, chosen_E])
        columns_ED = inverse_DD[chosen_E].clone()
        change_ED = torch.cholesky_solve(columns_ED, factor_EE)
        rotated_OD -= rotated_OD[:, chosen_E] @ change_ED
        inverse_DD -= columns_ED.mT @ change_ED
        inverse_DD.diagonal()[~keep_D] = 1.0  # removed: their rows are zero up to rounding
    return keep_D


@torch.no_grad()
def solve_shared(hessian: Hessian, weight_OD: Tensor, keep_D: Tensor) -> RowSolution:
    """Re-solve all rows on the inputs ``keep_D`` by one Cholesky in float64, and certify them.

    Returns:
        The solution; ``weight_RD`` has the dtype of ``weight_OD`` (float32 at least), and zeros at removed inputs.
    """
    with full_precision():
        problem = make_problem(hessian, weight_OD, keep_D.expand(weight_OD.shape))
        kept_A, removed_E, damped_DD = keep_D.nonzero()[:, 0], (~keep_D).nonzero()[:, 0], hessian.damped_DD
        target_OD = problem.target_RD.double()
        factor_AA = torch.linalg.cholesky(damped_DD[kept_A][:, kept_A])
        pull_AO = damped_DD[kept_A][:, removed_E] @ target_OD[:, removed_E].mT
        weight_RD = torch.zeros_like(problem.target_RD)
        weight_RD[:, kept_A] = (target_OD[:, kept_A] + torch.cholesky_solve(pull_AO, factor_AA).mT).to(weight_RD.dtype)
        found = Verifier(hessian, problem)(weight_RD)
    none_R = torch.zeros(len(weight_OD), dtype=torch.int32, device=hessian.device)
    status_R = torch.full_like(none_R, Status.CONVERGED, dtype=torch.int8)
    return RowSolution(weight_RD, found.error_R, found.gap_R, status_R, none_R, solver="cholesky")
