"""The QP engine against solvers that are not ours, at tight tolerances.

Shapes: R rows, D inputs, N free weights of one row.
"""

from __future__ import annotations

import clarabel
import numpy as np
import pytest
import scipy.linalg
import torch
from numpy.typing import NDArray
from qp_reference import Reference, make_layer, make_matrix, make_rows, reference
from scipy import sparse

from optima.linalg.hessian import COLUMNS
from optima.qp import (
    Auto,
    BatchedCholesky,
    Bounded,
    Hessian,
    LowRankCG,
    RowProblem,
    RowSolver,
    SharedInverseCG,
    make_problem,
    solve,
    solve_rows,
)

GAP = 1e-9
Array = NDArray[np.float64]


def scipy_row(truth: Reference, row: int) -> Array:
    """The normal equations on the kept set, by LAPACK's symmetric indefinite solver."""
    kept = truth.keep_RD[row]
    weight_D = np.zeros(len(kept))
    right = (truth.hessian_DD @ truth.target_RD[row])[kept]
    weight_D[kept] = scipy.linalg.solve(truth.hessian_DD[np.ix_(kept, kept)], right, assume_a="sym")
    return weight_D


def clarabel_row(truth: Reference, row: int) -> Array:
    """An interior-point method on one row: minimise 1/2 v'Hv - g'v, lower <= v <= upper, over the kept weights."""
    kept = truth.keep_RD[row]
    lower, upper = truth.lower_RD[row, kept], truth.upper_RD[row, kept]
    unit = truth.hessian_DD.diagonal().mean()
    matrix_NN = sparse.csc_matrix(np.triu(truth.hessian_DD[np.ix_(kept, kept)]) / unit)
    linear_N = -(truth.hessian_DD @ truth.target_RD[row])[kept] / unit
    above, below = np.isfinite(upper), np.isfinite(lower)
    identity_NN = sparse.identity(len(linear_N), format="csr")
    constraints = sparse.csc_matrix(sparse.vstack([identity_NN[above], -identity_NN[below]]))
    right = np.concatenate([upper[above], -lower[below]])
    settings = clarabel.DefaultSettings()
    settings.verbose = False
    settings.tol_gap_abs = settings.tol_gap_rel = settings.tol_feas = 1e-11
    cones = [clarabel.NonnegativeConeT(len(right))]
    answer = clarabel.DefaultSolver(matrix_NN, linear_N, constraints, right, cones, settings).solve()
    assert str(answer.status) in ("Solved", "AlmostSolved")
    weight_D = np.zeros(len(kept))
    # Interior points are feasible up to their tolerance only.
    weight_D[kept] = np.clip(answer.x, lower, upper)
    return weight_D


def assert_agree(problem: RowProblem, truth: Reference, theirs_RD: Array, ours_RD: torch.Tensor, gap: float) -> None:
    """Neither is better than the other by more than its tolerance, and they are close in H's norm."""
    best_R, found_R = truth.loss(theirs_RD), truth.loss(ours_RD)
    room_R = gap * best_R + 1e-10 * truth.energy_R
    assert (found_R <= best_R + room_R).all(), "they found better weights"
    assert (best_R <= found_R + room_R).all(), "the oracle is off"
    assert (truth.distance(ours_RD, theirs_RD) <= 4 * room_R).all()
    assert not ours_RD[~problem.keep_RD].any()


@pytest.mark.parametrize(
    "solver", [SharedInverseCG(GAP), LowRankCG(GAP), BatchedCholesky(GAP), Bounded(GAP), Auto(GAP)], ids=str
)
@pytest.mark.parametrize("kept", [0.2, 0.5, 0.8])
def test_unbounded_rows_against_scipy(solver: RowSolver, kept: float) -> None:
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


