"""Rounding to a checkpoint's dtype, against the exact optimum of every row in float64.

Shapes: D inputs, R rows.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from qp_reference import Reference, make_layer, make_matrix, make_rows, reference
from torch import Tensor

from optima.core import Auto, Hessian, RowProblem, RowSolution, make_problem, solve_rows
from optima.core.rounding import round_rows

Layer = tuple[Hessian, RowProblem, Reference]
DTYPES = [torch.bfloat16, torch.float16]


def layer(matrix_DD: Tensor, damping: float, weight_RD: Tensor, keep_RD: Tensor) -> Layer:
    hessian = Hessian(matrix_DD, damping)
    problem = make_problem(hessian, weight_RD, keep_RD)
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
    "large": lambda: scaled(1e4),
    "small": lambda: scaled(1e-3),
}
every_layer = pytest.mark.parametrize("name", LAYERS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def solved(name: str) -> tuple[Hessian, RowProblem, Reference, RowSolution]:
    hessian, problem, truth = LAYERS[name]()
    return hessian, problem, truth, solve_rows(Auto(), hessian, problem)


@every_dtype
@every_layer
def test_the_gap_as_written_is_above_the_truth(name: str, dtype: torch.dtype) -> None:
    """And the error is exact; pruned weights stay zero, kept ones are the nearest numbers."""
    hessian, problem, truth, solution = solved(name)
    rounded = round_rows(hessian, problem, solution, dtype)
    assert rounded.weight_RD.dtype == dtype
    assert rounded.weight_RD.isfinite().all()
    assert not rounded.weight_RD[~problem.keep_RD].any()
    largest = torch.finfo(dtype).max
    assert torch.equal(rounded.weight_RD, solution.weight_RD.clamp(-largest, largest).to(dtype))
    loss_R = truth.loss(rounded.weight_RD.double())
    assert (loss_R <= truth.allowance(rounded.gap_R.numpy())).all()
    np.testing.assert_allclose(rounded.error_R, loss_R, rtol=1e-9, atol=1e-12 * truth.energy_R.max())


def test_the_gap_as_written_is_not_far_above_the_truth() -> None:
    hessian, problem, truth, solution = solved("correlated")
    rounded = round_rows(hessian, problem, solution, torch.bfloat16)
    best_R = truth.loss(truth.optimum())
    gap_R = truth.loss(rounded.weight_RD.double()) / best_R - 1.0
    assert (rounded.gap_R.numpy() <= 1.01 * (gap_R + solution.gap_R.numpy()) + 1e-6).all()


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


def test_weights_beyond_the_range_are_written_at_its_end_and_the_gap_says_so() -> None:
    weight_RD, keep_RD = make_rows(10, 16, seed=2)
    hessian, problem, truth = layer(make_matrix(16, 64, seed=1), 0.01, 1e5 * weight_RD, keep_RD)
    rounded = round_rows(hessian, problem, solve_rows(Auto(), hessian, problem), torch.float16)
    assert rounded.weight_RD.isfinite().all()
    assert float(rounded.gap_R.max()) > 1e-2
    assert (truth.loss(rounded.weight_RD.double()) <= truth.allowance(rounded.gap_R.numpy())).all()


def test_what_all_rows_lose_is_told_in_full_where_masks_lose_next_to_nothing() -> None:
    """Pruned weights are a millionth of the others: rounding loses far more than the mask."""
    weight_RD, keep_RD = make_rows(20, 48, seed=2)
    weight_RD = torch.where(keep_RD, weight_RD, 1e-6 * weight_RD)
    hessian, problem, truth = layer(make_matrix(48, 96, seed=1), 0.01, weight_RD, keep_RD)
    rounded = round_rows(hessian, problem, solve_rows(Auto(), hessian, problem), torch.bfloat16)
    above_R = truth.loss(rounded.weight_RD.double()) - truth.loss(torch.from_numpy(truth.optimum()))
    assert rounded.excess * float(rounded.least_R.sum()) >= above_R.sum()
    assert rounded.excess > 10.0


def test_more_rows_than_are_measured_together() -> None:
    """And the same bits every time."""
    hessian, problem, truth = make_layer(4800, 120)
    solution = solve_rows(Auto(), hessian, problem)
    one, other = (round_rows(hessian, problem, solution, torch.bfloat16) for _ in range(2))
    assert torch.equal(one.weight_RD, other.weight_RD)
    assert torch.equal(one.gap_R, other.gap_R)
    loss_R = truth.loss(one.weight_RD.double())
    np.testing.assert_allclose(one.error_R, loss_R, rtol=1e-9)
