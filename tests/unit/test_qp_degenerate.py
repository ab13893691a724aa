"""Degenerate input of the QP engine, each with a defined answer.

Shapes: T tokens, D inputs, R rows.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

import numpy as np
import pytest
import torch
from qp_peers.pdhg import RestartedPDHG
from qp_reference import make_layer, make_matrix, make_rows, reference
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from optima.core import (
    Auto,
    BatchedCholesky,
    Hessian,
    LowRankCG,
    RowProblem,
    RowSolution,
    RowSolver,
    Status,
    make_problem,
    solve,
    solve_rows,
)
from optima.core.cholesky import solve_kept
from optima.core.preconditioner import FACTORS
from optima.core.solvers import BYTES_PER_ENTRY, Correction, Residuals, solve_with_restarts
from optima.errors import NumericalError, RecipeError

SOLVERS: list[RowSolver] = [
    *(LowRankCG(), BatchedCholesky(), RestartedPDHG(gap=1e-2), Auto()),
]
every_solver = pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: solver.name)


def assert_optimal(solution: RowSolution, hessian: Hessian, matrix_DD: Tensor, problem: RowProblem) -> None:
    """Converged, finite, and within its certified gap of the reference for the damping that was recorded."""
    truth = reference(matrix_DD, hessian.damping, problem)
    assert solution.weight_RD.isfinite().all()
    assert (solution.status_R == Status.CONVERGED).all()
    assert (truth.loss(solution.weight_RD) <= truth.allowance(solution.gap_R.numpy())).all()


def solved(
    solver: RowSolver, matrix_DD: Tensor, damping: float = 0.01, dtype: torch.dtype = torch.float32
) -> tuple[Hessian, RowSolution]:
    hessian = Hessian(matrix_DD, damping)
    weight_RD, keep_RD = make_rows(6, len(matrix_DD), seed=1)
    problem = make_problem(hessian, weight_RD.to(dtype), keep_RD)
    solution = solve_rows(solver, hessian, problem)
    assert_optimal(solution, hessian, matrix_DD, problem)
    return hessian, solution


@every_solver
@pytest.mark.parametrize("started", [False, True])
def test_dead_inputs_vanish_where_pruned_and_stay_where_kept(solver: RowSolver, started: bool) -> None:
    """Also where a selector that moves weights has made them zero."""
    live_DD = make_matrix(12, 24, seed=0)
    weight_RD, keep_RD = make_rows(6, 15, seed=1)
    dead = torch.tensor([0, 7, 14])
    live = torch.tensor([index for index in range(15) if index not in dead])
    matrix_DD = torch.zeros(15, 15)
    matrix_DD[live[:, None], live] = live_DD
    hessian = Hessian(matrix_DD)
    problem = make_problem(hessian, weight_RD, keep_RD)
    if started:
        start_RD = solve_rows(solver, hessian, problem).weight_RD.index_fill(1, dead, 0.0)
        problem = make_problem(hessian, weight_RD, keep_RD, start_RD)
    solution = solve_rows(solver, hessian, problem)
    assert torch.equal(hessian.dead_D.nonzero()[:, 0], dead)
    assert torch.equal(solution.weight_RD[:, dead], (weight_RD * keep_RD)[:, dead])
    # The rest is the problem without them, of which the mean diagonal is the same.
    part = make_problem(Hessian(live_DD), weight_RD[:, live], keep_RD[:, live])
    truth = reference(live_DD, 0.01, part)
    assert (truth.loss(solution.weight_RD[:, live]) <= truth.allowance(solution.gap_R.numpy())).all()


@every_solver
def test_nothing_ever_reached_the_layer(solver: RowSolver) -> None:
    """H = 0: every weight may be what it is, and no loss is possible."""
    weight_RD, keep_RD = make_rows(5, 9, seed=2)
    hessian = Hessian(torch.zeros(9, 9))
    solution = solve_rows(solver, hessian, make_problem(hessian, weight_RD, keep_RD))
    assert torch.equal(solution.weight_RD, weight_RD * keep_RD)
    assert not solution.error_R.any()
    assert not solution.gap_R.any()
    assert (solution.status_R == Status.CONVERGED).all()


@every_solver
def test_no_inputs(solver: RowSolver) -> None:
    hessian = Hessian(torch.zeros(0, 0))
    solution = solve_rows(solver, hessian, make_problem(hessian, torch.zeros(3, 0), torch.ones(3, 0) > 0))
    assert solution.weight_RD.shape == (3, 0)
    assert not solution.error_R.any()


@every_solver
def test_fewer_tokens_than_inputs(solver: RowSolver) -> None:
    hessian, _ = solved(solver, make_matrix(40, 7, seed=3))
    assert hessian.damping == hessian.requested_damping == 0.01


@every_solver
def test_duplicated_inputs(solver: RowSolver) -> None:
    inputs_TD = torch.randn(60, 12, generator=torch.Generator().manual_seed(4))
    inputs_TD = torch.cat([inputs_TD, inputs_TD[:, :6], inputs_TD[:, :6]], dim=1)
    solved(solver, inputs_TD.mT @ inputs_TD / 60)


def test_a_duplicate_takes_over_from_its_pruned_twin() -> None:
    column_T1 = torch.randn(50, 1, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    inputs_TD = column_T1.expand(50, 2)
    solution = solve(
        Hessian(inputs_TD.mT @ inputs_TD / 50, damping=1e-6),
        torch.tensor([[1.0, 2.0]], dtype=torch.float64),
        torch.tensor([[True, False]]),
        solver=BatchedCholesky(),
    )
    assert float(solution.weight_RD[0, 0]) == pytest.approx(3.0, rel=1e-5)


@every_solver
def test_collinear_inputs(solver: RowSolver) -> None:
    generator = torch.Generator().manual_seed(6)
    inputs_TD = torch.randn(90, 5, generator=generator) @ torch.randn(5, 24, generator=generator)
    solved(solver, inputs_TD.mT @ inputs_TD / 90)


@every_solver
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scales_from_1e_6_to_1e6(solver: RowSolver, dtype: torch.dtype) -> None:
    solved(solver, make_matrix(32, 128, seed=7, spread=6.0).to(dtype))


@every_solver
def test_one_massive_activation(solver: RowSolver) -> None:
    matrix_DD = make_matrix(32, 128, seed=8)
    scale_D = torch.ones(32)
    scale_D[5] = 1e5
    solved(solver, matrix_DD * scale_D * scale_D[:, None])


@pytest.mark.parametrize("solver", [LowRankCG(), BatchedCholesky(), Auto()], ids=lambda each: each.name)
def test_no_damping_where_the_hessian_is_singular(solver: RowSolver) -> None:
    """The damping that it took is recorded, and it is what the problem was solved with."""
    hessian, _ = solved(solver, make_matrix(20, 5, seed=9).double(), damping=0.0, dtype=torch.float64)
    assert hessian.requested_damping == 0.0
    assert 0.0 < hessian.damping <= 1e-6


def test_float32_weights_where_the_hessian_is_singular() -> None:
    """Their rounding alone leaves a residual that K ~ 1 / damping cannot certify: optimal for every purpose, and said
    to be unproven."""
    matrix_DD = make_matrix(20, 5, seed=9).double()
    hessian = Hessian(matrix_DD, damping=0.0)
    problem = make_problem(hessian, *make_rows(6, 20, seed=1))
    solution = solve_rows(LowRankCG(), hessian, problem)
    truth = reference(matrix_DD, hessian.damping, problem)
    assert (truth.loss(solution.weight_RD) <= truth.loss(truth.optimum()) + 1e-10 * truth.energy_R).all()
    unproven = solution.gap_R > 1e-4
    assert unproven.any()
    assert (solution.status_R[unproven] != Status.CONVERGED).all()


def test_auto_solves_directly_what_iterations_leave_open() -> None:
    """Inputs far from their mean, fewer tokens than inputs, hardly any damping: CG stagnates above the optimum."""
    generator = torch.Generator().manual_seed(0)
    factors = [
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((300, 8), (8, 600), (300, 600))
    ]
    inputs_TD = (3.0 * factors[0] @ factors[1] + 0.3 * factors[2]).abs() + 5.0
    hessian = Hessian(inputs_TD.T @ inputs_TD / 300, 1e-6)
    target_RD, keep_RD = make_rows(6, 600, 0)
    solution = solve_rows(Auto(), hessian, make_problem(hessian, target_RD, keep_RD))
    matrix_DD = hessian.damped_DD
    for row, keep_D in enumerate(keep_RD):
        target_D, found_D = target_RD[row].double(), solution.weight_RD[row].double()
        best_D = torch.zeros_like(target_D)
        right_S = (matrix_DD @ target_D)[keep_D]
        best_D[keep_D] = torch.linalg.solve(matrix_DD[keep_D][:, keep_D], right_S)
        loss, least = ((each - target_D) @ matrix_DD @ (each - target_D) for each in (found_D, best_D))
        assert float(loss) < 1.001 * float(least)
    assert solution.solver == "cholesky+low-rank-cg"


def test_no_damping_where_none_is_needed() -> None:
    hessian, _ = solved(LowRankCG(), make_matrix(20, 200, seed=10), damping=0.0)
    assert hessian.damping == 0.0


def test_float32_rounding_of_a_singular_matrix_is_not_indefinite() -> None:
    matrix_DD = make_matrix(64, 10, seed=11)
    assert torch.linalg.eigvalsh(matrix_DD.double())[0] < 0
    hessian, _ = solved(LowRankCG(), matrix_DD, damping=0.0, dtype=torch.float64)
    assert 0.0 < hessian.damping <= 1e-4


class TestRefusals:
    """Each error names what is wrong, and is OPTIMA's own."""

    def test_not_symmetric(self) -> None:
        matrix_DD = make_matrix(8, 16, seed=12)
        with pytest.raises(NumericalError, match="not symmetric"):
            Hessian(matrix_DD + 0.5 * matrix_DD.abs().mean() * torch.ones(8, 8).triu(1))

    @pytest.mark.parametrize("num_inputs", [2, 8, 64])
    def test_indefinite(self, num_inputs: int) -> None:
        matrix_DD = torch.ones(num_inputs, num_inputs)
        matrix_DD[0, 1:] = matrix_DD[1:, 0] = -5.0
        hessian = Hessian(matrix_DD)
        with pytest.raises(NumericalError, match="indefinite"):
            solve(hessian, *make_rows(2, num_inputs, seed=13))

    def test_negative_diagonal(self) -> None:
        with pytest.raises(NumericalError, match="negative diagonal"):
            Hessian(-torch.eye(3))

    def test_zero_diagonal_with_entries_beside_it(self) -> None:
        matrix_DD = make_matrix(6, 12, seed=14)
        matrix_DD[2, 2] = 0.0
        with pytest.raises(NumericalError, match="zero on its diagonal"):
            solve(Hessian(matrix_DD), *make_rows(2, 6, seed=15))

    @pytest.mark.parametrize("size", [1e-20, 1e-22, 1e-23, 1e-24, 1e-30])
    def test_an_input_whose_square_is_zero_in_float32_is_dead(self, size: float) -> None:
        inputs_TD = torch.randn(64, 6, generator=torch.Generator().manual_seed(17))
        inputs_TD[:, 2] *= size
        hessian = Hessian(inputs_TD.mT @ inputs_TD / 64)
        assert bool(hessian.dead_D[2]) == (size < 2e-23)
        solve(hessian, *make_rows(2, 6, seed=15))

    @pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
    @pytest.mark.parametrize("place", [(0, 0), (2, 5)])
    def test_hessian_not_finite(self, value: float, place: tuple[int, int]) -> None:
        matrix_DD = make_matrix(8, 16, seed=16)
        matrix_DD[place] = value
        with pytest.raises(NumericalError, match="hessian contains NaN or Inf"):
            Hessian(matrix_DD)

    @pytest.mark.parametrize("value", [torch.nan, torch.inf])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_weight_not_finite(self, value: float, dtype: torch.dtype) -> None:
        weight_RD, keep_RD = make_rows(4, 8, seed=17)
        weight_RD[3, 2] = value
        with pytest.raises(NumericalError, match="weight contains NaN or Inf"):
            solve(make_matrix(8, 16, seed=18), weight_RD.to(dtype), keep_RD)

    def test_start_not_finite(self) -> None:
        weight_RD, keep_RD = make_rows(4, 8, seed=17)
        with pytest.raises(NumericalError, match="start contains NaN or Inf"):
            solve(make_matrix(8, 16, seed=18), weight_RD, keep_RD, start=weight_RD / 0.0)

    def test_shapes_and_dtypes(self) -> None:
        matrix_DD = make_matrix(8, 16, seed=19)
        weight_RD, keep_RD = make_rows(4, 8, seed=20)
        with pytest.raises(RecipeError, match="square"):
            Hessian(matrix_DD[:3])
        with pytest.raises(RecipeError, match="float32 or float64"):
            Hessian(matrix_DD.half())
        with pytest.raises(RecipeError, match="damping"):
            Hessian(matrix_DD, damping=-0.1)
        with pytest.raises(RecipeError, match="keep must be boolean"):
            solve(matrix_DD, weight_RD, keep_RD.float())
        with pytest.raises(RecipeError, match="weight has shape"):
            solve(matrix_DD, weight_RD[:, :7], keep_RD[:, :7])
        with pytest.raises(RecipeError, match="keep has shape"):
            solve(matrix_DD, weight_RD, keep_RD[:3])
        with pytest.raises(RecipeError, match="float tensor"):
            solve(matrix_DD, weight_RD.int(), keep_RD)


