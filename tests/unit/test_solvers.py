"""The engine on its own: against SciPy, on degenerate input, with little memory, and what it refuses.

Shapes: T tokens, D inputs, R rows.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from closeness import assert_close_in_norm
from qp_peers.pdhg import RestartedPDHG
from qp_reference import make_layer, make_matrix, make_rows, reference
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from optima.core import (
    Auto,
    BatchedCholesky,
    Correction,
    Hessian,
    LowRankCG,
    Residuals,
    RowProblem,
    RowSolution,
    RowSolver,
    Status,
    make_problem,
    solve,
    solve_rows,
    solve_with_restarts,
)
from optima.core.cg import FACTORS
from optima.core.cholesky import solve_kept
from optima.core.hessian import COLUMNS
from optima.core.problem import BYTES_PER_ENTRY, concatenate
from optima.core.products import ROUND_ROWS, SharedFactor, all_finite
from optima.errors import NumericalError, RecipeError

GAP = 1e-9
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SOLVERS: list[RowSolver] = [LowRankCG(), BatchedCholesky(), RestartedPDHG(gap=1e-2), Auto()]
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


@pytest.mark.parametrize("solver", [LowRankCG(GAP), BatchedCholesky(GAP), Auto(GAP), BatchedCholesky(1e-22)], ids=str)
@pytest.mark.parametrize("kept", [0.2, 0.5, 0.8])
def test_rows_against_scipy(solver: LowRankCG | BatchedCholesky | Auto, kept: float) -> None:
    """The normal equations on the kept set, by LAPACK's symmetric indefinite solver."""
    hessian, problem, truth = make_layer(8, 64, seed=1, kept=kept)
    problem = make_problem(hessian, problem.target_RD.double(), problem.keep_RD)
    theirs_RD = np.zeros((8, 64))
    for row, kept_D in enumerate(truth.keep_RD):
        right = (truth.hessian_DD @ truth.target_RD[row])[kept_D]
        theirs_RD[row, kept_D] = scipy.linalg.solve(truth.hessian_DD[np.ix_(kept_D, kept_D)], right, assume_a="sym")
    ours_RD = solve_rows(solver, hessian, problem).weight_RD
    best_R, found_R = truth.loss(theirs_RD), truth.loss(ours_RD)
    room_R = solver.gap * best_R + 1e-10 * truth.energy_R
    assert (found_R <= best_R + room_R).all(), "they found better weights"
    assert (best_R <= found_R + room_R).all(), "the oracle is off"
    assert (truth.distance(ours_RD, theirs_RD) <= 4 * room_R).all()
    if solver.gap < GAP:  # a gap is a square: half as many digits of the weights are right
        assert_close_in_norm(ours_RD, theirs_RD, hessian.condition)


@pytest.mark.parametrize("num_inputs", [0, 1, COLUMNS, COLUMNS + 44])
def test_the_inverses_diagonal_against_numpy(num_inputs: int) -> None:
    hessian = Hessian(make_matrix(num_inputs, tokens=max(2 * num_inputs, 1), seed=0), 0.01)
    diagonal_D = np.diag(np.linalg.inv(hessian.damped_DD.numpy()))
    unit_D = hessian.damped_DD.diagonal()  # scales of inputs differ
    assert_close_in_norm(hessian.inverse_diagonal_D * unit_D, torch.tensor(diagonal_D) * unit_D, 2.0**13)
    assert "inverse_DD" not in vars(hessian), "all of the inverse was made for its diagonal"
    inverted = Hessian(hessian.matrix_DD, 0.01)
    assert torch.equal(inverted.inverse_DD.diagonal(), inverted.inverse_diagonal_D)


@pytest.mark.parametrize("rows", [0, 1, ROUND_ROWS - 1, ROUND_ROWS, ROUND_ROWS + 1])
def test_norms_in_blocks_against_float64(rows: int) -> None:
    factor_DD = Hessian(make_matrix(300, 600, seed=0)).factor_DD
    rows_RD = torch.randn(rows, 300, generator=torch.Generator().manual_seed(1))
    expected_R = torch.linalg.solve_triangular(factor_DD, rows_RD.double().mT, upper=False).square().sum(dim=0)
    found_R = SharedFactor(factor_DD, 1.0, torch.float32).squared_norm(rows_RD)
    assert_close_in_norm(found_R.float(), expected_R)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("damping", [1e-6, 0.01, 1.0])
