"""OPTIMA's own selector: ADMM with a slowly rising penalty, in units between the two saliencies of a weight.

As in ADMM (Boza, arXiv 2401.02938) and ALPS (Meng et al., NeurIPS 2024), a least-squares fit that is pulled towards the
last mask and the projection of fit and dual onto the pattern alternate:

    B = W + rho (D - U - W) (H + rho I)^-1,   D = P(B + U),   U = B + U - D.

Those work in units in which H has a unit diagonal, where P ranks weights as if no other could make up for one,
by w_i^2 H_ii. With all others making up for it the saliency is w_i^2 / K_ii, K = H^-1 (the optimal brain surgeon's).
On a sparse mask the truth lies between: here a unit is the root of H_ii^(1-theta) K_ii^(-theta) with theta = 3/4. And
rho rises slowly, from where the fit is nearly free to where the mask is settled.

With the correlation of rows in the loss (``calibration.weights``), errors of rows that would add up are not
chosen together: with C between the rows as H is between the inputs, C (B - W) H + rho (B - W) = rho (D - U - W), in
units of the rows that are made of C as those of the inputs are of H.

Its scope is ``layer``: with the rows scaled by their Fisher weights (docs/objective.md) they compete fairly.
Without, rows whose outputs have little energy would be starved, and ``optima.plan`` ranks each row alone.

Shapes: O outputs (rows), D inputs, G groups of an N:M pattern in a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from optima.core.hessian import Hessian
from optima.core.products import sampling_step, scaled
from optima.core.shifted import (
    Eigen,
    Shifted,
    coupled_inverse,
    eigendecomposition,
    factored_inverse,
    largest_eigenvalue,
    saliency_unit,
    scaled_weight,
)
from optima.patterns import NM, Pattern, Scope
from optima.selectors.base import LinearTask, Selection
from optima.selectors.ranking import MOST_COMPARED, kth_lowest, top_scores

# What is made of H is off by the precision times its largest eigenvalue (59 to 1,349 in Gemma 3 270M). Compared
# with rho that must be little, or it is made in float64, which takes half as much memory again.
ROUNDING = 0.01
# Scores of a linear from which a threshold is taken while the mask is still moving.
SAMPLE = 2**15
# Stages that share their thresholds: one costs more to find than an iteration.
STAGES_PER_THRESHOLD = 2


@dataclass(frozen=True)
class Optima:
    """The mask only: a solver finds its weights.

    Cost: a product in each of ``stages * iterations`` iterations, and as much as one of D x D matrices in each stage.
    With coupled rows instead of the latter an eigendecomposition a Hessian and one of O x O, and four products an
    iteration.

    Args:
        first_penalty: rho of the first stage.
        last_penalty: rho of the last one; the stages between are spaced geometrically.
        stages: number of penalties.
        group_stages: the same for N:M patterns, whose small groups settle sooner.
        iterations: of ADMM in each stage.
        theta: 0 for units of a unit diagonal, 1 for units in which K has a unit diagonal.
    """

    first_penalty: float = 0.3
    last_penalty: float = 2.0
    stages: int = 8
    group_stages: int = 6
    iterations: int = 3
    theta: float = 0.75
    published_scope: Scope = "layer"
    needs: ClassVar[frozenset[str]] = frozenset({"coupling"})

    def select(self, task: LinearTask, pattern: Pattern) -> Selection:
        """See ``Selector``."""
        hessian, dtype = task.hessian, task.weight_OD.dtype
        if task.coupling_OO is None:
            unit_D, matrix_DD = hessian.memo((self, dtype), lambda: self._prepare(hessian, dtype))
            dense_OD = scaled_weight(task.weight_OD, hessian, unit_D)
            return Selection(self._split(factored_inverse(matrix_DD, dense_OD, self.iterations), dense_OD, pattern))
        unit_D, inputs = hessian.memo((self, dtype, "eigen"), lambda: self._decompose(hessian, dtype))
        dense_OD = scaled_weight(task.weight_OD, hessian, unit_D)
        # Units of the rows, between those of both saliencies as the inputs' are: their own are of a unit diagonal.
        coupling_OO = task.coupling_OO.to(dense_OD)
        unit_O1 = torch.linalg.inv(coupling_OO).diagonal().pow(-self.theta / 2.0)[:, None]
        rows = eigendecomposition((coupling_OO / unit_O1).div_(unit_O1.mT), dtype)
        dense_OD *= unit_O1
        return Selection(self._split(coupled_inverse(rows, inputs), dense_OD, pattern))

    def _prepare(self, hessian: Hessian, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Units between the two saliencies, in ``dtype``, and the damped H in them, in float64 where that is needed."""
        # In units of the mean diagonal, as the operator is: nothing depends on the scale of the activations.
        unit_D = saliency_unit(hessian, self.theta) / hessian.mean_diagonal**0.5

        def in_units(unit_D: Tensor) -> Tensor:
            matrix_DD = scaled(hessian.damped_DD, 1.0 / hessian.mean_diagonal, unit_D.dtype)
            return matrix_DD.div_(unit_D).div_(unit_D[:, None])

        matrix_DD = in_units(unit_D.to(dtype))
        if torch.finfo(dtype).eps * largest_eigenvalue(matrix_DD) > ROUNDING * self.first_penalty:
            matrix_DD = in_units(unit_D)
        return unit_D.to(dtype), matrix_DD

    def _decompose(self, hessian: Hessian, dtype: torch.dtype) -> tuple[Tensor, Eigen]:
        unit_D, matrix_DD = self._prepare(hessian, dtype)
        return unit_D, eigendecomposition(matrix_DD, dtype)

    def _split(self, inverse: Shifted, dense_OD: Tensor, pattern: Pattern) -> Tensor:
        projection_OD = dense_OD * top_scores(dense_OD.abs(), pattern)
        dual_OD = torch.zeros_like(dense_OD)
        stages = self.group_stages if isinstance(pattern, NM) else self.stages
        ratio = (self.last_penalty / self.first_penalty) ** (1.0 / max(stages - 1, 1))
        threshold = None
        for stage in range(stages):
            rho = self.first_penalty * ratio**stage
            solve = inverse(rho)
            # The multiplier is rho U: it does not jump when rho does.
            dual_OD /= ratio if stage else 1.0
            for iteration in range(self.iterations):
                sum_OD = solve(torch.sub(projection_OD, dual_OD).sub_(dense_OD).mul_(rho)).add_(dense_OD).add_(dual_OD)
                if iteration == 0 and stage % STAGES_PER_THRESHOLD == 0:
                    threshold = None
                keep_OD, threshold = rough_mask(sum_OD.abs(), pattern, threshold)
                torch.mul(sum_OD, keep_OD, out=projection_OD)
                torch.sub(sum_OD, projection_OD, out=dual_OD)
        return top_scores(sum_OD.abs(), pattern)


def rough_mask(score_OD: Tensor, pattern: Pattern, threshold: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """What a pattern keeps, nearly: only the last mask of ADMM has to have exact counts.

    Unstructured sparsity takes the ``threshold`` of an earlier call, where there is one, and a linear's is that of a
    sample of its scores; equal scores of an N:M group go together.

    Returns:
        keep_OD, and the threshold for later calls.
    """
    if not score_OD.numel():
        return score_OD > 0, None
    if isinstance(pattern, NM) and pattern.m <= MOST_COMPARED:
        score_GM = score_OD.reshape(-1, pattern.m)
        return (score_GM > kth_lowest(score_GM, pattern.m - pattern.n)).reshape(score_OD.shape), None
    if isinstance(pattern, NM) or pattern.scope == "group":
        return top_scores(score_OD, pattern), None
    if threshold is None:
        # Above it are nearly as many scores, of each row unless the linear is ranked as one, as the pattern keeps.
        sample_RN = score_OD
        if pattern.scope != "row":
            sample_RN = score_OD.flatten()[None, :: sampling_step(score_OD.numel(), SAMPLE)]
        threshold = kth_lowest(sample_RN, max(pattern.pruned_count(sample_RN.shape[1]), 1))
    return score_OD > threshold, threshold
