"""The layer Hessian that every row shares, and its one factorisation.

Shapes: D inputs, R rows.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from optima.errors import NumericalError, RecipeError

# Damping tried after plain Cholesky fails with none at all; relative to the mean of the diagonal.
SMALLEST_DAMPING = 1e-8
# An eigenvalue below -INDEFINITE * the largest one is not rounding of X^T X.
INDEFINITE = 1e-4
# Cholesky "succeeds" on numerically singular matrices; past this condition estimate the inverse is noise.
LARGEST_CONDITION = 1e13


class Hessian:
    """H = X^T X / T with its damping, factorised once in float64 and shared by all rows and methods.

    The problem everybody solves uses ``H + ridge * I`` on both sides of the normal equations, which pulls the
    solution toward the dense weights. Dead inputs (``H_ii = 0``) carry no signal: they are decoupled, given a unit
    share of the diagonal so that the factor exists, and left out of every error.

    Args:
        matrix_DD: X^T X / T, symmetric positive semidefinite, float32 or float64, undamped.
        damping: ridge relative to the mean diagonal of the live inputs (lambda in SparseGPT's ``percdamp``).

    Raises:
        NumericalError: if the matrix has NaN/Inf, is not symmetric, or is indefinite beyond rounding.
        RecipeError: if it is not square or damping is negative.
    """

    def __init__(self, matrix_DD: Tensor, damping: float = 0.01) -> None:
        if matrix_DD.ndim != 2 or matrix_DD.shape[0] != matrix_DD.shape[1]:
            raise RecipeError(f"the hessian must be a square matrix, got shape {tuple(matrix_DD.shape)}")
        if not 0.0 <= damping <= 1.0:
            raise RecipeError(f"damping must be between 0 and 1, got {damping}: for example 0.01")
        matrix_DD = matrix_DD.detach().double()
        diagonal_D = matrix_DD.diagonal()
        if not matrix_DD.isfinite().all():
            raise NumericalError("the hessian contains NaN or Inf: check the calibration activations")
        largest = float(diagonal_D.abs().max()) if diagonal_D.numel() else 0.0
        if diagonal_D.numel() and float(diagonal_D.min()) < 0.0:
            raise NumericalError("the hessian has a negative diagonal entry, so it is not X^T X of real inputs")
        if float((matrix_DD - matrix_DD.mT).abs().amax() if diagonal_D.numel() else 0.0) > 1e-3 * largest:
            raise NumericalError("the hessian is not symmetric: pass X^T X / T")
        self.matrix_DD = matrix_DD
        self.requested_damping = damping

    @property
    def num_inputs(self) -> int:
        """D."""
        return self.matrix_DD.shape[0]

    @property
    def device(self) -> torch.device:
        """Where the matrix and everything derived from it lives."""
        return self.matrix_DD.device

    @cached_property
    def diagonal_D(self) -> Tensor:
        """Undamped diagonal, float64: the mean square of each input."""
        return self.matrix_DD.diagonal().clone()

    @cached_property
    def dead_D(self) -> Tensor:
        """True where an input was zero in every token."""
        return self.diagonal_D == 0

    @cached_property
    def mean_diagonal(self) -> float:
        """Mean of the diagonal over live inputs (1 if there are none)."""
        live_D = self.diagonal_D[~self.dead_D]
        return float(live_D.mean()) if live_D.numel() else 1.0

    @cached_property
    def _factor(self) -> tuple[Tensor, float]:
        """Lower Cholesky factor and the relative damping that it took."""
        damping = self.requested_damping
        while True:
            factor_DD, info = torch.linalg.cholesky_ex(self.damped(damping))
            if not int(info) and _condition(factor_DD) <= LARGEST_CONDITION:
                return factor_DD, damping
            self._refuse_indefinite()
            if damping >= 1.0:
                raise NumericalError("the hessian cannot be factorised even with damping 1: check its entries")
            damping = min(max(10.0 * damping, SMALLEST_DAMPING), 1.0)

    def _refuse_indefinite(self) -> None:
        spectrum_D = torch.linalg.eigvalsh(self.matrix_DD)
        lowest, largest = float(spectrum_D[0]), float(spectrum_D[-1])
        if lowest < -INDEFINITE * largest:
            raise NumericalError(
                f"the hessian is indefinite beyond rounding (eigenvalues from {lowest:.3g} to {largest:.3g}): "
                "it is not X^T X of real inputs"
            )

    def damped(self, damping: float) -> Tensor:
        """H + damping * mean(diag H) * I in float64, dead inputs decoupled; shape (D, D)."""
        diagonal_D = self.diagonal_D + damping * self.mean_diagonal
        diagonal_D = torch.where(self.dead_D, self.mean_diagonal, diagonal_D)
        matrix_DD = self.matrix_DD.clone()
        matrix_DD.diagonal().copy_(diagonal_D)
        return matrix_DD

    @property
    def factor_DD(self) -> Tensor:
        """Lower Cholesky factor L of the damped H, float64."""
        return self._factor[0]

    @property
    def damping(self) -> float:
        """The damping in force: the requested one, or larger if the Cholesky needed it."""
        return self._factor[1]

    @cached_property
    def damped_DD(self) -> Tensor:
        """The damped H that all solvers and the certificate use, float64."""
        return self.damped(self.damping)

    @cached_property
    def inverse_DD(self) -> Tensor:
        """K = (damped H)^-1 in float64: the preconditioner, and the matrix OBS-type selectors work with."""
        return torch.cholesky_inverse(self.factor_DD)

    @cached_property
    def condition(self) -> float:
        """Cheap lower estimate of the condition number of the damped H, from the diagonal of its factor."""
        return _condition(self.factor_DD)


def _condition(factor_DD: Tensor) -> float:
    if not factor_DD.numel():
        return 1.0
    diagonal_D = factor_DD.diagonal()
    return float((diagonal_D.max() / diagonal_D.min()) ** 2)
