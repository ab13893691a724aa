"""The layer Hessian that every row shares, and its one factorisation.

Shapes: D inputs, R rows, K random directions, N inputs from the first of C columns on.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from optima.errors import NumericalError, RecipeError
from optima.linalg.products import SharedFactor, SharedMatrix, scaled

# Damping tried after plain Cholesky fails with none at all; relative to the mean of the diagonal.
SMALLEST_DAMPING = 1e-8
# An eigenvalue below -INDEFINITE * the largest one is not rounding of X^T X.
INDEFINITE = 1e-4
# Asymmetry beyond rounding, in units of sqrt(H_ii H_jj).
ASYMMETRIC = 1e-2
# Cholesky "succeeds" on numerically singular matrices; past this condition the inverse is noise.
LARGEST_CONDITION = 1e13
# Columns of the inverse of L that are in memory at once while only the diagonal of K is wanted.
COLUMNS = 256
# Side of the tiles in which the triangles are averaged: two of them stay in the cache while one is transposed.
TILE = 128
# Float32 iterations lose no digit that refinement cannot restore below this condition.
FLOAT32_CONDITION = 1e7


Made = TypeVar("Made")


class Factorisation(NamedTuple):
    """Damped H, its lower Cholesky factor, and the relative damping that it took."""

    damped_DD: Tensor
    factor_DD: Tensor
    damping: float


class Hessian:
    """H = X^T X / T with its damping, factorised once in float64 and shared by all rows and methods.

    The problem everybody solves uses ``H + ridge * I`` on both sides of the normal equations, which pulls the
    solution toward the dense weights. Dead inputs (``H_ii = 0``) carry no signal: they are decoupled, given a unit
    share of the diagonal so that the factor exists, and left out of every error.

    Args:
        matrix_DD: X^T X / T, symmetric positive semidefinite, float32 or float64, undamped. Not copied: do not
            change it while this object is in use.
        damping: ridge relative to the mean diagonal of the live inputs (lambda in SparseGPT's ``percdamp``).

    Raises:
        NumericalError: if the matrix has NaN/Inf, is not symmetric, or is indefinite beyond rounding.
        RecipeError: if it is not a square float matrix or damping is out of range.
    """

    def __init__(self, matrix_DD: Tensor, damping: float = 0.01) -> None:
        if matrix_DD.ndim != 2 or matrix_DD.shape[0] != matrix_DD.shape[1]:
            raise RecipeError(f"the hessian must be a square matrix, got shape {tuple(matrix_DD.shape)}")
        if matrix_DD.dtype not in (torch.float32, torch.float64):
            raise RecipeError(
                f"the hessian must be float32 or float64, got {matrix_DD.dtype}: accumulate it in float32"
            )
        if not 0.0 <= damping <= 1.0:
            raise RecipeError(f"damping must be between 0 and 1, got {damping}: for example 0.01")
        self._matrix_DD = matrix_DD.detach()
        self.requested_damping = damping
        self._made: dict[Hashable, Any] = {}
        if matrix_DD.numel():
            self._refuse_unusable()

    def _refuse_unusable(self) -> None:
        lowest, highest = self._matrix_DD.aminmax()
        if not (lowest.isfinite() and highest.isfinite()):
            raise NumericalError("the hessian contains NaN or Inf: check the calibration activations")
        if float(self.diagonal_D.min()) < 0.0:
            raise NumericalError("the hessian has a negative diagonal entry, so it is not X^T X of real inputs")
        if bool(self._matrix_DD[self.dead_D].any()):
            raise NumericalError(
                "the hessian has a zero on its diagonal and other entries beside it, so it is not X^T X of real inputs"
            )
        # (H - H^T) applied to random signs, in units of the inputs: two thin products instead of D^2 temporaries.
        generator = torch.Generator().manual_seed(0)
        signs_KD = torch.randint(0, 2, (4, self.num_inputs), generator=generator).mul_(2).sub_(1).to(self._matrix_DD)
        scale_D = (
            self.diagonal_D.clamp_min(max(float(self.diagonal_D.max()) * 1e-30, 1e-60))
            .rsqrt()
            .to(self._matrix_DD.dtype)
        )
        signs_KD = signs_KD * scale_D
        asymmetry_KD = (signs_KD @ self._matrix_DD - (self._matrix_DD @ signs_KD.mT).mT) * scale_D
        if float(asymmetry_KD.abs().max()) > ASYMMETRIC:
            raise NumericalError("the hessian is not symmetric: pass X^T X / T")

    @property
    def num_inputs(self) -> int:
        """D."""
        return self._matrix_DD.shape[0]

    @property
    def device(self) -> torch.device:
        """Where the matrix and everything derived from it lives."""
        return self._matrix_DD.device

    @cached_property
    def matrix_DD(self) -> Tensor:
        """Undamped H in float64."""
        return self._matrix_DD.double()

    @cached_property
    def diagonal_D(self) -> Tensor:
        """Undamped diagonal, float64: the mean square of each input."""
        return self._matrix_DD.diagonal().double().clone()

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
    def factorisation(self) -> Factorisation:
        """The one Cholesky factorisation, with more damping than requested only if it cannot be had otherwise."""
        damping = self.requested_damping
        while True:
            damped_DD = self.damped(damping)
            factor_DD, info = torch.linalg.cholesky_ex(damped_DD)
            if not int(info) and _condition(damped_DD, factor_DD) <= LARGEST_CONDITION:
                return Factorisation(damped_DD, factor_DD, damping)
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
        matrix_DD = self._matrix_DD.to(torch.float64, copy=True)
        _symmetrise(matrix_DD)
        matrix_DD.diagonal().copy_(diagonal_D)
        return matrix_DD

    @property
    def factor_DD(self) -> Tensor:
        """Lower Cholesky factor L of the damped H, float64."""
        return self.factorisation.factor_DD

    @property
    def damping(self) -> float:
        """The damping in force: the requested one, or larger if the Cholesky needed it."""
        return self.factorisation.damping

    @property
    def damped_DD(self) -> Tensor:
        """The damped H that all solvers and the certificate use, float64."""
        return self.factorisation.damped_DD

    @cached_property
    def inverse_DD(self) -> Tensor:
        """K = (damped H)^-1 in float64: the preconditioner, and the matrix OBS-type selectors work with."""
        return torch.cholesky_inverse(self.factor_DD)

    @cached_property
    def inverse_diagonal_D(self) -> Tensor:
        """Diagonal of K, float64: from K if it has been made, else the squared norms of the columns of L^-1."""
        if "inverse_DD" in vars(self):
            return self.inverse_DD.diagonal()
        diagonal_D = torch.empty_like(self.diagonal_D)
        for begin in range(0, self.num_inputs, COLUMNS):
            columns = diagonal_D[begin : begin + COLUMNS]
            below_NN = self.factor_DD[begin:, begin:]
            identity_NC = torch.eye(len(below_NN), len(columns), dtype=below_NN.dtype, device=self.device)
            columns.copy_(torch.linalg.solve_triangular(below_NN, identity_NC, upper=False).square_().sum(dim=0))
        return diagonal_D

    @cached_property
    def condition(self) -> float:
        """Cheap estimate of the condition number of the damped H scaled to a unit diagonal.

        Scaled, because every method here is indifferent to the units of the inputs: rounding errors of products and of
        Cholesky factors scale along with them.
        """
        return _condition(self.damped_DD, self.factor_DD)

    @property
    def working_dtype(self) -> torch.dtype:
        """Precision in which iterations converge: float32, or float64 where the condition number demands it."""
        return torch.float32 if self.condition <= FLOAT32_CONDITION else torch.float64

    def memo(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """What ``make`` returns, made once for ``key``: the one cache of whatever depends on H alone.

        It is dropped with this object, which it must not refer to.
        """
        if key not in self._made:
            self._made[key] = make()
        made: Made = self._made[key]
        return made

    def operator(self, dtype: torch.dtype) -> SharedMatrix:
        """The damped H in units of its mean diagonal, ready to multiply rows in ``dtype``; made once."""
        return self.memo(
            ("operator", dtype), lambda: SharedMatrix(scaled(self.damped_DD, 1.0 / self.mean_diagonal, dtype))
        )

    def preconditioner(self, dtype: torch.dtype) -> SharedMatrix:
        """K in the same units, ready to multiply rows; made once. Below float64 only a few digits of it are right."""
        return self.memo(("preconditioner", dtype), lambda: SharedMatrix(self._inverse(dtype)))

    @property
    def has_preconditioner(self) -> bool:
        """True once K has been made, for a solver or a selector."""
        dtypes = (torch.float64, torch.float32, torch.bfloat16)
        return "inverse_DD" in vars(self) or any(("preconditioner", dtype) in self._made for dtype in dtypes)

    def whitener(self, dtype: torch.dtype) -> SharedFactor:
        """L in the same units, ready to measure L^-1 r of rows; made once."""
        return self.memo(("whitener", dtype), lambda: SharedFactor(self.factor_DD, self.mean_diagonal**-0.5, dtype))

    def _inverse(self, dtype: torch.dtype) -> Tensor:
        """K in units of the mean diagonal: from float64 where that is at hand or needed; float32 costs half."""
        if dtype == torch.float64 or "inverse_DD" in vars(self):
            return scaled(self.inverse_DD, self.mean_diagonal, dtype)
        return torch.cholesky_inverse(scaled(self.factor_DD, self.mean_diagonal**-0.5, torch.float32)).to(dtype)


def _condition(damped_DD: Tensor, factor_DD: Tensor) -> float:
    """D max_i H_ii / L_ii^2: the second factor is 1 / (1 - R^2) of input i on those before it, a bound from below on
    the largest eigenvalue of the scaled inverse; D bounds that of the scaled matrix from above."""
    if not factor_DD.numel():
        return 1.0
    share_D = factor_DD.diagonal().square() / damped_DD.diagonal()
    return len(share_D) / float(share_D.min())


def _symmetrise(matrix_DD: Tensor) -> None:
    """Average the triangles in place, tile by tile: a Cholesky reads one of them, products read both."""
    size = len(matrix_DD)
    for row in range(0, size, TILE):
        for column in range(row, size, TILE):
            upper = matrix_DD[row : row + TILE, column : column + TILE]
            lower = matrix_DD[column : column + TILE, row : row + TILE]
            average = (upper + lower.mT).mul_(0.5)
            upper.copy_(average)
            lower.copy_(average.mT)
