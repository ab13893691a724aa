"""What every row solver must do: a test class that each solver's tests inherit.

Shapes: R rows, D inputs.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from qp_reference import ROUNDING, Reference, make_layer, make_matrix, make_rows, reference

from optima.core import Hessian, RowProblem, RowSolution, RowSolver, Status, certify, make_problem, solve_rows
from optima.core.solvers import MAX_ROUNDS

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
INPUTS = (1, 2, 23, 96)
KEPT = (0.05, 0.5, 0.95)


def check(solution: RowSolution, problem: RowProblem, truth: Reference, gap: float) -> None:
    """All that a solution promises, against the reference."""
    rows, num_inputs = problem.target_RD.shape
    weight_RD = solution.weight_RD
    assert weight_RD.shape == (rows, num_inputs)
    assert weight_RD.dtype == problem.target_RD.dtype
    for tensor, dtype in (
        (solution.error_R, torch.float64),
        (solution.gap_R, torch.float64),
        (solution.status_R, torch.int8),
        (solution.iterations_R, torch.int32),
    ):
        assert tensor.shape == (rows,)
        assert tensor.dtype == dtype
    assert weight_RD.isfinite().all()
    assert not weight_RD[~problem.keep_RD].any(), "a pruned weight survived"
    converged = solution.status_R == Status.CONVERGED
    assert (solution.gap_R[converged] <= gap).all()
    assert (solution.gap_R[~converged] > gap).all()
    assert (solution.iterations_R >= 0).all()
    np.testing.assert_allclose(solution.error_R, truth.loss(weight_RD), rtol=1e-9, atol=1e-13 * truth.energy_R.sum())
    excess = truth.loss(weight_RD) - truth.allowance(solution.gap_R.numpy())
    assert (excess <= 0).all(), "the certificate was violated"


class RowSolverContract:
    """Inherit, name the class ``Test...`` and say how to make the solver.

    Attributes:
        gap: what the solver is asked for; every row of these small problems must reach it.
    """

    gap = 1e-4

    def make(self, gap: float) -> RowSolver:
        raise NotImplementedError

    def solve(self, hessian: Hessian, problem: RowProblem) -> RowSolution:
        return solve_rows(self.make(self.gap), hessian, problem)

    @pytest.mark.parametrize("kept", KEPT)
    @pytest.mark.parametrize("num_inputs", INPUTS)
    def test_rows_reach_their_gap(self, num_inputs: int, kept: float) -> None:
        hessian, problem, truth = make_layer(12, num_inputs, seed=num_inputs, kept=kept)
        solution = self.solve(hessian, problem)
        check(solution, problem, truth, self.gap)
        assert (solution.status_R == Status.CONVERGED).all()
        assert (solution.gap_R <= certify(hessian, problem, solution.weight_RD).gap_R * 1.01).all()

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_weights_of_every_dtype_and_strides(self, dtype: torch.dtype) -> None:
        """And the inputs are left alone."""
        matrix_DD = make_matrix(24, 48, seed=1)
        weight_RD, keep_RD = make_rows(8, 24, seed=2)
        weight_RD = weight_RD.to(dtype)
        wide_DD = matrix_DD.double().repeat_interleave(2, dim=0).repeat_interleave(2, dim=1)
        strided = wide_DD[::2, ::2], weight_RD.mT.contiguous().mT, keep_RD.repeat_interleave(2, dim=1)[:, ::2]
        for tensors in ((matrix_DD, weight_RD, keep_RD), strided):
            copies = [tensor.clone() for tensor in tensors]
            hessian = Hessian(tensors[0])
            problem = make_problem(hessian, *tensors[1:], weight_RD * keep_RD * 0.9)
            assert problem.target_RD.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            check(self.solve(hessian, problem), problem, reference(tensors[0], 0.01, problem), self.gap)
            assert all(torch.equal(tensor, copy) for tensor, copy in zip(tensors, copies, strict=True))

    def test_no_rows(self) -> None:
        hessian, problem, truth = make_layer(0, 8)
        check(self.solve(hessian, problem), problem, truth, self.gap)

    def test_none_one_and_all_kept(self) -> None:
        matrix_DD = make_matrix(10, 20, seed=3)
        weight_RD, keep_RD = make_rows(4, 10, seed=4)
        keep_RD[0], keep_RD[1], keep_RD[2] = False, torch.arange(10) == 7, True
        hessian = Hessian(matrix_DD)
        problem = make_problem(hessian, weight_RD, keep_RD)
        truth = reference(matrix_DD, 0.01, problem)
        solution = self.solve(hessian, problem)
        check(solution, problem, truth, self.gap)
        assert not solution.weight_RD[0].any()
        assert solution.gap_R[0] == 0.0
        # One kept weight v minimises a parabola: v = (H w)_i / H_ii.
        expected = (truth.hessian_DD @ truth.target_RD[1])[7] / truth.hessian_DD[7, 7]
        # A relative gap of E is a square in the weight.
        room = np.sqrt(2 * self.gap * truth.loss(truth.optimum())[1] / truth.hessian_DD[7, 7])
        assert abs(float(solution.weight_RD[1, 7]) - expected) <= room
        assert torch.equal(solution.weight_RD[2], weight_RD[2]), "a row without pruned weights is its own optimum"
        assert solution.error_R[2] == 0.0
        assert solution.iterations_R[[0, 2]].eq(0).all()

    def test_never_worse_than_where_it_started(self) -> None:
        hessian, problem, truth = make_layer(16, 32, seed=5)
        optimum_RD = torch.tensor(truth.optimum())
        rough_RD = optimum_RD + 0.3 * torch.randn(16, 32, generator=torch.Generator().manual_seed(0))
        for start_RD in (optimum_RD.float(), rough_RD.float(), 1e3 * rough_RD.float()):
            started = make_problem(hessian, problem.target_RD, problem.keep_RD, start_RD)
            solution = self.solve(hessian, started)
            check(solution, problem, truth, self.gap)
            masked_R = truth.loss(problem.target_RD * problem.keep_RD)
            assert started.start_RD is not None
            before_R = np.minimum(masked_R, truth.loss(started.start_RD))
            assert (truth.loss(solution.weight_RD) <= before_R + ROUNDING * truth.energy_R).all()

    def test_chunks_of_rows_change_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        hessian, problem, truth = make_layer(13, 40, seed=7)
        whole = self.solve(hessian, problem)
        for budget_bytes in (1, 5 * 40 * 56):
            monkeypatch.setattr("optima.core.problem.BUDGET_BYTES", budget_bytes)
            parts = self.solve(hessian, problem)
            check(parts, problem, truth, self.gap)
            self.same_optimum(whole, parts, truth)

    def same_optimum(self, one: RowSolution, other: RowSolution, truth: Reference) -> None:
        """Two answers within ``gap`` of the same optimum are that close to each other (triangle inequality)."""
        room_R = 4 * self.gap * truth.loss(truth.optimum()) + 1e-12 * truth.energy_R
        assert (truth.distance(one.weight_RD, other.weight_RD) <= room_R).all()

    def test_twice_the_same_bits(self) -> None:
        _, problem, _ = make_layer(6, 70, seed=8)
        matrix_DD = make_matrix(70, 140, seed=8)
        first, second = (self.solve(Hessian(matrix_DD), problem) for _ in range(2))
        assert torch.equal(first.weight_RD, second.weight_RD)
        assert torch.equal(first.gap_R, second.gap_R)

    def test_iterations_are_counted_row_by_row(self) -> None:
        hessian, problem, truth = make_layer(8, 48, seed=14)
        start_RD = torch.where(torch.arange(8)[:, None] < 4, torch.tensor(truth.optimum()).float(), 0.0)
        solution = self.solve(hessian, make_problem(hessian, problem.target_RD, problem.keep_RD, start_RD))
        count_R = solution.iterations_R
        limit = getattr(self.make(self.gap), "max_iterations", None)
        assert limit is None or (count_R <= limit * (MAX_ROUNDS + 1)).all()
        assert count_R[:4].max() <= count_R[4:].min(), "rows at their optimum had less to do"

    def test_a_gap_that_cannot_be_had_is_said(self) -> None:
        """Float32 weights have no gap of 1e-30; the best that was found comes back, with an honest status."""
        hessian, problem, truth = make_layer(6, 24, seed=15)
        solution = solve_rows(self.make(1e-30), hessian, problem)
        check(solution, problem, truth, 1e-30)
        assert (solution.status_R != Status.CONVERGED).all()
