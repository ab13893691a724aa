"""OPTIMA's own selector: splitting with a slowly rising penalty, in units that lie between the two prices of a weight.

As in ADMM (Boza, arXiv 2401.02938) and ALPS (Meng et al., NeurIPS 2024), a least-squares fit that is pulled towards the
last mask and the projection of fit and dual onto the pattern take turns:

    B = (H + rho I)^-1 (H W^T + rho (D - U)),   D = P(B + U),   U = B + U - D.

Those work in units in which H has a unit diagonal, where P prices the removal of a weight as if no other could make up
for it, w_i^2 H_ii. With all others making up for it the price is w_i^2 / K_ii, K = H^-1 (the optimal brain surgeon's).
On a sparse mask the truth lies between. Here a unit is the root of H_ii^(1-theta) K_ii^(-theta) with theta = 3/4, and
rho rises slowly from where the fit is nearly free to where the mask is settled. The masks that come out are at or near
a one-swap optimum (``optima.selectors.swaps`` finds little to improve), for the price of products.

Rows are pruned alike. Ranking the whole layer leaves a lower reconstruction error and a worse model: rows whose outputs
have little energy are starved, though what follows may need them as much as the others (docs/benchmarks.md).

Shapes: O outputs (rows), D inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from optima.patterns import Pattern, Scope, Unstructured, top_scores
from optima.qp.hessian import Hessian
from optima.qp.products import SharedMatrix
from optima.selectors.base import Layer, Selection

# Scores of a layer from which a threshold is taken while the mask is still moving.
SAMPLE = 2**15


@dataclass(frozen=True)
class Optima:
    """The mask only: a solver finds its weights. Cost: ``stages`` inverses, and a product in each of their iterations.

    Args:
        first_penalty: rho of the first stage.
        last_penalty: rho of the last one; the stages between are spaced geometrically.
        stages: number of penalties.
        iterations: of the splitting in each stage.
        theta: 0 for units of a unit diagonal, 1 for units in which K has a unit diagonal.
    """

    first_penalty: float = 0.2
    last_penalty: float = 3.0
    stages: int = 20
    iterations: int = 6
    theta: float = 0.75
    published_scope: Scope = "row"

    def select(self, layer: Layer, pattern: Pattern) -> Selection:
        """See ``Selector``."""
        hessian, dtype = layer.hessian, layer.weight_OD.dtype
        unit_D = self._units(hessian)
        matrix_DD = (hessian.damped_DD / unit_D / unit_D[:, None]).to(dtype)
        dense_OD = (layer.weight_OD.contiguous() * unit_D.to(dtype)).masked_fill_(hessian.dead_D, 0.0)
        return Selection(self._split(matrix_DD, dense_OD, pattern))

    def _units(self, hessian: Hessian) -> Tensor:
        """float64; the price of a weight w is (w unit)^2."""
        own_D, left_D = hessian.damped_DD.diagonal(), 1.0 / hessian.inverse_DD.diagonal()
        return (own_D.pow(1.0 - self.theta) * left_D.pow(self.theta)).sqrt()

    def _split(self, matrix_DD: Tensor, dense_OD: Tensor, pattern: Pattern) -> Tensor:
        target_OD = SharedMatrix(matrix_DD)(dense_OD)
        projection_OD = dense_OD * top_scores(dense_OD.abs(), pattern)
        dual_OD = torch.zeros_like(dense_OD)
        ratio = (self.last_penalty / self.first_penalty) ** (1.0 / max(self.stages - 1, 1))
        for stage in range(self.stages):
            rho = self.first_penalty * ratio**stage
            solve = shifted_inverse(matrix_DD, rho)
            # The multiplier is rho U: it does not jump when rho does.
            dual_OD /= ratio if stage else 1.0
            threshold = None
            for _ in range(self.iterations):
                sum_OD = solve(torch.sub(projection_OD, dual_OD).mul_(rho).add_(target_OD)).add_(dual_OD)
                score_OD = sum_OD.abs()
                if threshold is None:
                    threshold = rough_threshold(score_OD, pattern)
                keep_OD = top_scores(score_OD, pattern) if threshold is None else score_OD > threshold
                torch.mul(sum_OD, keep_OD, out=projection_OD)
                torch.sub(sum_OD, projection_OD, out=dual_OD)
        return top_scores(sum_OD.abs(), pattern)


def shifted_inverse(matrix_DD: Tensor, penalty: float) -> SharedMatrix:
    """(matrix + penalty I)^-1 in its precision: the penalty is large enough for it to be well conditioned."""
    shifted_DD = matrix_DD.clone()
    shifted_DD.diagonal().add_(penalty)
    return SharedMatrix(torch.cholesky_inverse(torch.linalg.cholesky(shifted_DD)))


def rough_threshold(score_OD: Tensor, pattern: Pattern) -> Tensor | None:
    """Above it is what the pattern keeps, nearly; None where only exact masks will do.

    A stage keeps its threshold, which costs more to find than an iteration: only the last mask has to be exact.
    """
    if not isinstance(pattern, Unstructured) or pattern.scope == "group" or not score_OD.numel():
        return None
    if pattern.scope == "row":
        return score_OD.kthvalue(max(pattern.pruned_count(score_OD.shape[1]), 1), dim=1, keepdim=True).values
    # An odd step that is no multiple of the width visits all columns.
    sample = score_OD.flatten()[:: (score_OD.numel() // SAMPLE) | 1]
    return sample.kthvalue(max(pattern.pruned_count(len(sample)), 1)).values
