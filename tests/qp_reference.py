"""The QP engine's problem in plain float64 numpy, written from its definition and sharing no code with the engine.

Shapes: T tokens, D inputs, R rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import cholesky, solve
from scipy.optimize import lsq_linear
from torch import Tensor

from optima.qp import Hessian, RowProblem, make_problem

Array = NDArray[np.float64]

# What float64 leaves of an error, relative to the row's energy.
ROUNDING = 1e-13
# Of the certificate: optima that lose less than this share of their energy count as losing as much.
FLOOR = 1e-8


def make_matrix(num_inputs: int, tokens: int, seed: int, spread: float = 1.0) -> Tensor:
    """X^T X / T in float32 of correlated inputs whose scales spread over that many powers of ten, either way."""
    rng = np.random.default_rng(seed)
    latent = rng.standard_normal((tokens, num_inputs))
    mixing = np.eye(num_inputs) + 2.0 / max(num_inputs, 1) ** 0.5 * rng.standard_normal((num_inputs, num_inputs))
    inputs_TD = (latent @ mixing) * 10.0 ** rng.uniform(-spread, spread, num_inputs)
    return torch.tensor(inputs_TD.T @ inputs_TD / tokens, dtype=torch.float32)


def make_rows(rows: int, num_inputs: int, seed: int, kept: float = 0.5) -> tuple[Tensor, Tensor]:
    """Random float32 weights, and a random mask that keeps a different set in every row."""
    rng = np.random.default_rng(seed)
    weight_RD = torch.tensor(rng.standard_normal((rows, num_inputs)), dtype=torch.float32)
    return weight_RD, torch.tensor(rng.random((rows, num_inputs)) < kept)


@dataclass(frozen=True)
class Reference:
    """One layer's problem and its exact answer, as far as float64 goes.

    Attributes:
        hessian_DD: with the damping on its diagonal.
        target_RD: dense weights.
        keep_RD: True = survives.
        lower_RD: -inf where there is no bound.
        upper_RD: inf where there is no bound.
    """

    hessian_DD: Array
    target_RD: Array
    keep_RD: NDArray[np.bool_]
    lower_RD: Array
    upper_RD: Array

    @property
    def energy_R(self) -> Array:
        """1/2 sum_i H_ii w_i^2, of the larger of the target and its projection on the bounds."""
        inside = np.where(self.keep_RD, np.clip(self.target_RD, self.lower_RD, self.upper_RD), 0.0)
        largest = np.maximum(np.abs(self.target_RD), np.abs(inside))
        energy: Array = 0.5 * largest**2 @ self.hessian_DD.diagonal()
        return energy

    def loss(self, weight_RD: Tensor | Array) -> Array:
        """E of every row."""
        difference = np.asarray(weight_RD, dtype=np.float64) - self.target_RD
        loss: Array = 0.5 * np.einsum("rd,de,re->r", difference, self.hessian_DD, difference)
        return loss

    def distance(self, one_RD: Tensor | Array, other_RD: Tensor | Array) -> Array:
        """1/2 |one - other|_H^2 of every row; to the optimum it is at most E - E*."""
        difference = np.asarray(one_RD, dtype=np.float64) - np.asarray(other_RD, dtype=np.float64)
        distance: Array = 0.5 * np.einsum("rd,de,re->r", difference, self.hessian_DD, difference)
        return distance

    def optimum(self) -> Array:
        """The minimiser of every row: the normal equations, or an active-set method where there are bounds."""
        result = np.zeros_like(self.target_RD)
        for row, kept in enumerate(self.keep_RD):
            if kept.any():
                result[row, kept] = self._solve(row, kept)
        return result

    def _solve(self, row: int, kept: NDArray[np.bool_]) -> Array:
        lower, upper = self.lower_RD[row], self.upper_RD[row]
        if np.isinf(lower[kept]).all() and np.isinf(upper[kept]).all():
            gradient = self.hessian_DD @ self.target_RD[row]
            free: Array = solve(self.hessian_DD[np.ix_(kept, kept)], gradient[kept], assume_a="pos")
            return free
        # E = 1/2 |L^T (v - w)|^2, least squares in the weights that the bounds leave any room.
        fixed = np.where(kept & (lower == upper), lower, 0.0)
        free_D = kept & (lower < upper)
        root_DD = cholesky(self.hessian_DD, lower=False)
        right = root_DD @ (self.target_RD[row] - fixed)
        if free_D.any():
            bounds = (lower[free_D], upper[free_D])
            fixed[free_D] = lsq_linear(root_DD[:, free_D], right, bounds, method="bvls", tol=1e-15).x
        answer: Array = np.clip(fixed, lower, upper)[kept]
        return answer

    def allowance(self, gap: Array | float) -> Array:
        """The largest E that a row with this gap may have."""
        best = self.loss(self.optimum())
        largest: Array = best + gap * np.maximum(best, FLOOR * self.energy_R) + ROUNDING * self.energy_R
        return largest


def reference(matrix_DD: Tensor, damping: float, problem: RowProblem) -> Reference:
    """The reference for a problem without dead inputs, of which the damping was enough."""
    hessian_DD = matrix_DD.double().numpy()
    hessian_DD = hessian_DD + damping * hessian_DD.diagonal().mean() * np.eye(len(hessian_DD))
    target_RD = problem.target_RD.double().numpy()

    def bound(tensor: Tensor | None, missing: float) -> Array:
        return np.full_like(target_RD, missing) if tensor is None else tensor.double().numpy()

    lower_RD, upper_RD = bound(problem.lower_RD, -np.inf), bound(problem.upper_RD, np.inf)
    return Reference(hessian_DD, target_RD, problem.keep_RD.numpy(), lower_RD, upper_RD)


def make_layer(
    rows: int, num_inputs: int, seed: int = 0, kept: float = 0.5, spread: float = 1.0, damping: float = 0.01
) -> tuple[Hessian, RowProblem, Reference]:
    """A Hessian, rows that share it, and the reference for them."""
    matrix_DD = make_matrix(num_inputs, 2 * num_inputs, seed, spread)
    hessian = Hessian(matrix_DD, damping)
    problem = make_problem(hessian, *make_rows(rows, num_inputs, seed + 1, kept))
    return hessian, problem, reference(matrix_DD, damping, problem)
