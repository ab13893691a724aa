"""Rows that leave a batch, rows that are added up in pieces, and which solver rows get.

Shapes: R rows, D inputs.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from qp_reference import make_layer, make_matrix, make_rows

from optima.core import Auto, Hessian, LowRankCG, make_problem, solve_rows
from optima.core.problem import Status, concatenate
from optima.core.products import ROUND_ROWS, SharedFactor


def test_rows_that_leave_early_come_back_in_order() -> None:
    """Three rows of four are nearly solved before they begin, and keep few weights."""
    hessian, problem, truth = make_layer(3 * ROUND_ROWS + 7, 96, damping=1e-4)
    near_RD = torch.where(torch.arange(len(truth.keep_RD))[:, None] % 4 > 0, torch.tensor(truth.optimum()).float(), 0.0)
    problem = make_problem(hessian, problem.target_RD, problem.keep_RD, near_RD)
    solution = solve_rows(LowRankCG(1e-6), hessian, problem)
    assert (truth.loss(solution.weight_RD) <= truth.allowance(solution.gap_R.numpy())).all()
    assert (solution.gap_R <= 1e-6).all()
    assert solution.iterations_R.unique().numel() > 3


@pytest.mark.parametrize("rows", [0, 1, ROUND_ROWS - 1, ROUND_ROWS, ROUND_ROWS + 1])
def test_norms_in_pieces_against_float64(rows: int) -> None:
    factor_DD = Hessian(make_matrix(300, 600, seed=0)).factor_DD
    rows_RD = torch.randn(rows, 300, generator=torch.Generator().manual_seed(1))
    expected_R = torch.linalg.solve_triangular(factor_DD, rows_RD.double().mT, upper=False).square().sum(dim=0)
    found_R = SharedFactor(factor_DD, 1.0, torch.float32).squared_norm(rows_RD)
    torch.testing.assert_close(found_R, expected_R, rtol=1e-3, atol=0)


def test_auto_names_its_choice() -> None:
    hessian = Hessian(make_matrix(640, 1280, seed=0))
    weight_RD, keep_RD = make_rows(80, 640, seed=1)
    keep_RD[:3] = False
    keep_RD[:3, :5] = True
    solution = solve_rows(Auto(), hessian, make_problem(hessian, weight_RD, keep_RD))
    assert solution.solver == "cholesky+low-rank-cg"
    assert not solution.note, "a choice is nothing that a reader of the report must know"
    _, keep_RD = make_rows(80, 640, seed=1)
    keep_RD[0] = torch.arange(640) > 10
    few = solve_rows(Auto(), hessian, make_problem(hessian, weight_RD, keep_RD))
    assert few.solver == "low-rank-cg", "one row that keeps nearly all is not worth the inverse that it would take"


def test_a_chunk_of_rows_does_not_depend_on_those_before_it() -> None:
    generator = torch.Generator().manual_seed(0)
    weight_RD, draw_RD = torch.randn(40, 400, generator=generator), torch.rand(40, 400, generator=generator)
    matrix_DD = make_matrix(400, 1200, seed=2)
    solved = []
    for before in ((), (0.03,)):
        hessian = Hessian(matrix_DD)
        for pruned in (*before, 0.18):
            found = solve_rows(Auto(1e-4), hessian, make_problem(hessian, weight_RD, draw_RD > pruned))
        solved.append(found.weight_RD)
    assert torch.equal(*solved)


def test_rows_that_run_out_of_rounds_are_told() -> None:
    """Three iterations a round gain so much that no row stagnates, and not enough."""
    hessian, problem, _ = make_layer(8, 64, damping=1e-3)
    double = replace(problem, target_RD=problem.target_RD.double())
    solution = solve_rows(LowRankCG(1e-14, max_iterations=3), hessian, double)
    assert (solution.gap_R > 1e-14).all()
    assert (solution.status_R == Status.ITERATION_LIMIT).all()


def test_notes_of_all_parts_are_joined() -> None:
    hessian, problem, _ = make_layer(4, 16)
    solution = solve_rows(LowRankCG(), hessian, problem)
    parts = [replace(solution, note=note) for note in ("", "float64 for some rows", "", "float64 for some rows", "b")]
    assert concatenate(parts).note == "float64 for some rows; b"