@every_solver
@pytest.mark.parametrize("norm", [1e-30, 1e-12, 1e12, 1e30])
def test_rows_of_tiny_and_huge_norm(solver: RowSolver, norm: float) -> None:
    """Rows are solved in their own units: neighbours of any other size do not matter."""
    matrix_DD = make_matrix(24, 48, seed=21)
    weight_RD, keep_RD = make_rows(6, 24, seed=22)
    weight_RD = (weight_RD * torch.tensor([1.0, norm, 1.0, norm, 1.0, norm])[:, None]).bfloat16()
    hessian = Hessian(matrix_DD)
    problem = make_problem(hessian, weight_RD, keep_RD)
    assert_optimal(solve_rows(solver, hessian, problem), hessian, matrix_DD, problem)


@every_solver
@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
def test_hessians_of_tiny_and_huge_norm(solver: RowSolver, scale: float) -> None:
    solved(solver, make_matrix(24, 48, seed=23).double() * scale)


@every_solver
def test_rows_of_zeros(solver: RowSolver) -> None:
    matrix_DD = make_matrix(16, 32, seed=24)
    weight_RD, keep_RD = make_rows(4, 16, seed=25)
    weight_RD[1] = weight_RD[3] = 0.0
    hessian = Hessian(matrix_DD)
    solution = solve_rows(solver, hessian, make_problem(hessian, weight_RD, keep_RD))
    assert not solution.weight_RD[[1, 3]].any()
    assert not solution.gap_R[[1, 3]].any()
    assert (solution.status_R == Status.CONVERGED).all()


