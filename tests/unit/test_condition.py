"""Ill-conditioned Hessians: the condition is bounded from above, and certificates hold in exact arithmetic.

Shapes: D inputs, S kept weights of a row.
"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from qp_reference import make_layer, make_matrix, make_rows
from torch import Tensor

from optima.core import Hessian, LowRankCG, certify, make_problem, make_solver, solve, solve_rows
from optima.errors import NumericalError, RecipeError


def wilkinson(size: int) -> Tensor:
    """L L^T with 1 on L's diagonal and -1 below: no pivot is small, and L^-1 grows as 2^D."""
    factor_DD = torch.eye(size, dtype=torch.float64) - torch.ones(size, size, dtype=torch.float64).tril(-1)
    return factor_DD @ factor_DD.mT


def exact_excess(matrix_DD: Tensor, target_D: Tensor, keep_D: Tensor, weight_D: Tensor) -> Fraction:
    """E(v) - E(v*) = 1/2 r_S^T H_SS^-1 r_S in rational arithmetic, for the float64 numbers as they are."""
    matrix = [[Fraction(value) for value in row] for row in matrix_DD.tolist()]
    away = [
        Fraction(w) - Fraction(v) for w, v in zip(target_D.double().tolist(), weight_D.double().tolist(), strict=True)
    ]
    kept = keep_D.nonzero()[:, 0].tolist()
    residual = [sum((matrix[i][j] * away[j] for j in range(len(away))), Fraction(0)) for i in kept]
    # Elimination on [H_SS | r_S] leaves r_S^T H_SS^-1 r_S as the sum of squares over pivots.
    system = [[matrix[i][j] for j in kept] + [r] for i, r in zip(kept, residual, strict=True)]
    total = Fraction(0)
    for step, pivot_row in enumerate(system):
        total += pivot_row[-1] ** 2 / pivot_row[step]
        for row in system[step + 1 :]:
            share = row[step] / pivot_row[step]
            for column in range(step, len(row)):
                row[column] -= share * pivot_row[column]
    return total / 2


SLOW = pytest.param(60, 1, marks=pytest.mark.slow)


@pytest.mark.parametrize(("size", "dropped"), [(20, 2), (20, 5), (24, 2), (26, 2), (27, 1), (28, 3), (34, 5), SLOW])
def test_certificates_hold_where_no_pivot_shows_the_condition(size: int, dropped: int) -> None:
    """Solved as far as float64 goes, where the residual is rounding and K as large as 2^(2 D)."""
    hessian = Hessian(wilkinson(size), damping=0.0)
    weight_RD = torch.randn(6, size, generator=torch.Generator().manual_seed(size), dtype=torch.float64)
    keep_RD = (torch.arange(size) < size - dropped).expand(6, size)
    problem = make_problem(hessian, weight_RD, keep_RD)
    point_RD = solve_rows(LowRankCG(1e-8), hessian, problem).weight_RD
    bound_R = certify(hessian, problem, point_RD).bound_R
    for row in range(6):
        excess = exact_excess(hessian.damped_DD, problem.target_RD[row], keep_RD[row], point_RD[row])
        assert excess <= Fraction(float(bound_R[row])), f"row {row}: {float(excess)} above {float(bound_R[row])}"


@pytest.mark.parametrize("damping", [1e-8, 1e-4, 0.01, 1.0])
def test_the_condition_is_bounded_from_above_and_not_wildly(damping: float) -> None:
    for matrix_DD in (wilkinson(12), make_matrix(48, 12, seed=1), make_matrix(48, 200, seed=2, spread=3.0)):
        hessian = Hessian(matrix_DD, damping)
        scale_D = hessian.damped_DD.diagonal().rsqrt()
        truth = float(torch.linalg.cond(hessian.damped_DD * scale_D * scale_D[:, None]))
        assert truth <= hessian.condition <= 1e3 * truth * len(matrix_DD)


def test_a_bound_in_float32_near_its_limit_is_one() -> None:
    """As ill-conditioned as float32 may be, with inverses of blocks in its norm; against LAPACK in float64."""
    hessian = Hessian(make_matrix(300, 150, seed=1), 1.5e-5)
    assert 2e7 < hessian.condition < 1e8
    assert hessian.working_dtype == torch.float32
    weight_RD, keep_RD = make_rows(40, 300, seed=2)
    problem = make_problem(hessian, weight_RD, keep_RD)
    for point_RD in (weight_RD * keep_RD, solve_rows(LowRankCG(), hessian, problem).weight_RD):
        bound_R = certify(hessian, problem, point_RD).bound_R.numpy()
        matrix_DD, away_RD = hessian.damped_DD.numpy(), (weight_RD.double() - point_RD.double()).numpy()
        for row, keep_D in enumerate(keep_RD.numpy()):
            residual_S = (away_RD[row] @ matrix_DD)[keep_D]
            excess = 0.5 * residual_S @ np.linalg.solve(matrix_DD[np.ix_(keep_D, keep_D)], residual_S)
            assert excess <= bound_R[row]


