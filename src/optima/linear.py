"""Prune one linear. Tensors in, tensors and a record out; no model, file, hook or progress bar.

Shapes: O outputs (rows), D inputs, R rows that are solved together.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from optima.core.hessian import Hessian
from optima.core.problem import RowSolution, Status, concatenate, row_chunks
from optima.core.products import all_finite
from optima.core.rounding import Rounded, round_rows
from optima.core.solvers import RowSolver, make_problem, solve_chunk
from optima.device import Stopwatch, full_precision
from optima.distributed import ALONE, Ranks
from optima.errors import RecipeError
from optima.patterns import Pattern
from optima.reporting.record import LinearRecord
from optima.selectors.base import LinearTask, Selection, Selector
from optima.selectors.ranking import count_error

# A row whose Fisher weight is zero keeps a scale.
SMALLEST_ROOT = 1e-6


@dataclass(frozen=True)
class Methods:
    """What is done to every linear; built once a run.

    Attributes:
        selector: chooses the mask.
        solver: re-solves the kept weights, or None to keep the selector's.
        needs: what calibration finds for the selector: ``coupling``, or nothing more than statistics.
    """

    selector: Selector
    solver: RowSolver | None = None
    needs: frozenset[str] = frozenset()


@dataclass(frozen=True)
class LinearResult:
    """One pruned linear.

    Attributes:
        weight_OD: the weights as they are to be written, in the checkpoint's dtype, zero off keep.
        keep_OD: the mask, True = the weight survives.
        record: what was lost, for the report.
        solution_OD: what the solver found, before it was rounded; None if rows were not solved.
        notes: what a reader of the report must know.
    """

    weight_OD: Tensor
    keep_OD: Tensor
    record: LinearRecord
    solution_OD: Tensor | None = None
    notes: tuple[str, ...] = ()


@torch.no_grad()
def prune_linear(
    task: LinearTask,
    pattern: Pattern,
    methods: Methods,
    dtype: torch.dtype = torch.float32,
    clock: Stopwatch | None = None,
    ranks: Ranks = ALONE,
) -> LinearResult:
    """Select, solve, round and measure one linear.

    Args:
        task: the dense weight, float32 or float64, which is left as it is, and the statistics of its inputs.
        pattern: what to keep.
        methods: how.
        dtype: of the checkpoint: weights are rounded to it, and the record speaks of the rounded ones.
        clock: measures the stages ``select``, ``solve``, ``round`` and ``share``.
        ranks: processes that all have this task: each solves some of its rows, all return the result.

    Raises:
        RecipeError: if the selector breaks its contract (shapes, dtypes, zeros off keep, the pattern's counts).
        NumericalError: if the weight or the hessian cannot be worked with.
    """
    clock = clock or Stopwatch(task.weight_OD.device)
    before = clock.total
    solution = rounded = None
    with full_precision():
        with clock("select"):  # on all ranks: it leaves on the hessian what rows are solved with; that of rank 0 counts
            chosen = ranks.broadcast(select(methods.selector, task, pattern), 0)
        if methods.solver is not None:
            solution, rounded = _solve(methods.solver, task, chosen, dtype, clock, ranks)
        with clock("round"):
            moved_OD = task.weight_OD * chosen.keep_OD if chosen.weight_OD is None else chosen.weight_OD
            weight_OD = moved_OD.to(task.weight_OD.dtype).to(dtype) if rounded is None else rounded.weight_RD
            weight_OD = weight_OD + 0.0  # no -0.0, whose bits are not zero: to a packer it is a value
            errors = _errors(task, chosen, weight_OD, solution, rounded)
    record = LinearRecord(
        block=0,
        name=task.name,
        shape=(task.weight_OD.shape[0], task.weight_OD.shape[1]),
        pattern=str(pattern),
        sparsity_asked=pattern.sparsity,
        sparsity=float((weight_OD == 0).double().mean()),
        rows=len(weight_OD),
        damping=task.hessian.damping,
        tokens=task.hessian.tokens,
        seconds=clock.total - before,
        **errors,
        **_certificates(solution, rounded),
    )
    solution_OD = None if solution is None else solution.weight_RD
    return LinearResult(weight_OD, chosen.keep_OD, record, solution_OD, _notes(task, solution))


def select(selector: Selector, task: LinearTask, pattern: Pattern) -> Selection:
    """What ``selector`` answers, checked.

    Rows scaled by the roots of their Fisher weights compete in units of the weighted loss, whatever the selector.
    """
    root_O1 = None
    if task.row_weight_O is not None:
        weight_O = task.row_weight_O.to(task.weight_OD) / task.row_weight_O.mean()
        root_O1 = weight_O.sqrt().clamp_min(SMALLEST_ROOT)[:, None]
        task = replace(task, weight_OD=task.weight_OD * root_O1)
    if not type(selector).__module__.startswith("optima.selectors."):
        # Other code may work in place, and errors and certificates are measured by these.
        copy = Hessian(task.hessian.matrix_DD, task.hessian.requested_damping, task.hessian.tokens)
        task = replace(task, weight_OD=task.weight_OD.clone(), hessian=copy)
    selection = selector.select(task, pattern)
    problem = _broken(selection, task, pattern)
    if problem:
        raise RecipeError(
            f"selector {type(selector).__name__} broke its contract on {task.name}, pattern {pattern}: {problem}: mend "
            f"the selector, or leave the linear out with --ignore '{re.escape(task.name)}'"
        )
    device, weight_OD = task.weight_OD.device, selection.weight_OD
    if weight_OD is not None:
        weight_OD = weight_OD.to(device) if root_O1 is None else weight_OD.to(device) / root_O1
    return Selection(selection.keep_OD.to(device), weight_OD)


def _broken(selection: Any, task: LinearTask, pattern: Pattern) -> str:
    if not isinstance(selection, Selection):
        return f"it returned {type(selection).__name__}, not a Selection"
    shape, keep_OD, weight_OD = tuple(task.weight_OD.shape), selection.keep_OD, selection.weight_OD
    if not isinstance(keep_OD, Tensor) or keep_OD.dtype != torch.bool or tuple(keep_OD.shape) != shape:
        return f"keep must be boolean of shape {shape} (True = the weight survives)"
    if weight_OD is not None:
        floats = isinstance(weight_OD, Tensor) and weight_OD.is_floating_point() and tuple(weight_OD.shape) == shape
        if not (floats and all_finite(weight_OD)):
            return f"its weights must be finite floats of shape {shape}"
        if bool((weight_OD * ~keep_OD.to(weight_OD.device)).any()):
            return "its weights are not zero where keep is False"
    return count_error(keep_OD, pattern)


def _solve(
    solver: RowSolver, task: LinearTask, chosen: Selection, dtype: torch.dtype, clock: Stopwatch, ranks: Ranks
) -> tuple[RowSolution, Rounded]:
    """Solve and round all rows. Chunks do not depend on the number of ranks, so neither do the bits."""
    total, num_inputs = task.weight_OD.shape
    chunks, parts = row_chunks(num_inputs, total, task.weight_OD.device), []
    for rows in chunks[ranks.part(len(chunks))]:
        with clock("solve"):
            start_RD = None if chosen.weight_OD is None else chosen.weight_OD[rows]
            problem = make_problem(task.hessian, task.weight_OD[rows], chosen.keep_OD[rows], start_RD)
            solution = solve_chunk(solver, task.hessian, problem)
        with clock("round"):
            parts.append((solution, round_rows(task.hessian, problem, solution, dtype)))
    if ranks.size > 1:
        with clock("share"):
            parts = [part for own in ranks.all_gather(parts) for part in own]
    return concatenate([solution for solution, _ in parts]), concatenate([rounded for _, rounded in parts])


def _errors(
    task: LinearTask, chosen: Selection, weight_OD: Tensor, solution: RowSolution | None, rounded: Rounded | None
) -> dict[str, Any]:
    """||X (V - W)^T||^2 / ||X W^T||^2 of the undamped H, for a record.

    Half of the damped error of each row is known where solver and rounding have measured it.
    """
    hessian, dense_OD = task.hessian, task.weight_OD

    def lost(new_OD: Tensor, half_O: Tensor | None = None) -> Tensor:
        change_OD = new_OD.to(dense_OD.dtype) - dense_OD
        return hessian.loss(change_OD) if half_O is None else hessian.undamped(2.0 * half_O, change_OD)

    def ratio(lost_O: Tensor, energy_O: Tensor) -> float:
        """0 where nothing changed, whether or not there is an output at all."""
        part, whole = float(lost_O.sum()), float(energy_O.sum())
        return 0.0 if part == 0.0 else part / whole if whole else math.inf

    energy_O = hessian.loss(dense_OD)
    lost_O = lost(weight_OD, None if rounded is None else rounded.error_R)
    masked_O = lost(dense_OD * chosen.keep_OD, None if solution is None else solution.mask_error_R)
    moved_O = masked_O if chosen.weight_OD is None else lost(chosen.weight_OD.to(weight_OD.dtype))
    return {
        "error_mask": ratio(masked_O, energy_O),
        "error_selector": ratio(moved_O, energy_O),
        "error": ratio(lost_O, energy_O),
    }


def _certificates(solution: RowSolution | None, rounded: Rounded | None) -> dict[str, Any]:
    if solution is None or rounded is None:
        gaps = dict.fromkeys(("gap_max", "gap_written_max", "loss_written"))
        return {"solver": "none", "iterations_mean": 0.0, "iterations_max": 0, "rows_not_converged": 0, **gaps}
    return {
        "solver": solution.solver,
        "gap_max": float(solution.gap_R.max()),
        "gap_written_max": float(rounded.gap_R.max()),
        "loss_written": rounded.excess,
        "iterations_mean": float(solution.iterations_R.double().mean()),
        "iterations_max": int(solution.iterations_R.max()),
        "rows_not_converged": int((solution.status_R != Status.CONVERGED).sum()),
    }


def _notes(task: LinearTask, solution: RowSolution | None) -> tuple[str, ...]:
    notes = []
    if task.hessian.damping != task.hessian.requested_damping:
        notes.append(f"{task.name}: damping raised to {task.hessian.damping:g} to factorise its hessian")
    if solution is not None and solution.note:
        notes.append(f"{task.name}: {solution.note}")
    return tuple(notes)
