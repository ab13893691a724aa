"""The QP engine against solvers that are not ours, at tight tolerances.

Shapes: R rows, D inputs, N free weights of one row.
"""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from numpy.typing import NDArray
from qp_reference import Reference, make_layer, make_matrix

from optima.core import (
    Auto,
    BatchedCholesky,
    Hessian,
    LowRankCG,
    RowProblem,
    RowSolver,
    make_problem,
    solve_rows,
)
from optima.core.hessian import COLUMNS

GAP = 1e-9
Array = NDArray[np.float64]


def scipy_row(truth: Reference, row: int) -> Array:
    """The normal equations on the kept set, by LAPACK's symmetric indefinite solver."""
    kept = truth.keep_RD[row]
    weight_D = np.zeros(len(kept))
    right = (truth.hessian_DD @ truth.target_RD[row])[kept]
    weight_D[kept] = scipy.linalg.solve(truth.hessian_DD[np.ix_(kept, kept)], right, assume_a="sym")
    return weight_D


def assert_agree(problem: RowProblem, truth: Reference, theirs_RD: Array, ours_RD: torch.Tensor, gap: float) -> None:
    """Neither is better than the other by more than its tolerance, and they are close in H's norm."""
    best_R, found_R = truth.loss(theirs_RD), truth.loss(ours_RD)
    room_R = gap * best_R + 1e-10 * truth.energy_R
    assert (found_R <= best_R + room_R).all(), "they found better weights"
    assert (best_R <= found_R + room_R).all(), "the oracle is off"
    assert (truth.distance(ours_RD, theirs_RD) <= 4 * room_R).all()
    assert not ours_RD[~problem.keep_RD].any()


@pytest.mark.parametrize("solver", [LowRankCG(GAP), BatchedCholesky(GAP), Auto(GAP)], ids=str)
@pytest.mark.parametrize("kept", [0.2, 0.5, 0.8])
def test_rows_against_scipy(solver: RowSolver, kept: float) -> None:
    hessian, problem, truth = make_layer(8, 64, seed=1, kept=kept)
    problem = make_problem(hessian, problem.target_RD.double(), problem.keep_RD)
    theirs_RD = np.stack([scipy_row(truth, row) for row in range(8)])
    assert_agree(problem, truth, theirs_RD, solve_rows(solver, hessian, problem).weight_RD, GAP)


def test_float64_cholesky_is_scipy_to_the_last_digits() -> None:
    hessian, problem, truth = make_layer(8, 64, seed=2)
    problem = make_problem(hessian, problem.target_RD.double(), problem.keep_RD)
    # A gap is a square: half as many digits of the weights are right.
    solution = solve_rows(BatchedCholesky(1e-22), hessian, problem)
    theirs_RD = np.stack([scipy_row(truth, row) for row in range(8)])
    np.testing.assert_allclose(solution.weight_RD, theirs_RD, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("num_inputs", [0, 1, COLUMNS, COLUMNS + 44])
def test_the_inverses_diagonal_against_numpy(num_inputs: int) -> None:
    hessian = Hessian(make_matrix(num_inputs, tokens=max(2 * num_inputs, 1), seed=0), 0.01)
    diagonal_D = np.diag(np.linalg.inv(hessian.damped_DD.numpy()))
    np.testing.assert_allclose(hessian.inverse_diagonal_D.numpy(), diagonal_D, rtol=1e-9)
    assert "inverse_DD" not in vars(hessian), "all of the inverse was made for its diagonal"
    inverted = Hessian(hessian.matrix_DD, 0.01)
    assert torch.equal(inverted.inverse_DD.diagonal(), inverted.inverse_diagonal_D)