def test_no_global_switch_lowers_a_bound() -> None:
    """Where float32 products may be made of bfloat16 numbers."""
    hessian, problem, _ = make_layer(200, 300)
    weight_RD = problem.target_RD * problem.keep_RD
    exact = certify(hessian, problem, weight_RD)
    torch.set_float32_matmul_precision("medium")
    try:
        found = certify(hessian, problem, weight_RD)
        solved = solve(hessian, problem.target_RD, problem.keep_RD)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(found.bound_R, exact.bound_R)
    assert torch.equal(solved.gap_R, solve(hessian, problem.target_RD, problem.keep_RD).gap_R)


def test_a_numerically_singular_hessian_is_damped_and_says_so() -> None:
    hessian = Hessian(wilkinson(60), damping=0.0)
    assert 0.0 < hessian.damping <= 1e-6
    assert hessian.condition <= 1e13


@pytest.mark.parametrize("solver", ["low-rank-cg", "cholesky"])
def test_rows_that_lose_next_to_nothing_are_certified(solver: str) -> None:
    """As of a sparse model whose zeros drifted: what must be lost is below the floor that a gap is relative to."""
    generator = torch.Generator().manual_seed(0)
    factors_FD, own_TD = (torch.randn(n, 64, generator=generator) for n in (8, 256))
    hessian = Hessian((factors_FD.mT @ factors_FD / 8 + 0.1 * own_TD.mT @ own_TD / 256).double(), 0.01)
    dense_RD = torch.randn(300, 64, generator=generator)
    keep_RD = torch.rand(300, 64, generator=generator) > 0.5
    drifted_RD = torch.where(keep_RD, dense_RD, 3e-5 * dense_RD)
    solution = solve_rows(make_solver(solver, 1e-4), hessian, make_problem(hessian, drifted_RD, keep_RD))
    assert bool((solution.gap_R <= 1e-4).all()), float(solution.gap_R.max())


def test_a_point_that_is_not_feasible_has_no_certificate() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs_TD, dense_RD = torch.randn(64, 16, generator=generator), torch.randn(4, 16, generator=generator)
    hessian, keep_RD = Hessian(inputs_TD.mT @ inputs_TD / 64), torch.rand(4, 16, generator=generator) > 0.5
    problem = make_problem(hessian, dense_RD, keep_RD)
    assert bool(certify(hessian, problem, dense_RD * keep_RD).bound_R.isfinite().all())
    with pytest.raises(RecipeError, match="not zero off keep"):
        certify(hessian, problem, dense_RD)


@pytest.mark.parametrize(("size", "kept", "seed"), [(6, 4, 6), (2, 1, 2)])
def test_bounds_hold_where_the_residual_is_rounding(size: int, kept: int, seed: int) -> None:
    """At the optimum as float64 has it, where the residual of one kept weight is rounded to zero: exact arithmetic."""
    root_DD = torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    hessian = Hessian(root_DD @ root_DD.mT, damping=0.0)
    weight_RD = torch.randn(80, size, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    keep_RD = (torch.arange(size) < kept).expand(80, size)
    problem, damped_DD = make_problem(hessian, weight_RD, keep_RD), hessian.damped_DD
    optimum_RD = torch.zeros_like(weight_RD)
    optimum_RD[:, :kept] = torch.linalg.solve(damped_DD[:kept, :kept], (weight_RD @ damped_DD)[:, :kept].mT).mT
    bound_R = certify(hessian, problem, optimum_RD).bound_R
    for row in range(80):
        excess = exact_excess(damped_DD, weight_RD[row], keep_RD[row], optimum_RD[row])
        assert excess <= Fraction(float(bound_R[row])), row


@pytest.mark.parametrize("value", [1e38, math.nan, math.inf, -math.inf])
def test_weights_that_are_too_large_to_certify_are_not_optimal(value: float) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs_TD = torch.randn(64, 16, generator=generator)
    dense_RD = 1e-3 * torch.randn(4, 16, generator=generator)
    hessian, keep_RD = Hessian(inputs_TD.mT @ inputs_TD / 64), torch.ones(4, 16, dtype=torch.bool)
    keep_RD[:, 8:] = False
    problem = make_problem(hessian, dense_RD, keep_RD)
    weight_RD = dense_RD * keep_RD
    weight_RD[0, 0] = value
    if math.isfinite(value):
        found = certify(hessian, problem, weight_RD)
        assert found.bound_R[0] == found.gap_R[0] == math.inf
        assert bool(found.gap_R[1:].isfinite().all())
    else:
        with pytest.raises(NumericalError, match="contain NaN or Inf"):
            certify(hessian, problem, weight_RD)