@dataclass(frozen=True)
class SmallDevice:
    """Stands in for a device with room for ``room`` rows: the real boundary cannot run everywhere."""

    room: int
    inner: RowSolver = LowRankCG()
    tries: list[int] = field(default_factory=list)

    name = "small device"

    def solve(self, hessian: Hessian, problem: RowProblem) -> RowSolution:
        self.tries.append(len(problem.target_RD))
        if len(problem.target_RD) > self.room:
            raise torch.OutOfMemoryError
        return self.inner.solve(hessian, problem)


@pytest.mark.parametrize(("room", "halvings"), [(40, 0), (39, 1), (20, 1), (7, 3), (1, 6)])
def test_out_of_memory_halves_the_chunk(room: int, halvings: int) -> None:
    hessian, problem, truth = make_layer(40, 32, seed=26)
    whole = solve_rows(LowRankCG(), hessian, problem)
    device = SmallDevice(room)
    solution = solve_rows(device, hessian, problem)
    assert sum(rows > room for rows in device.tries) == halvings
    assert ("out of memory" in solution.note) == (halvings > 0)
    assert torch.equal(solution.status_R, whole.status_R)
    room_R = 4e-4 * truth.loss(truth.optimum())
    assert (truth.distance(solution.weight_RD, whole.weight_RD) <= room_R).all()
    np.testing.assert_allclose(solution.error_R, whole.error_R, rtol=2e-4)


