"""The QP engine's problem in plain float64 numpy, written from its definition and sharing no code with the engine.

Shapes: T tokens, D inputs, R rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import solve
from torch import Tensor

from optima.core import Hessian, RowProblem, make_problem

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
    """

    hessian_DD: Array
    target_RD: Array
    keep_RD: NDArray[np.bool_]

    @property
    def energy_R(self) -> Array:
        """1/2 sum_i H_ii w_i^2."""
        energy: Array = 0.5 * self.target_RD**2 @ self.hessian_DD.diagonal()
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
        """The minimiser of every row, by the normal equations."""
        result = np.zeros_like(self.target_RD)
        for row, kept in enumerate(self.keep_RD):
            if kept.any():
                gradient = self.hessian_DD @ self.target_RD[row]
                result[row, kept] = solve(self.hessian_DD[np.ix_(kept, kept)], gradient[kept], assume_a="pos")
        return result

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

    return Reference(hessian_DD, target_RD, problem.keep_RD.numpy())


def make_layer(
    rows: int, num_inputs: int, seed: int = 0, kept: float = 0.5, spread: float = 1.0, damping: float = 0.01
) -> tuple[Hessian, RowProblem, Reference]:
    """A Hessian, rows that share it, and the reference for them."""
    matrix_DD = make_matrix(num_inputs, 2 * num_inputs, seed, spread)
    hessian = Hessian(matrix_DD, damping)
    problem = make_problem(hessian, *make_rows(rows, num_inputs, seed + 1, kept))
    return hessian, problem, reference(matrix_DD, damping, problem)