@pytest.mark.parametrize("tokens", [40, 400])
def test_loss_against_float64(damping: float, tokens: int, dtype: torch.dtype) -> None:
    """On the undamped hessian, of weights as they come out of a solve, with a dead input that loses nothing."""
    matrix_DD = make_matrix(96, tokens, seed=2)
    matrix_DD[5] = matrix_DD[:, 5] = 0.0
    hessian, (weight_RD, keep_RD) = Hessian(matrix_DD, damping), make_rows(40, 96, seed=1)
    solution = solve_rows(Auto(), hessian, make_problem(hessian, weight_RD.to(dtype), keep_RD))
    change_OD = weight_RD.double() - solution.weight_RD
    expected_O = torch.linalg.vecdot(change_OD @ matrix_DD.double(), change_OD)
    expected_O = expected_O.clamp_min(0.0)  # rounded to float32, a singular matrix has negative eigenvalues
    # The damped loss is found in float32; what the damping adds is subtracted from it.
    added_O = hessian.damping * hessian.mean_diagonal * change_OD.square().sum(dim=1)
    assert_close_in_norm((hessian.loss(change_OD) + added_O).float(), expected_O + added_O)
    assert not hessian.loss(torch.zeros(3, 96)).any()


def test_loss_is_undamped_where_the_damping_was_raised() -> None:
    matrix_DD = make_matrix(96, 40, seed=2)
    hessian = Hessian(matrix_DD.double() - 1e-6 * float(matrix_DD.diagonal().mean()) * torch.eye(96), damping=0.0)
    change_OD = torch.randn(10, 96, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected_O = torch.linalg.vecdot(change_OD @ hessian.matrix_DD, change_OD)
    assert hessian.damping > hessian.requested_damping
    assert_close_in_norm(hessian.loss(change_OD).float(), expected_O, 16.0)  # the damping adds a hundred eps


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_not_finite_is_found_wherever_it_is(dtype: torch.dtype, value: float) -> None:
    good = torch.full((3, 700), torch.finfo(dtype).max, dtype=dtype)  # their sum is not finite, they are
    assert all_finite()
    assert all_finite(good, good[:0], -good)
    for at in (0, 1049, 2099):
        bad = good.clone()
        bad.view(-1)[at] = value
        assert not all_finite(good, bad)


def test_rows_that_leave_early_come_back_in_order() -> None:
    """Three rows of four are nearly solved before they begin."""
    hessian, problem, truth = make_layer(3 * ROUND_ROWS + 7, 96, damping=1e-4)
    near_RD = torch.where(torch.arange(len(truth.keep_RD))[:, None] % 4 > 0, torch.tensor(truth.optimum()).float(), 0.0)
    problem = make_problem(hessian, problem.target_RD, problem.keep_RD, near_RD)
    solution = solve_rows(LowRankCG(1e-6), hessian, problem)
    assert (truth.loss(solution.weight_RD) <= truth.allowance(solution.gap_R.numpy())).all()
    assert (solution.gap_R <= 1e-6).all()
    assert solution.iterations_R.unique().numel() > 3


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


def test_auto_solves_directly_what_iterations_leave_open() -> None:
    """Inputs far from their mean, fewer tokens than inputs, hardly any damping: CG stagnates above the optimum."""
    generator = torch.Generator().manual_seed(0)
    factors = [
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((300, 8), (8, 600), (300, 600))
    ]
    inputs_TD = (3.0 * factors[0] @ factors[1] + 0.3 * factors[2]).abs() + 5.0
    hessian = Hessian(inputs_TD.T @ inputs_TD / 300, 1e-6)
    problem = make_problem(hessian, *make_rows(6, 600, 0))
    solution = solve_rows(Auto(), hessian, problem)
    truth = reference(inputs_TD.T @ inputs_TD / 300, hessian.damping, problem)
    assert (truth.loss(solution.weight_RD) < 1.001 * truth.loss(truth.optimum())).all()
    assert solution.solver == "cholesky+low-rank-cg"


def test_a_chunk_of_rows_does_not_depend_on_those_before_it() -> None:
    generator = torch.Generator().manual_seed(0)
    weight_RD, draw_RD = torch.randn(40, 400, generator=generator), torch.rand(40, 400, generator=generator)
    matrix_DD = make_matrix(400, 1200, seed=2)
    found = []
    for before in ((), (0.03,)):
        hessian = Hessian(matrix_DD)
        for pruned in (*before, 0.18):
            last = solve_rows(Auto(1e-4), hessian, make_problem(hessian, weight_RD, draw_RD > pruned))
        found.append(last.weight_RD)
    assert torch.equal(*found)


def test_rows_that_run_out_of_rounds_say_so() -> None:
    """Three iterations a round gain so much that no row stagnates, and not enough."""
    hessian, problem, _ = make_layer(8, 64, damping=1e-3)
    double = replace(problem, target_RD=problem.target_RD.double())
    solution = solve_rows(LowRankCG(1e-14, max_iterations=3), hessian, double)
    assert (solution.gap_R > 1e-14).all()
    assert (solution.status_R == Status.ITERATION_LIMIT).all()
    parts = [replace(solution, note=note) for note in ("", "float64 for some rows", "", "float64 for some rows", "b")]
    assert concatenate(parts).note == "float64 for some rows; b"


def test_weights_off_the_mask_are_zero_whatever_a_solver_returns() -> None:
    hessian, (weight_RD, keep_RD) = Hessian(make_matrix(32, 64, seed=3)), make_rows(6, 32, seed=4)
    problem = make_problem(hessian, weight_RD, keep_RD)

    def inner(residuals: Residuals) -> Correction:
        exact_RD = solve_kept(hessian, residuals.residual_RD.double(), residuals.mask_RD)
        return Correction(exact_RD + 1.0 - residuals.mask_RD, torch.zeros(len(exact_RD), dtype=torch.int32))

    found = solve_with_restarts(hessian, problem, inner, 1e-4)
    assert bool((found.weight_RD[~keep_RD] == 0).all())
    assert float(found.gap_R.max()) <= 1e-4


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
@pytest.mark.parametrize("num_inputs", [0, 9])
def test_no_input_ever_reached_the_linear(solver: RowSolver, num_inputs: int) -> None:
    """H = 0: every weight may be what it is, and no loss is possible. Nor where there are no inputs."""
    weight_RD, keep_RD = make_rows(5, num_inputs, seed=2)
    hessian = Hessian(torch.zeros(num_inputs, num_inputs))
    solution = solve_rows(solver, hessian, make_problem(hessian, weight_RD, keep_RD))
    assert torch.equal(solution.weight_RD, weight_RD * keep_RD)
    assert not solution.error_R.any()
    assert not solution.gap_R.any()
    assert (solution.status_R == Status.CONVERGED).all()


def hard_matrices() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)
    twins_TD = torch.randn(60, 12, generator=generator).repeat(1, 2)
    collinear_TD = torch.randn(90, 5, generator=generator) @ torch.randn(5, 24, generator=generator)
    massive_D = torch.ones(32).index_fill(0, torch.tensor(5), 1e5)
    return {
        "fewer tokens than inputs": make_matrix(40, 7, seed=3),
        "duplicated inputs": twins_TD.mT @ twins_TD / 60,
        "collinear inputs": collinear_TD.mT @ collinear_TD / 90,
        "scales from 1e-6 to 1e6": make_matrix(32, 128, seed=7, spread=6.0),
        "the same in float64": make_matrix(32, 128, seed=7, spread=6.0).double(),
        "one massive activation": make_matrix(32, 128, seed=8) * massive_D * massive_D[:, None],
        **{f"times {scale}": make_matrix(24, 48, seed=23).double() * scale for scale in (1e-30, 1e-12, 1e12, 1e30)},
    }