@pytest.mark.parametrize(("budget_rows", "chunks"), [(0, [1] * 13), (5, [5, 5, 3]), (12, [7, 6]), (13, [13])])
def test_a_budget_bounds_the_rows_solved_together(
    budget_rows: int, chunks: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks are of equal size but for the last."""
    hessian, problem, _ = make_layer(13, 40, seed=7)
    device = SmallDevice(13)
    monkeypatch.setattr("optima.core.solvers.BUDGET_BYTES", budget_rows * 40 * BYTES_PER_ENTRY)
    solve_rows(device, hessian, problem)
    assert device.tries == chunks


def test_out_of_memory_in_factorising_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer rows would not help there: it is tried once."""
    tries = []

    def full(matrix_DD: Tensor) -> None:
        tries.append(len(matrix_DD))
        raise torch.OutOfMemoryError

    monkeypatch.setattr(torch.linalg, "cholesky_ex", full)
    hessian, problem, _ = make_layer(4, 8)
    with pytest.raises(torch.OutOfMemoryError):
        solve_rows(LowRankCG(), hessian, problem)
    assert tries == [8]


def test_no_room_for_one_row_is_the_devices_error() -> None:
    hessian, problem, _ = make_layer(4, 8)
    with pytest.raises(torch.OutOfMemoryError):
        solve_rows(SmallDevice(0), hessian, problem)


def peak_bytes(work: Callable[[], object], directory: Path) -> int:
    """Most memory that torch, oneDNN included, held at once beyond what it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = work()
    trace = directory / "trace.json"
    profiler.export_chrome_trace(str(trace))
    events = [event for event in json.loads(trace.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    changes = [event["args"]["Bytes"] for event in sorted(events, key=lambda event: event["ts"])]
    del result
    return max(accumulate(changes), default=0)


# Float64 temporaries of the rows that are certified together, and vectors.
SMALL = 16 * 2**20


@pytest.mark.parametrize(
    "solver",
    [LowRankCG(), BatchedCholesky(dtype=torch.float32)],
    ids=lambda solver: solver.name,
)
@pytest.mark.parametrize("size", [(512, 8192), (1024, 256)])
def test_working_set(solver: RowSolver, size: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most 4 D^2 + 6 R D numbers beyond inputs and result, and a system of factors for each row of low-rank CG. D^2
    numbers are float64 or float32, the others float32. The direct solver's rows are few here."""
    num_inputs, rows = size
    rows = rows // 16 if solver.name == "cholesky" else rows
    inputs_TD = torch.randn(2 * num_inputs, num_inputs, generator=torch.Generator().manual_seed(0))
    hessian = Hessian(inputs_TD.mT @ inputs_TD / len(inputs_TD))
    weight_RD, keep_RD = make_rows(rows, num_inputs, seed=1)
    problem = make_problem(hessian, weight_RD, keep_RD)
    # The profiler's clock and the library's lazy parts start here.
    solve_rows(solver, *make_layer(8, 96)[:2])
    del weight_RD, keep_RD
    monkeypatch.setattr("optima.core.solvers.CACHE_ENTRIES", 2**33)
    monkeypatch.setattr("optima.core.solvers.BUDGET_BYTES", 2**33)
    held = peak_bytes(lambda: solve_rows(solver, hessian, problem), tmp_path)
    factors = rows * FACTORS**2 if solver.name == "low-rank-cg" else 0
    assert held <= 8 * 4 * num_inputs**2 + 4 * (7 * rows * num_inputs + factors) + SMALL


def test_weights_off_the_mask_are_zero_whatever_a_solver_returns() -> None:
    hessian, (weight_RD, keep_RD) = Hessian(make_matrix(32, 64, seed=3)), make_rows(6, 32, seed=4)
    problem = make_problem(hessian, weight_RD, keep_RD)

    def inner(residuals: Residuals) -> Correction:
        exact_RD = solve_kept(hessian, residuals.residual_RD.double(), residuals.mask_RD)
        return Correction(exact_RD + 1.0 - residuals.mask_RD, torch.zeros(len(exact_RD), dtype=torch.int32))

    found = solve_with_restarts(hessian, problem, inner, 1e-4)
    assert bool((found.weight_RD[~keep_RD] == 0).all())
    assert float(found.gap_R.max()) <= 1e-4
