"""One set of kept inputs for all rows, against brute force and least squares in float64."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import Tensor

from optima.core import Hessian, certify, make_problem
from optima.core.shared_set import remove_greedily, solve_shared

DAMPING = 0.01


def problem(inputs: int = 7, outputs: int = 4, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs with the ridge as further rows, so that least squares solves the damped problem; weight, R, H."""
    generator = torch.Generator().manual_seed(seed)
    mixing_DD = torch.randn(inputs, inputs, generator=generator, dtype=torch.float64)
    inputs_TD = torch.randn(50, inputs, generator=generator, dtype=torch.float64) @ mixing_DD
    weight_OD = torch.randn(outputs, inputs, generator=generator, dtype=torch.float64)
    root_OO = torch.randn(outputs, outputs, generator=generator, dtype=torch.float64)
    matrix_DD = inputs_TD.mT @ inputs_TD / len(inputs_TD)
    ridge = (DAMPING * matrix_DD.diagonal().mean() * len(inputs_TD)).sqrt()
    rows_TD = torch.cat([inputs_TD, ridge * torch.eye(inputs, dtype=torch.float64)])
    return rows_TD, weight_OD, root_OO, matrix_DD


def least_squares(rows_TD: Tensor, weight_OD: Tensor, kept: list[int]) -> Tensor:
    found_OD = torch.zeros_like(weight_OD)
    found_OD[:, kept] = torch.linalg.lstsq(rows_TD[:, kept], rows_TD @ weight_OD.mT).solution.mT
    return found_OD


def cost(rows_TD: Tensor, change_OD: Tensor, root_OO: Tensor) -> float:
    return float((root_OO @ change_OD @ rows_TD.mT).square().sum())


@pytest.mark.parametrize("seed", range(5))
def test_the_first_removal_is_the_best_one(seed: int) -> None:
    rows_TD, weight_OD, root_OO, matrix_DD = problem(seed=seed)
    inputs = weight_OD.shape[1]
    keep_D = remove_greedily(Hessian(matrix_DD, DAMPING), weight_OD, root_OO, 1)
    costs = [
        cost(rows_TD, least_squares(rows_TD, weight_OD, [i for i in range(inputs) if i != gone]) - weight_OD, root_OO)
        for gone in range(inputs)
    ]
    assert (~keep_D).nonzero().flatten().tolist() == [costs.index(min(costs))]


@pytest.mark.parametrize("seed", range(5))
def test_each_further_removal_is_the_best_one_after_the_others(seed: int) -> None:
    rows_TD, weight_OD, root_OO, matrix_DD = problem(seed=seed)
    kept, inputs = set(range(weight_OD.shape[1])), weight_OD.shape[1]
    for count in range(1, inputs):
        without = {
            gone: cost(rows_TD, least_squares(rows_TD, weight_OD, sorted(kept - {gone})) - weight_OD, root_OO)
            for gone in kept
        }
        kept.remove(min(without, key=lambda gone: without[gone]))
        keep_D = remove_greedily(Hessian(matrix_DD, DAMPING), weight_OD, root_OO, count, steps=count)
        assert set(keep_D.nonzero().flatten().tolist()) == kept


def test_removals_in_few_steps_cost_hardly_more() -> None:
    rows_TD, weight_OD, root_OO, matrix_DD = problem(inputs=40, outputs=10)
    one, some = (
        remove_greedily(Hessian(matrix_DD, DAMPING), weight_OD, root_OO, 16, steps).nonzero().flatten().tolist()
        for steps in (16, 8)
    )
    costs = [cost(rows_TD, least_squares(rows_TD, weight_OD, kept) - weight_OD, root_OO) for kept in (one, some)]
    assert costs[1] < 1.5 * costs[0]


def test_greedy_is_near_the_best_pair() -> None:
    rows_TD, weight_OD, root_OO, matrix_DD = problem()
    inputs = range(weight_OD.shape[1])
    kept = remove_greedily(Hessian(matrix_DD, DAMPING), weight_OD, root_OO, 2).nonzero().flatten().tolist()
    found = cost(rows_TD, least_squares(rows_TD, weight_OD, kept) - weight_OD, root_OO)
    best = min(
        cost(rows_TD, least_squares(rows_TD, weight_OD, [i for i in inputs if i not in pair]) - weight_OD, root_OO)
        for pair in combinations(inputs, 2)
    )
    assert best <= found * (1.0 + 1e-9) < 2.0 * best


@pytest.mark.parametrize("seed", range(5))
def test_the_solve_equals_least_squares_and_is_certified(seed: int) -> None:
    rows_TD, weight_OD, _, matrix_DD = problem(seed=seed)
    kept, hessian = [0, 2, 3, 6], Hessian(matrix_DD, DAMPING)
    keep_D = torch.zeros(weight_OD.shape[1], dtype=torch.bool)
    keep_D[kept] = True
    solution = solve_shared(hessian, weight_OD, keep_D)
    expected_OD = least_squares(rows_TD, weight_OD, kept)
    assert (solution.weight_RD - expected_OD).norm() <= 1e-10 * expected_OD.norm()
    assert float(solution.gap_R.max()) < 1e-12
    moved_OD = solution.weight_RD + 0.1 * torch.randn(weight_OD.shape, dtype=torch.float64) * keep_D
    found = certify(hessian, make_problem(hessian, weight_OD, keep_D.expand(weight_OD.shape)), moved_OD)
    assert bool((found.bound_R >= found.error_R - solution.error_R - 1e-12).all())


def test_dead_inputs_go_first() -> None:
    _, weight_OD, root_OO, matrix_DD = problem()
    matrix_DD[[1, 4]] = matrix_DD[:, [1, 4]] = 0.0
    keep_D = remove_greedily(Hessian(matrix_DD, DAMPING), weight_OD, root_OO, 2)
    assert (~keep_D).nonzero().flatten().tolist() == [1, 4]