@every_solver
@pytest.mark.parametrize("name", hard_matrices())
def test_hard_hessians(solver: RowSolver, name: str) -> None:
    hessian, _ = solved(solver, hard_matrices()[name])
    assert hessian.damping == hessian.requested_damping == 0.01


@every_solver
@pytest.mark.parametrize("norm", [0.0, 1e-30, 1e-12, 1e12, 1e30])
def test_rows_of_any_norm(solver: RowSolver, norm: float) -> None:
    """Rows are solved in their own units: neighbours of any other size do not matter."""
    matrix_DD = make_matrix(24, 48, seed=21)
    weight_RD, keep_RD = make_rows(6, 24, seed=22)
    weight_RD = (weight_RD * torch.tensor([1.0, norm, 1.0, norm, 1.0, norm])[:, None]).bfloat16()
    hessian = Hessian(matrix_DD)
    problem = make_problem(hessian, weight_RD, keep_RD)
    solution = solve_rows(solver, hessian, problem)
    assert_optimal(solution, hessian, matrix_DD, problem)
    if not norm:
        assert not solution.weight_RD[1::2].any()
        assert not solution.gap_R[1::2].any()


@pytest.mark.parametrize("solver", [LowRankCG(), BatchedCholesky(), Auto()], ids=lambda each: each.name)
def test_damping_is_raised_where_the_hessian_is_singular_and_nowhere_else(solver: RowSolver) -> None:
    """What it took is recorded, and it is what the problem was solved with."""
    hessian, _ = solved(solver, make_matrix(20, 5, seed=9).double(), damping=0.0, dtype=torch.float64)
    assert hessian.requested_damping == 0.0 < hessian.damping <= 1e-6
    rounded_DD = make_matrix(64, 10, seed=11)
    assert torch.linalg.eigvalsh(rounded_DD.double())[0] < 0, "by rounding to float32"
    hessian, _ = solved(solver, rounded_DD, damping=0.0, dtype=torch.float64)
    assert 0.0 < hessian.damping <= 1e-4
    assert solved(solver, make_matrix(20, 200, seed=10), damping=0.0)[0].damping == 0.0


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


