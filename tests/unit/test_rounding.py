"""Rounding to a checkpoint's dtype, against the exact optimum of every row in float64.

Shapes: D inputs, R rows.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from qp_reference import Reference, make_layer, make_matrix, make_rows, reference
from torch import Tensor

from optima.errors import RecipeError
from optima.linear import above_least
from optima.qp import Auto, Bounded, Hessian, RowProblem, RowSolution, make_problem, solve_rows
from optima.qp.rounding import Rounded, round_rows

Layer = tuple[Hessian, RowProblem, Reference]
DTYPES = [torch.bfloat16, torch.float16]


def layer(matrix_DD: Tensor, damping: float, weight_RD: Tensor, keep_RD: Tensor, **bounds: Tensor) -> Layer:
    hessian = Hessian(matrix_DD, damping)
    problem = make_problem(hessian, weight_RD, keep_RD, **bounds)
    return hessian, problem, reference(matrix_DD, hessian.damping, problem)


def collinear(damping: float) -> Layer:
    """Every input has a twin that differs in the fourth digit."""
    base_DD = make_matrix(24, 200, seed=3)
    root_DD = torch.linalg.cholesky(base_DD.double())
    inputs_DD = torch.cat([root_DD, root_DD + 1e-4 * root_DD.roll(1, dims=1)])
    return layer((inputs_DD @ inputs_DD.mT).float(), damping, *make_rows(40, 48, seed=4))


def factors() -> Layer:
    """Inputs that follow four factors, as activations do, and rows of which little is pruned."""
    generator = torch.Generator().manual_seed(0)
    factors_FD = torch.randn(4, 200, generator=generator)
    inputs_TD = torch.randn(500, 4, generator=generator) @ factors_FD + 0.3 * torch.randn(500, 200, generator=generator)
    return layer(inputs_TD.mT @ inputs_TD / 500, 0.001, *make_rows(80, 200, seed=6, kept=0.8))


def two_of_four() -> Layer:
    weight_RD, _ = make_rows(40, 64, seed=5)
    groups = weight_RD.abs().unflatten(1, (-1, 4))
    keep_RD = torch.zeros_like(groups, dtype=torch.bool).scatter_(2, groups.topk(2, dim=2).indices, True)
    return layer(make_matrix(64, 128, seed=6), 0.01, weight_RD, keep_RD.flatten(1))


def bounded() -> Layer:
    weight_RD, keep_RD = make_rows(30, 32, seed=7)
    wide_RD = 0.02 * weight_RD.abs() + 1e-3
    return layer(
        make_matrix(32, 64, seed=8),
        0.01,
        weight_RD,
        keep_RD,
        lower_RD=weight_RD - wide_RD,
        upper_RD=weight_RD + wide_RD,
    )


def one_sided() -> Layer:
    weight_RD, keep_RD = make_rows(30, 32, seed=9)
    return layer(make_matrix(32, 64, seed=8), 0.01, weight_RD, keep_RD, upper_RD=torch.full_like(weight_RD, 0.3))


def scaled(factor: float) -> Layer:
    weight_RD, keep_RD = make_rows(30, 32, seed=10)
    return layer(make_matrix(32, 64, seed=8) / factor, 0.01, factor * weight_RD, keep_RD)


LAYERS = {
    "correlated": lambda: make_layer(60, 96),
    "spread": lambda: make_layer(60, 96, spread=3.0),
    "little-damping": lambda: make_layer(60, 96, damping=1e-6),
    "little-pruned": lambda: make_layer(60, 200, kept=0.95),
    "factors": factors,
    "most-pruned": lambda: make_layer(60, 96, kept=0.1),
    "all-kept": lambda: make_layer(30, 48, kept=1.1),
    "all-pruned": lambda: make_layer(30, 48, kept=-1.0),
    "one-input": lambda: make_layer(30, 1),
    "wide": lambda: make_layer(20, 600),
    "collinear": lambda: collinear(0.01),
    "collinear-little-damping": lambda: collinear(1e-6),
    "2:4": two_of_four,
    "bounded": bounded,
    "one-sided": one_sided,
    "large": lambda: scaled(1e4),
    "small": lambda: scaled(1e-3),
}
every_layer = pytest.mark.parametrize("name", LAYERS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def solved(name: str) -> tuple[Hessian, RowProblem, Reference, RowSolution]:
    hessian, problem, truth = LAYERS[name]()
    return hessian, problem, truth, solve_rows(Auto(), hessian, problem)


def representable(rounded: Rounded, problem: RowProblem, dtype: torch.dtype) -> bool:
    assert rounded.weight_RD.dtype == dtype
    assert rounded.weight_RD.isfinite().all()
    value_RD = rounded.weight_RD.double()
    feasible = (value_RD[~problem.keep_RD] == 0).all()
    if problem.lower_RD is not None:
        feasible &= (value_RD >= problem.lower_RD.double()).all()
    if problem.upper_RD is not None:
        feasible &= (value_RD <= problem.upper_RD.double()).all()
    return bool(feasible)


@every_dtype
@every_layer
def test_the_gap_as_written_is_above_the_truth(name: str, dtype: torch.dtype) -> None:
    """And so is the error; pruned weights stay zero, and bounds hold."""
    hessian, problem, truth, solution = solved(name)
    for method in ("hessian", "nearest"):
        rounded = round_rows(hessian, problem, solution, dtype, method)
        assert representable(rounded, problem, dtype)
        loss_R = truth.loss(rounded.weight_RD.double())
        assert (loss_R <= truth.allowance(rounded.gap_R.numpy())).all()
        assert (loss_R <= rounded.error_R.numpy() + 1e-12 * truth.energy_R).all()


@every_dtype
@every_layer
def test_no_row_is_worse_than_the_nearest_numbers(name: str, dtype: torch.dtype) -> None:
    hessian, problem, truth, solution = solved(name)
    losses = [
        truth.loss(round_rows(hessian, problem, solution, dtype, method).weight_RD.double())
        for method in ("hessian", "nearest")
    ]
    assert (losses[0] <= losses[1] + 1e-9 * losses[1] + 1e-13 * truth.energy_R).all()


def test_the_gap_as_written_is_not_far_above_the_truth() -> None:
    hessian, problem, truth, solution = solved("correlated")
    rounded = round_rows(hessian, problem, solution, torch.bfloat16)
    best_R = truth.loss(truth.optimum())
    gap_R = truth.loss(rounded.weight_RD.double()) / best_R - 1.0
    assert (rounded.gap_R.numpy() <= 1.01 * (gap_R + solution.gap_R.numpy()) + 1e-6).all()


@pytest.mark.parametrize("name", ["factors", "little-pruned", "collinear", "collinear-little-damping"])
def test_small_weights_make_up_for_the_errors_of_large_ones(name: str) -> None:
    hessian, problem, truth, solution = solved(name)
    best_R = truth.loss(truth.optimum())
    gaps = [
        truth.loss(round_rows(hessian, problem, solution, torch.bfloat16, method).weight_RD.double()) / best_R - 1.0
        for method in ("hessian", "nearest")
    ]
    assert np.max(gaps[0]) < 0.5 * np.max(gaps[1])
    assert np.sum(gaps[0] * best_R) < 0.7 * np.sum(gaps[1] * best_R)


def test_a_dead_input_costs_nothing() -> None:
    live_D = torch.arange(40) % 5 != 0
    matrix_DD = make_matrix(40, 80, seed=1) * live_D * live_D[:, None]
    hessian = Hessian(matrix_DD)
    problem = make_problem(hessian, *make_rows(20, 40, seed=2))
    rounded = round_rows(hessian, problem, solve_rows(Auto(), hessian, problem), torch.bfloat16)
    live = RowProblem(problem.target_RD[:, live_D], problem.keep_RD[:, live_D])
    truth = reference(matrix_DD[live_D][:, live_D], hessian.damping, live)
    loss_R = truth.loss(rounded.weight_RD[:, live_D].double())
    assert (loss_R <= truth.allowance(rounded.gap_R.numpy())).all()
    dead_RD = torch.where(problem.keep_RD, problem.target_RD, 0.0).bfloat16()[:, ~live_D]
    assert torch.equal(rounded.weight_RD[:, ~live_D], dead_RD)


def test_weights_in_the_dtype_already_stay_as_they_are() -> None:
    hessian, problem, _, solution = solved("correlated")
    rounded = round_rows(hessian, problem, solution, torch.float32)
    assert rounded.weight_RD is solution.weight_RD
    assert torch.equal(rounded.gap_R, solution.gap_R)
    assert torch.equal(rounded.error_R, solution.error_R)
    bound_R = rounded.gap_R * rounded.least_R
    assert torch.allclose(rounded.least_R, rounded.error_R - bound_R, rtol=1e-12)


def test_float64_weights_become_float32_ones_that_are_as_good() -> None:
    weight_RD, keep_RD = make_rows(20, 48, seed=2)
    hessian, problem, truth = layer(make_matrix(48, 96, seed=1), 0.01, weight_RD.double(), keep_RD)
    rounded = round_rows(hessian, problem, solve_rows(Auto(1e-9), hessian, problem), torch.float32)
    assert (truth.loss(rounded.weight_RD) <= truth.allowance(rounded.gap_R.numpy())).all()
    assert float(rounded.gap_R.max()) < 1e-8


def test_weights_beyond_the_range_are_written_at_its_end_and_the_gap_says_so() -> None:
    weight_RD, keep_RD = make_rows(10, 16, seed=2)
    hessian, problem, truth = layer(make_matrix(16, 64, seed=1), 0.01, 1e5 * weight_RD, keep_RD)
    rounded = round_rows(hessian, problem, solve_rows(Auto(), hessian, problem), torch.float16)
    assert rounded.weight_RD.isfinite().all()
    assert float(rounded.gap_R.max()) > 1e-2
    assert (truth.loss(rounded.weight_RD.double()) <= truth.allowance(rounded.gap_R.numpy())).all()


def test_bounds_without_a_number_between_them_are_refused() -> None:
    weight_RD = torch.full((1, 2), 1.0)
    keep_RD = torch.ones_like(weight_RD, dtype=torch.bool)
    hessian = Hessian(torch.eye(2))
    problem = make_problem(hessian, weight_RD, keep_RD, None, weight_RD + 1e-3, weight_RD + 2e-3)
    solution = solve_rows(Bounded(), hessian, problem)
    with pytest.raises(RecipeError, match="bfloat16"):
        round_rows(hessian, problem, solution, torch.bfloat16)
    assert representable(round_rows(hessian, problem, solution, torch.float16), problem, torch.float16)


def test_what_all_rows_lose_is_told_in_full_where_masks_lose_next_to_nothing() -> None:
    """Pruned weights are a millionth of the others: rounding loses far more than the mask."""
    weight_RD, keep_RD = make_rows(20, 48, seed=2)
    weight_RD = torch.where(keep_RD, weight_RD, 1e-6 * weight_RD)
    hessian, problem, truth = layer(make_matrix(48, 96, seed=1), 0.01, weight_RD, keep_RD)
    rounded = round_rows(hessian, problem, solve_rows(Auto(), hessian, problem), torch.bfloat16)
    above_R = truth.loss(rounded.weight_RD.double()) - truth.loss(torch.from_numpy(truth.optimum()))
    assert above_least(rounded) * float(rounded.least_R.sum()) >= above_R.sum()
    assert above_least(rounded) > 10.0


def test_a_dead_weight_of_any_size_leaves_the_gap_as_it_is() -> None:
    weight_RD, keep_RD = make_rows(10, 48, seed=2)
    weight_RD, keep_RD = 1e-21 * weight_RD, keep_RD.clone()
    matrix_DD = make_matrix(48, 96, seed=1)
    matrix_DD[5] = matrix_DD[:, 5] = 0.0
    keep_RD[:, 5] = True
    hessian = Hessian(matrix_DD, 0.01)
    gaps = []
    for dead in (0.0, 1.0):
        weight_RD[:, 5] = dead
        problem = make_problem(hessian, weight_RD, keep_RD)
        gaps.append(round_rows(hessian, problem, solve_rows(Auto(), hessian, problem), torch.bfloat16).gap_R)
    assert torch.allclose(*gaps, rtol=1e-3)


def test_more_rows_than_are_rounded_together() -> None:
    """And the same bits every time."""
    hessian, problem, truth = make_layer(4800, 120)
    solution = solve_rows(Auto(), hessian, problem)
    one, other = (round_rows(hessian, problem, solution, torch.bfloat16) for _ in range(2))
    assert torch.equal(one.weight_RD, other.weight_RD)
    assert torch.equal(one.gap_R, other.gap_R)
    loss_R = truth.loss(one.weight_RD.double())
    assert (loss_R <= one.error_R.numpy()).all()
    assert (one.error_R.numpy() <= 1.001 * loss_R).all()


@every_layer
def test_the_solvers_residual_serves_as_well_as_its_own(name: str) -> None:
    hessian, problem, _, solution = solved(name)
    assert solution.residual_RD is not None
    own = round_rows(hessian, problem, replace(solution, residual_RD=None, scale_R=None), torch.bfloat16, "nearest")
    given = round_rows(hessian, problem, solution, torch.bfloat16, "nearest")
    assert torch.equal(own.weight_RD, given.weight_RD)
    tolerance = 1e-4 * own.error_R.abs() + 1e-2 * (own.error_R - solution.error_R).abs()
    assert bool(((own.error_R - given.error_R).abs() <= tolerance).all())


def test_no_rows_are_no_trouble() -> None:
    hessian, problem, _, solution = solved("correlated")
    none = slice(0, 0)
    empty = solution.rows(none)
    assert round_rows(hessian, problem.rows(none), empty, torch.bfloat16).weight_RD.shape == (0, 96)
