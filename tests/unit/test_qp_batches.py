"""Rows that leave a batch, rows that are added up in pieces, and which solver rows get.

Shapes: R rows, D inputs.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from qp_reference import make_layer, make_matrix, make_rows
from torch import Tensor

from optima.core import Auto, Hessian, LowRankCG, make_problem, solve_rows
from optima.core.batch import RowBatch
from optima.core.problem import Status, concatenate
from optima.core.products import ROUND_ROWS, SharedFactor


class Countdown(RowBatch):
    """Row r is done after r iterations."""

    row_tensors = ("left", "name")
    results = ("name",)

    def __init__(self, left_R: Tensor) -> None:
        super().__init__(len(left_R), left_R.device)
        self.left, self.name = left_R.clone(), torch.arange(len(left_R))
        self.sizes: list[int] = []

    def going(self, gap: float) -> Tensor:
        return self.left > 0

    def iterate_once(self) -> Tensor:
        self.sizes.append(len(self.rows))
        self.left -= 1
        return self.left >= 0


def test_many_rows_stay_in_round_numbers_and_come_back_in_order() -> None:
    count = 3 * ROUND_ROWS + 7
    left_R = torch.randperm(count, generator=torch.Generator().manual_seed(0)) % 60
    batch = Countdown(left_R)
    (name_R,) = batch.run(0.0, 1000)
    assert torch.equal(name_R, torch.arange(count))
    assert torch.equal(batch.iterations_R.long(), left_R), "no row stopped early"
    sizes = list(dict.fromkeys(batch.sizes))
    assert sizes[0] == count
    assert all(size % ROUND_ROWS == 0 for size in sizes[1:] if size > ROUND_ROWS), sizes
    assert all(after <= 0.8 * before for before, after in pairwise(sizes)), "it pays to leave"


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