@pytest.mark.parametrize("solver", [Bounded(GAP), Auto(GAP)], ids=str)
@pytest.mark.parametrize("room", [0.01, 0.1, 1.0])
def test_bounded_rows_against_clarabel(solver: RowSolver, room: float) -> None:
    """A trust region around the dense weights, where nearly all, many and few bounds are active."""
    matrix_DD = make_matrix(48, 96, seed=3)
    hessian = Hessian(matrix_DD)
    weight_RD, keep_RD = make_rows(8, 48, seed=4)
    weight_RD = weight_RD.double()
    problem = make_problem(hessian, weight_RD, keep_RD, None, weight_RD - room, weight_RD + room)
    truth = reference(matrix_DD, 0.01, problem)
    theirs_RD = np.stack([clarabel_row(truth, row) for row in range(8)])
    assert_agree(problem, truth, theirs_RD, solve_rows(solver, hessian, problem).weight_RD, GAP)


@pytest.mark.parametrize("side", [-1.0, 1.0])
def test_one_sided_rows_against_clarabel(side: float) -> None:
    """Weights that may not change sign: only a lower bound where they are positive, only an upper one elsewhere."""
    matrix_DD = make_matrix(48, 96, seed=5)
    weight_RD, keep_RD = make_rows(8, 48, seed=6)
    weight_RD = side * weight_RD.double()
    infinite_RD = torch.full_like(weight_RD, torch.inf)
    zero_RD = torch.zeros_like(weight_RD)
    lower_RD = torch.where(weight_RD > 0, zero_RD, -infinite_RD)
    upper_RD = torch.where(weight_RD > 0, infinite_RD, zero_RD)
    hessian = Hessian(matrix_DD)
    problem = make_problem(hessian, weight_RD, keep_RD, None, lower_RD, upper_RD)
    truth = reference(matrix_DD, 0.01, problem)
    theirs_RD = np.stack([clarabel_row(truth, row) for row in range(8)])
    assert_agree(problem, truth, theirs_RD, solve_rows(Bounded(GAP), hessian, problem).weight_RD, GAP)


def test_a_linear_term_against_clarabel() -> None:
    """The general program, of which the linear term belongs to no dense row that anyone has seen."""
    matrix_DD = make_matrix(32, 64, seed=7).double()
    linear_RD, keep_RD = make_rows(6, 32, seed=8)
    linear_RD = linear_RD.double()
    bound_RD = torch.full_like(linear_RD, 0.02)
    hessian = Hessian(matrix_DD)
    args = {"lower": -bound_RD, "upper": bound_RD}
    ours_RD = solve(hessian, keep=keep_RD, linear_term=linear_RD, solver=Bounded(GAP), **args).weight_RD
    target_RD = torch.linalg.solve(hessian.damped_DD, linear_RD.mT).mT
    problem = make_problem(hessian, target_RD, keep_RD, None, -bound_RD, bound_RD)
    truth = reference(matrix_DD, 0.01, problem)
    theirs_RD = np.stack([clarabel_row(truth, row) for row in range(6)])
    assert_agree(problem, truth, theirs_RD, ours_RD, GAP)


def test_the_reference_of_other_tests_agrees_with_clarabel() -> None:
    matrix_DD = make_matrix(40, 80, seed=9)
    weight_RD, keep_RD = make_rows(10, 40, seed=10)
    hessian = Hessian(matrix_DD)
    problem = make_problem(hessian, weight_RD, keep_RD, None, weight_RD - 0.1, weight_RD + 0.2)
    truth = reference(matrix_DD, 0.01, problem)
    theirs_RD = np.stack([clarabel_row(truth, row) for row in range(10)])
    np.testing.assert_allclose(truth.optimum(), theirs_RD, atol=1e-7)


@pytest.mark.parametrize("num_inputs", [0, 1, COLUMNS, COLUMNS + 44])
def test_the_inverses_diagonal_against_numpy(num_inputs: int) -> None:
    hessian = Hessian(make_matrix(num_inputs, tokens=max(2 * num_inputs, 1), seed=0), 0.01)
    diagonal_D = np.diag(np.linalg.inv(hessian.damped_DD.numpy()))
    np.testing.assert_allclose(hessian.inverse_diagonal_D.numpy(), diagonal_D, rtol=1e-9)
    assert "inverse_DD" not in vars(hessian), "all of the inverse was made for its diagonal"
    inverted = Hessian(hessian.matrix_DD, 0.01)
    assert torch.equal(inverted.inverse_DD.diagonal(), inverted.inverse_diagonal_D)
