"""The guarantee: how far each row can be from its optimum, recomputed from scratch in float64.

With r the negative gradient on the kept set S, and zero on the pruned set (docs/mathematics.md has the proof):

    E(v) - E(v*) = 1/2 r_S^T (H_SS)^-1 r_S <= 1/2 r^T K r = 1/2 ||L^-1 r||^2,     K = H^-1,  H = L L^T

Shapes: R rows, D inputs, B rows certified together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from optima.core.hessian import Hessian
from optima.core.problem import ENERGY_FLOOR, RowProblem
from optima.core.products import all_finite
from optima.device import full_precision
from optima.errors import NumericalError, RecipeError

# The residual needs float64, its norm two digits: whitened in float32 it is off by 1e-6 or so, and raised by this.
WHITENING_MARGIN = 1.001
# A row of zeros has no scale of its own; this one and its reciprocal are float32 numbers.
SMALLEST_SCALE = 1e-36
# Entries (rows x inputs) certified together: bounds the float64 temporaries.
BLOCK_ENTRIES = 2**19
DEVICE_BLOCK_ENTRIES = 2**23
ALL = slice(None)


class Certificate(NamedTuple):
    """Float64 facts about one candidate weight.

    Attributes:
        error_R: E(v) = 1/2 (v - w)^T H (v - w).
        bound_R: guaranteed upper bound on E(v) - E(v*).
        gap_R: bound relative to max(E(v) - bound, ENERGY_FLOOR * 1/2 sum_i H_ii w_i^2), the certified
            relative suboptimality, since E(v*) >= E(v) - bound. Infinite where numbers were too large to tell.
        residual_RD: negative gradient on the kept weights, zero elsewhere.
    """

    error_R: Tensor
    bound_R: Tensor
    gap_R: Tensor
    residual_RD: Tensor

    def rows(self, index: Tensor) -> Certificate:
        """The facts about the rows that ``index`` selects."""
        return Certificate(*(fact[index] for fact in self))


def certify(hessian: Hessian, problem: RowProblem, weight_RD: Tensor) -> Certificate:
    """Certify feasible ``weight_RD`` against ``problem`` with one float64 product and one triangular solve.

    Raises:
        RecipeError: if a weight is not zero off keep: nothing is known of such rows.
        NumericalError: if a weight is NaN or Inf.
    """
    if not all_finite(weight_RD):
        raise NumericalError("certify: weights contain NaN or Inf: nothing is known of such rows")
    if not bool((problem.masked(weight_RD) == weight_RD).all()):
        raise RecipeError("certify: weights are not zero off keep: multiply them by the mask")
    with full_precision(), torch.no_grad():
        verifier = Verifier(hessian, problem)
        found = verifier(weight_RD)
    unit_R1 = (hessian.mean_diagonal * verifier.scale_R)[:, None]
    return found._replace(residual_RD=found.residual_RD.double() * unit_R1)


class Verifier:
    """Certifies candidates for the rows of one problem, with its residuals in the units that solvers work in.

    Those units are H's mean diagonal and the row's ``scale_R``, the size of its weights: in them float32 has room
    whatever the linear's units. Scales are powers of two, so that nothing is rounded on the way.

    Attributes:
        mask_RD: the mask as 0 and 1 of H's working dtype. On a CPU torch multiplies by floats an order of magnitude
            faster than it fills by boolean masks.
        scale_R: see above, float64.
        energy_R: 1/2 sum_i H_ii w_i^2, float64: the loss if inputs were uncorrelated and all weights pruned.
        room_R: False for rows of which no weight can move: they are at their optimum, whatever rounding does.
    """

    def __init__(self, hessian: Hessian, problem: RowProblem) -> None:
        self.hessian, self.problem = hessian, problem
        self.mask_RD = problem.keep_RD.to(hessian.working_dtype)
        weight_D = hessian.damped_DD.diagonal().masked_fill(hessian.dead_D, 0.0)
        self.energy_R = 0.5 * (problem.target_RD.double().square() @ weight_D)
        size_R = (self.energy_R / hessian.mean_diagonal).sqrt().clamp_min(SMALLEST_SCALE)
        self.scale_R = size_R.log2().round().exp2()
        self.room_R = problem.keep_RD.any(dim=1)

    def __call__(self, weight_RD: Tensor, rows: slice | Tensor = ALL) -> Certificate:
        """Certify feasible weights.

        Args:
            weight_RD: the candidates, zero off keep.
            rows: which rows of the problem they are for, a tensor of indices; ``ALL`` otherwise.

        Returns:
            The certificate, but with ``residual_RD`` in H's working dtype and the units above.
        """
        residual_RD = torch.empty_like(weight_RD, dtype=self.mask_RD.dtype)
        facts = torch.empty(3, len(weight_RD), dtype=torch.float64, device=weight_RD.device)
        for block in self._blocks(len(weight_RD)):
            found = self._certify(weight_RD[block], block if isinstance(rows, slice) else rows[block])
            residual_RD[block] = found.residual_RD
            facts[:, block] = torch.stack(found[:3])
        return Certificate(facts[0], facts[1], facts[2], residual_RD)

    def error(self, weight_RD: Tensor) -> Tensor:
        """E of weights that are zero off keep, but for what dead inputs of theirs are, float64."""
        matrix_DD, error_R = self.hessian.damped_DD, torch.empty_like(self.energy_R)
        for block in self._blocks(len(weight_RD)):
            difference_BD = self.problem.target_RD[block].double() - weight_RD[block]
            difference_BD *= ~self.hessian.dead_D
            error_R[block] = 0.5 * torch.linalg.vecdot(difference_BD, difference_BD @ matrix_DD).clamp_min(0.0)
        return error_R

    def _blocks(self, count: int) -> Iterator[slice]:
        entries = BLOCK_ENTRIES if self.mask_RD.device.type == "cpu" else DEVICE_BLOCK_ENTRIES
        size = max(entries // max(self.hessian.num_inputs, 1), 1)
        return (slice(begin, begin + size) for begin in range(0, count, size))

    def _certify(self, weight_BD: Tensor, rows: slice | Tensor) -> Certificate:
        hessian, problem, scale_B = self.hessian, self.problem.rows(rows), self.scale_R[rows]
        difference_BD = problem.target_RD.double() - weight_BD
        gradient_BD = difference_BD @ hessian.damped_DD
        # A kept dead input stays at its target and a pruned one has target 0, so the decoupled diagonal adds nothing.
        error_B = 0.5 * torch.linalg.vecdot(difference_BD, gradient_BD).clamp_min(0.0)
        size_B = (difference_BD.square_() @ (hessian.damped_DD.diagonal() / hessian.mean_diagonal)).sqrt() / scale_B
        del difference_BD
        gradient_BD *= (1.0 / (hessian.mean_diagonal * scale_B))[:, None]
        residual_BD = gradient_BD.to(self.mask_RD.dtype).mul_(self.mask_RD[rows])
        del gradient_BD
        norm_B = hessian.whitener(residual_BD.dtype).squared_norm(residual_BD)
        norm_B = torch.where(self.room_R[rows] | (norm_B != 0), self._raised(norm_B, size_B), 0.0)
        bound_B = hessian.mean_diagonal * scale_B.square() * (0.5 * norm_B)
        bound_B.nan_to_num_(math.inf, math.inf)
        # Relative to what the optimum must at least lose, or to the floor of what matters.
        gap_B = bound_B / torch.maximum(error_B - bound_B, ENERGY_FLOOR * self.energy_R[rows])
        gap_B = torch.where(bound_B == 0, 0.0, gap_B).nan_to_num_(math.inf, math.inf)
        return Certificate(error_B, bound_B, gap_B, residual_BD)

    def _raised(self, norm_B: Tensor, size_B: Tensor) -> Tensor:
        """||L^-1 r||^2 raised by all that rounding can have hidden of it (docs/mathematics.md, section 6).

        The factor and a substitution in float64 change its root by the first factor at most; the residual's own
        rounding, whitened, is at most the second term, with ``size_B`` the root of sum_i H_ii (w - v)_i^2. A norm
        that is no number stays none.
        """
        rounding, condition = self.hessian.rounding, self.hessian.condition
        factor, term = (1.0 + rounding * condition) ** 2, rounding * (self.hessian.num_inputs * condition) ** 0.5
        proven_B = (factor * norm_B.sqrt() + term * size_B).square()
        return torch.maximum(WHITENING_MARGIN * norm_B, proven_B)