def not_gram(kind: str) -> Tensor:
    matrix_DD = make_matrix(8, 16, seed=12)
    if kind == "not symmetric":
        matrix_DD += 0.5 * matrix_DD.abs().mean() * torch.ones(8, 8).triu(1)
    elif kind == "indefinite":
        matrix_DD = torch.ones(8, 8)
        matrix_DD[0, 1:] = matrix_DD[1:, 0] = -5.0
    elif kind == "negative diagonal":
        matrix_DD = -matrix_DD
    elif kind == "zero on its diagonal":
        matrix_DD[2, 2] = 0.0
    else:
        matrix_DD[2, 5] = matrix_DD[5, 2] = float(kind)
    return matrix_DD


@pytest.mark.parametrize(
    ("kind", "message"),
    [(kind, kind) for kind in ("not symmetric", "indefinite", "negative diagonal", "zero on its diagonal")]
    + [(kind, "hessian contains NaN or Inf") for kind in ("nan", "inf", "-inf")],
)
def test_what_is_no_hessian_is_refused(kind: str, message: str) -> None:
    with pytest.raises(NumericalError, match=message):
        solve(not_gram(kind), *make_rows(2, 8, seed=13))


@pytest.mark.parametrize("size", [1e-20, 1e-22, 1e-23, 1e-24, 1e-30])
def test_an_input_whose_square_is_zero_in_float32_is_dead(size: float) -> None:
    inputs_TD = torch.randn(64, 6, generator=torch.Generator().manual_seed(17))
    inputs_TD[:, 2] *= size
    hessian = Hessian(inputs_TD.mT @ inputs_TD / 64)
    assert bool(hessian.dead_D[2]) == (size < 2e-23)
    solve(hessian, *make_rows(2, 6, seed=15))


