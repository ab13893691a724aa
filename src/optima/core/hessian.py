"""The Hessian that every row of a linear shares, and its one factorisation.

Shapes: D inputs, O outputs, R rows, K random directions, N inputs from the first of C columns on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from optima.core.products import SharedFactor, all_finite, fixed_directions, mirror, multiply, pack, scaled
from optima.errors import NumericalError, RecipeError

# Damping tried after plain Cholesky fails with none at all; relative to the mean of the diagonal.
SMALLEST_DAMPING = 1e-8
# An eigenvalue below -INDEFINITE * the largest one is not rounding of X^T X.
INDEFINITE = 1e-4
REMEDY = "add up X^T X / T of finite inputs in float32 or float64"
# What H_ij is at most, in units of sqrt(H_jj), where H_ii is zero by underflow in float32 alone; twice, to be safe.
UNDERFLOW = 2.0 * torch.finfo(torch.float32).tiny ** 0.5
# Asymmetry beyond rounding, in units of sqrt(H_ii H_jj).
ASYMMETRIC = 1e-2
# Cholesky "succeeds" on numerically singular matrices. This is the most of (D + 4) u condition, u the unit of rounding:
# what a factor's own rounding changes of x^T K x at most, relative to itself.
LARGEST_ROUNDING = 0.1
# Of the condition estimate: random directions, applications of the inverse, and what their result is raised by.
DIRECTIONS, APPLICATIONS, MARGIN = 8, 3, 10.0
# Entries (rows x inputs) of a product whose rows' sums are taken together.
BLOCK_ENTRIES = 2**22
# Columns of the inverse of L that are in memory at once while only the diagonal of K is wanted.
COLUMNS, COLUMNS_ELSEWHERE = 256, 2048
# Float32 iterations lose no digit that restarts cannot restore below this condition.
FLOAT32_CONDITION = 1e8


Made = TypeVar("Made")


class Factorisation(NamedTuple):
    """Damped H, its lower Cholesky factor, the relative damping that it took, and a bound on its condition."""

    damped_DD: Tensor
    factor_DD: Tensor
    damping: float
    condition: float


class Hessian:
    """H = X^T X / T with its damping, factorised once in float64 and shared by all rows and methods.

    The problem everybody solves uses ``H + ridge * I`` on both sides of the normal equations, which pulls the
    solution toward the dense weights. Dead inputs (``H_ii = 0``) carry no signal: they are decoupled, given a unit
    share of the diagonal so that the factor exists, and left out of every error.

    Args:
        matrix_DD: X^T X / T, symmetric positive semidefinite, float32 or float64, undamped. Not copied: do not
            change it before the factorisation, which holds a float64 copy of its own.
        damping: ridge relative to the mean diagonal of the live inputs (lambda in SparseGPT's ``percdamp``).
        tokens: T, for the report.

    Attributes:
        diagonal_D: undamped diagonal, float64: the mean square of each input.

    Raises:
        NumericalError: if the matrix has NaN/Inf, is not symmetric, or is so indefinite that it cannot be factorised.
        RecipeError: if it is not a square float matrix or damping is out of range.
    """

    def __init__(self, matrix_DD: Tensor, damping: float = 0.01, tokens: int = 0) -> None:
        if matrix_DD.ndim != 2 or matrix_DD.shape[0] != matrix_DD.shape[1]:
            raise RecipeError(f"the hessian must be a square matrix, got shape {tuple(matrix_DD.shape)}")
        if matrix_DD.dtype not in (torch.float32, torch.float64):
            raise RecipeError(
                f"the hessian must be float32 or float64, got {matrix_DD.dtype}: accumulate it in float32"
            )
        if not 0.0 <= damping <= 1.0:
            raise RecipeError(f"damping must be between 0 and 1, got {damping}: for example 0.01")
        # Undamped as given until it is factorised, damped float64 from then on: they differ on the diagonal only.
        self._matrix_DD = matrix_DD.detach()
        self.diagonal_D = matrix_DD.detach().diagonal().double().clone()
        self.requested_damping, self.tokens = damping, tokens
        self._made: dict[Hashable, Any] = {}
        if matrix_DD.numel():
            self._check()

    def _check(self) -> None:
        """Refuse what is no X^T X, and zero the products of inputs so small that their squares are zero in float32."""
        if not all_finite(self._matrix_DD):
            raise NumericalError("the hessian contains NaN or Inf: check the calibration activations")
        dead_ND = self._matrix_DD[self.dead_D]
        if float(self.diagonal_D.min()) < 0.0:
            problem = "has a negative diagonal entry"
        elif bool((dead_ND.abs() > UNDERFLOW * self.diagonal_D.sqrt()).any()):
            problem = "has a zero on its diagonal and other entries in its row"
        elif self._asymmetry() > ASYMMETRIC:
            problem = "is not symmetric"
        else:
            problem = ""
        if problem:
            raise NumericalError(f"the hessian {problem}, so it is not X^T X of real inputs: {REMEDY}")
        if bool(dead_ND.any()):
            self._matrix_DD = self._matrix_DD.clone()
            self._matrix_DD[self.dead_D] = 0.0
            self._matrix_DD[:, self.dead_D] = 0.0

    def _asymmetry(self) -> float:
        """(H - H^T) applied to random signs, in units of the inputs: two thin products instead of D^2 temporaries."""
        signs_KD = fixed_directions(4, self._matrix_DD).sign()
        smallest = max(float(self.diagonal_D.max()) * 1e-30, 1e-60)
        scale_D = self.diagonal_D.clamp_min(smallest).rsqrt().to(signs_KD)
        signs_KD *= scale_D
        asymmetry_KD = (signs_KD @ self._matrix_DD - (self._matrix_DD @ signs_KD.mT).mT) * scale_D
        return float(asymmetry_KD.abs().max())

    @property
    def num_inputs(self) -> int:
        """D."""
        return self._matrix_DD.shape[0]

    @property
    def device(self) -> torch.device:
        """Where the matrix and everything derived from it lives."""
        return self._matrix_DD.device

    @property
    def matrix_DD(self) -> Tensor:
        """Undamped H in float64: a copy, made at each call."""
        return self._with_diagonal(self.diagonal_D)

    @cached_property
    def dead_D(self) -> Tensor:
        """True where an input was zero in every token."""
        return self.diagonal_D == 0

    @cached_property
    def mean_diagonal(self) -> float:
        """Mean of the diagonal over live inputs (1 if there are none)."""
        live_D = self.diagonal_D[~self.dead_D]
        return float(live_D.mean()) if live_D.numel() else 1.0

    @property
    def rounding(self) -> float:
        """Bounds the relative error of a float64 sum over the inputs, and a few operations more."""
        return (self.num_inputs + 4) * 0.5 * torch.finfo(torch.float64).eps

    @cached_property
    def factorisation(self) -> Factorisation:
        """The one Cholesky factorisation, with more damping than requested only if it cannot be had otherwise."""
        damping = self.requested_damping
        damped_DD = self.damped(damping)
        while True:
            factor_DD, info = torch.linalg.cholesky_ex(damped_DD)
            condition = _condition(damped_DD, factor_DD)
            if not int(info) and condition * self.rounding <= LARGEST_ROUNDING:
                self._matrix_DD = damped_DD
                return Factorisation(damped_DD, factor_DD, damping, condition)
            if damping == self.requested_damping:
                self._refuse_indefinite()
            if damping >= 1.0:
                raise NumericalError("the hessian cannot be factorised even with damping 1: check its entries")
            damping = min(max(10.0 * damping, SMALLEST_DAMPING), 1.0)
            damped_DD.diagonal().copy_(self._damped_diagonal(damping))

    def _refuse_indefinite(self) -> None:
        spectrum_D = torch.linalg.eigvalsh(self.matrix_DD)
        lowest, largest = float(spectrum_D[0]), float(spectrum_D[-1])
        if lowest < -INDEFINITE * largest:
            raise NumericalError(
                f"the hessian is indefinite beyond rounding (eigenvalues from {lowest:.3g} to {largest:.3g}): "
                f"it is not X^T X of real inputs: {REMEDY}"
            )

    def damped(self, damping: float) -> Tensor:
        """H + damping * mean(diag H) * I in float64, dead inputs decoupled: a (D, D) copy, made at each call."""
        return self._with_diagonal(self._damped_diagonal(damping))

    def _damped_diagonal(self, damping: float) -> Tensor:
        return torch.where(self.dead_D, self.mean_diagonal, self.diagonal_D + damping * self.mean_diagonal)

    def _with_diagonal(self, diagonal_D: Tensor) -> Tensor:
        matrix_DD = self._matrix_DD.to(torch.float64, copy=True)
        mirror(matrix_DD)  # a Cholesky reads one triangle, products read both
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
        """K = (damped H)^-1, float64."""
        return torch.cholesky_inverse(self.factor_DD)

    @cached_property
    def inverse_factor_DD(self) -> Tensor:
        """Upper Cholesky factor U of K = U^T U, float64: its rows are those of inverses without the columns before."""
        upper_DD: Tensor = torch.linalg.cholesky(self.inverse_DD, upper=True)
        return upper_DD

    @cached_property
    def inverse_diagonal_D(self) -> Tensor:
        """Diagonal of K, float64: from K if it has been made, else the squared norms of the columns of L^-1."""
        if "inverse_DD" in vars(self):
            return self.inverse_DD.diagonal()
        diagonal_D = torch.empty_like(self.diagonal_D)
        step = COLUMNS if self.device.type == "cpu" else COLUMNS_ELSEWHERE
        for begin in range(0, self.num_inputs, step):
            columns = diagonal_D[begin : begin + step]
            below_NN = self.factor_DD[begin:, begin:]
            identity_NC = torch.eye(len(below_NN), len(columns), dtype=below_NN.dtype, device=self.device)
            columns.copy_(torch.linalg.solve_triangular(below_NN, identity_NC, upper=False).square_().sum(dim=0))
        return diagonal_D

    def loss(self, change_OD: Tensor) -> Tensor:
        """diag(change H change^T), H undamped: each row's mean square change of output, float64 of shape (O,).

        Products are those of ``working_dtype``, which is float32 but for ill-conditioned H; sums are float64.
        """
        dtype, size = self.working_dtype, max(BLOCK_ENTRIES // max(self.num_inputs, 1), 1)
        change_OD = self._live(change_OD)
        damped_O = self.diagonal_D.new_empty(len(change_OD))
        for change_RD, damped_R in zip(change_OD.split(size), damped_O.split(size), strict=True):
            change_RD = change_RD.to(dtype)
            product_RD = multiply(change_RD, self.operator(dtype))
            damped_R.copy_(product_RD.mul_(change_RD).sum(dim=1, dtype=torch.float64))
        return self.undamped(damped_O * self.mean_diagonal, change_OD)

    def undamped(self, damped_O: Tensor, change_OD: Tensor) -> Tensor:
        """``loss`` of changes, (O, D), of which diag(change H change^T) with the damped H is known."""
        length_O = torch.linalg.vector_norm(self._live(change_OD), dim=1, dtype=torch.float64)
        loss_O: Tensor = (damped_O - self.damping * self.mean_diagonal * length_O.square()).clamp_min(0.0)
        return loss_O

    def _live(self, rows_RD: Tensor) -> Tensor:
        return rows_RD.masked_fill(self.dead_D, 0.0) if bool(self.dead_D.any()) else rows_RD

    @property
    def condition(self) -> float:
        """An upper bound on the condition number of the damped H scaled to a unit diagonal.

        Scaled, because rounding errors of products and factors scale along with the units of the inputs.
        """
        return self.factorisation.condition

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

    def operator(self, dtype: torch.dtype) -> Tensor:
        """The damped H in units of its mean diagonal, for ``products.multiply`` with rows in ``dtype``; made once."""
        return self.memo(("operator", dtype), lambda: pack(scaled(self.damped_DD, 1.0 / self.mean_diagonal, dtype)))

    def whitener(self, dtype: torch.dtype) -> SharedFactor:
        """L in the same units, ready to measure L^-1 r of rows; made once."""
        return self.memo(("whitener", dtype), lambda: SharedFactor(self.factor_DD, self.mean_diagonal**-0.5, dtype))


def _condition(damped_DD: Tensor, factor_DD: Tensor) -> float:
    """D times a bound on the largest eigenvalue of A = C^-1, C the damped H scaled to a unit diagonal (trace C = D).

    With x uniform on the sphere, that eigenvalue exceeds MARGIN ||A^q x||^(1/q) with a probability of at most
    0.8 MARGIN^-q sqrt(D) (Dixon, SIAM J. Numer. Anal. 20, 1983, theorem 1 with k = 2 q); the largest of 8 directions
    and q = 3 leave 1e-8 at D = 16,384. A factor that is not finite has no bound.
    """
    if not factor_DD.numel():
        return 1.0
    vector_DK = fixed_directions(DIRECTIONS, factor_DD).mT
    vector_DK /= torch.linalg.vector_norm(vector_DK, dim=0)
    scale_D1 = damped_DD.diagonal().sqrt()[:, None]
    logarithm_K = vector_DK.new_zeros(DIRECTIONS)
    for _ in range(APPLICATIONS):
        half_DK = torch.linalg.solve_triangular(factor_DD, vector_DK * scale_D1, upper=False)
        vector_DK = torch.linalg.solve_triangular(factor_DD.mT, half_DK, upper=True) * scale_D1
        norm_K = torch.linalg.vector_norm(vector_DK, dim=0)
        vector_DK /= norm_K
        logarithm_K += norm_K.log()
    largest = float((logarithm_K / APPLICATIONS).exp().max())
    return len(factor_DD) * MARGIN * largest if math.isfinite(largest) else math.inf