def test_wrong_arguments_are_refused_by_name() -> None:
    matrix_DD, (weight, keep) = make_matrix(8, 16, seed=19), make_rows(4, 8, seed=20)
    calls: dict[str, Callable[[], Any]] = {
        "square": lambda: Hessian(matrix_DD[:3]),
        "float32 or float64": lambda: Hessian(matrix_DD.half()),
        "damping": lambda: Hessian(matrix_DD, damping=-0.1),
        "keep must be boolean": lambda: solve(matrix_DD, weight, keep.float()),
        "weight has shape": lambda: solve(matrix_DD, weight[:, :7], keep[:, :7]),
        "keep has shape": lambda: solve(matrix_DD, weight, keep[:3]),
        "float tensor": lambda: solve(matrix_DD, weight.int(), keep),
    }
    for message, call in calls.items():
        with pytest.raises(RecipeError, match=message):
            call()
    for bad in (weight / 0.0, (weight * torch.nan).bfloat16()):
        with pytest.raises(NumericalError, match="weight contains NaN or Inf"):
            solve(matrix_DD, bad, keep)
        with pytest.raises(NumericalError, match="start contains NaN or Inf"):
            solve(matrix_DD, weight, keep, start=bad)


@dataclass(frozen=True)
class SmallDevice:
    """Stands in for a device with memory for ``room`` rows: the real boundary cannot run everywhere."""

    room: int
    inner: RowSolver = LowRankCG()
    tries: list[int] = field(default_factory=list)

    name = "small device"

    def solve(self, hessian: Hessian, problem: RowProblem) -> RowSolution:
        self.tries.append(len(problem.target_RD))
        if len(problem.target_RD) > self.room:
            raise torch.OutOfMemoryError
        return self.inner.solve(hessian, problem)


@pytest.mark.parametrize(("room", "reductions"), [(40, 0), (39, 1), (20, 1), (7, 3), (1, 6)])
def test_out_of_memory_reduces_the_chunk(room: int, reductions: int) -> None:
    hessian, problem, truth = make_layer(40, 32, seed=26)
    device = SmallDevice(room)
    solution = solve_rows(device, hessian, problem)
    assert sum(rows > room for rows in device.tries) == reductions
    assert ("out of memory" in solution.note) == (reductions > 0)
    assert (solution.status_R == Status.CONVERGED).all()
    assert (truth.loss(solution.weight_RD) <= truth.allowance(solution.gap_R.numpy())).all()
    with pytest.raises(torch.OutOfMemoryError):
        solve_rows(SmallDevice(0), hessian, problem)


@pytest.mark.parametrize(("budget_rows", "chunks"), [(0, [1] * 13), (5, [5, 5, 3]), (12, [7, 6]), (13, [13])])
def test_a_budget_bounds_the_rows_solved_together(
    budget_rows: int, chunks: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks are of equal size but for the last."""
    hessian, problem, _ = make_layer(13, 40, seed=7)
    device = SmallDevice(13)
    monkeypatch.setattr("optima.core.problem.BUDGET_BYTES", budget_rows * 40 * BYTES_PER_ENTRY)
    solve_rows(device, hessian, problem)
    assert device.tries == chunks


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


@pytest.mark.parametrize("solver", [LowRankCG(), BatchedCholesky(dtype=torch.float32)], ids=lambda solver: solver.name)
@pytest.mark.parametrize("size", [(512, 8192), (1024, 256)])
def test_working_set(solver: RowSolver, size: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most 4 D^2 + 6 R D numbers beyond inputs and result, and a system of factors for each row of low-rank CG. D^2
    numbers are float64 or float32, the others float32. The direct solver's rows are few here."""
    num_inputs, rows = size
    rows = rows // 16 if solver.name == "cholesky" else rows
    inputs_TD = torch.randn(2 * num_inputs, num_inputs, generator=torch.Generator().manual_seed(0))
    hessian = Hessian(inputs_TD.mT @ inputs_TD / len(inputs_TD))
    problem = make_problem(hessian, *make_rows(rows, num_inputs, seed=1))
    solve_rows(solver, *make_layer(8, 96)[:2])  # the profiler's clock and the library's lazy parts start here
    monkeypatch.setattr("optima.core.problem.CACHE_ENTRIES", 2**33)
    monkeypatch.setattr("optima.core.problem.BUDGET_BYTES", 2**33)
    held = peak_bytes(lambda: solve_rows(solver, hessian, problem), tmp_path)
    factors = rows * FACTORS**2 if solver.name == "low-rank-cg" else 0
    assert held <= 8 * 4 * num_inputs**2 + 4 * (7 * rows * num_inputs + factors) + SMALL
