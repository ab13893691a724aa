"""The seam: prune one linear. Tensors in, tensors and a record out; no model, file, hook or progress bar.

Shapes: O outputs (rows), D inputs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from optima.core import RowSolution, RowSolver, Status, make_problem, solve_rows
from optima.core.finite import all_finite
from optima.core.hessian import Hessian
from optima.core.problem import concatenate
from optima.core.rounding import Rounded, round_rows
from optima.core.rows import DEFAULT_BUDGET_BYTES, chunk_rows
from optima.device import Stopwatch, full_precision
from optima.distributed import ALONE, Ranks
from optima.errors import RecipeError
from optima.patterns import Pattern
from optima.recipe import SELECTOR_NAMES
from optima.reporting.record import LinearRecord
from optima.selectors.base import LinearTask, Selection, Selector
from optima.selectors.ranking import count_error

Named = TypeVar("Named")

SELECTORS_PACKAGE = "optima.selectors."
# A row that the loss does not feel at all keeps a scale.
SMALLEST_ROOT = 1e-6


@dataclass(frozen=True)
class Methods:
    """What is done to every linear; built once a run.

    Attributes:
        selector: chooses the mask.
        solver: re-solves the kept weights, or None to keep the selector's.
        budget_bytes: work space of the solver for one chunk of rows.
        needs: what calibration finds for the selector, of what it asks for, see ``optima.selectors.base.needs_of``.
    """

    selector: Selector
    solver: RowSolver | None = None
    budget_bytes: int = DEFAULT_BUDGET_BYTES
    needs: frozenset[str] = frozenset()


@dataclass(frozen=True)
class LinearResult:
    """What became of one linear.

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
    together: Ranks = ALONE,
) -> LinearResult:
    """Select, solve, round and measure one linear.

    Args:
        task: the dense weight, float32 or float64, which is left as it is, and the statistics of its inputs.
        pattern: what to keep.
        methods: how.
        dtype: of the checkpoint: weights are rounded to it, and the record speaks of the rounded ones.
        clock: measures the stages ``select``, ``solve``, ``round`` and ``share``.
        together: processes that were all given this linear: each has some of its rows, all have the result.

    Raises:
        RecipeError: if the selector breaks its contract (shapes, dtypes, zeros off keep, the pattern's counts).
        NumericalError: if the weight or the hessian cannot be worked with.
    """
    clock = clock or Stopwatch(task.weight_OD.device)
    before = clock.total
    with full_precision():
        with clock("select"):
            # By all, for it leaves what rows are solved with on the hessian; the first one's counts.
            chosen = together.broadcast(_select(methods.selector, task, pattern), 0)
        chunks = _chunks(task, methods.budget_bytes)
        own = [_work(task, chosen, pattern, methods, dtype, clock, rows) for rows in chunks[together.part(len(chunks))]]
        if together.size > 1:
            with clock("share"):
                own = [part for parts in together.all_gather(own) for part in parts]
        selection, solution, rounded = _whole(own)
        with clock("round"):
            weight_OD = _kept(task, selection).to(dtype) if rounded is None else rounded.weight_RD
            weight_OD = weight_OD + 0.0  # no -0.0, whose bits are not zero: to a packer it is a value
            errors = _measure(task, selection, weight_OD, solution, rounded)
    record = LinearRecord(
        block=0,
        name=task.name,
        shape=(task.weight_OD.shape[0], task.weight_OD.shape[1]),
        pattern=str(pattern),
        sparsity_asked=pattern.sparsity,
        sparsity=float((weight_OD == 0).double().mean()),
        **errors,
        **certified(solution, rounded),
        rows=len(weight_OD),
        damping=task.hessian.damping,
        tokens=task.statistics.tokens,
        seconds=clock.total - before,
    )
    solution_OD = None if solution is None else solution.weight_RD
    return LinearResult(weight_OD, selection.keep_OD, record, solution_OD, _notes(task, solution))


class _Rows(NamedTuple):
    """What has become of some rows of a linear: all that follows its mask goes row by row."""

    selection: Selection
    solution: RowSolution | None
    rounded: Rounded | None


def _chunks(task: LinearTask, budget_bytes: int) -> list[slice]:
    """Rows that are worked on together, however many processes share them: so that these do not change a digit."""
    total, size = task.weight_OD.shape
    chunk = chunk_rows(size, total, task.weight_OD.device, budget_bytes)
    return [slice(begin, begin + chunk) for begin in range(0, max(total, 1), chunk)]


def _work(
    task: LinearTask,
    selection: Selection,
    pattern: Pattern,
    methods: Methods,
    dtype: torch.dtype,
    clock: Stopwatch,
    rows: slice,
) -> _Rows:
    """Solve and round ``rows``."""
    task = replace(task, weight_OD=task.weight_OD[rows])
    moved_RD = None if selection.weight_OD is None else selection.weight_OD[rows]
    selection = Selection(selection.keep_OD[rows], moved_RD)
    solution = rounded = None
    if methods.solver is not None:
        with clock("solve"):
            problem = make_problem(task.hessian, task.weight_OD, selection.keep_OD, selection.weight_OD)
            solution = solve_rows(methods.solver, task.hessian, problem, methods.budget_bytes)
        with clock("round"):
            rounded = round_rows(task.hessian, problem, solution, dtype)
    return _Rows(selection, solution, rounded)


def _whole(parts: Sequence[_Rows]) -> _Rows:
    """All rows of a linear."""
    if len(parts) == 1:
        return parts[0]

    def joined(kind: type[Named], values: Sequence[Named | None], names: Sequence[str]) -> Named | None:
        """Values whose attributes have an entry a row."""
        known = [value for value in values if value is not None]
        if len(known) < len(values):
            return None
        columns = [[getattr(value, name) for value in known] for name in names]
        return kind(*(None if column[0] is None else torch.cat(column) for column in columns))

    selection = joined(Selection, [part.selection for part in parts], ("keep_OD", "weight_OD"))
    assert selection is not None
    solutions = [part.solution for part in parts if part.solution is not None]
    return _Rows(
        selection,
        concatenate(solutions) if solutions else None,
        joined(Rounded, [part.rounded for part in parts], [field.name for field in fields(Rounded)]),
    )


def _select(selector: Selector, task: LinearTask, pattern: Pattern) -> Selection:
    """What ``selector`` answers, checked, the dense weight unharmed: errors are measured against it."""
    root_O1 = None
    if task.row_weight_O is not None:
        # Rows scaled by the roots of their weights compete in units of the weighted loss, whatever the selector.
        weight_O = task.row_weight_O.to(task.weight_OD) / task.row_weight_O.mean()
        root_O1 = weight_O.sqrt().clamp_min(SMALLEST_ROOT)[:, None]
        task = replace(task, weight_OD=task.weight_OD * root_O1)
    selection = selector.select(task if is_own(selector) else _lent(task), pattern)
    name = type(selector).__name__
    if not isinstance(selection, Selection):
        raise RecipeError(f"selector {name} returned {type(selection).__name__}, not a Selection: mend the selector")
    selection = checked(selection, task, pattern, selector)
    if root_O1 is not None and selection.weight_OD is not None:
        return Selection(selection.keep_OD, selection.weight_OD / root_O1)
    return selection


def is_own(selector: object) -> bool:
    """Whether a selector, or its name, is one of the package, which leave what they are given as it is."""
    if isinstance(selector, str):
        return selector in SELECTOR_NAMES
    return type(selector).__module__.startswith(SELECTORS_PACKAGE)


def _lent(task: LinearTask) -> LinearTask:
    """The task with copies of what errors and certificates are measured by, for code that may work in place."""
    hessian, statistics = task.hessian, task.statistics
    copy = Hessian(hessian.matrix_DD, hessian.requested_damping)
    extra_ND, sample_ND = (
        None if each is None else each.clone() for each in (statistics.extra_ND, statistics.sample_ND)
    )
    statistics = replace(statistics, hessian=copy, extra_ND=extra_ND, sample_ND=sample_ND)
    return replace(task, weight_OD=task.weight_OD.clone(), statistics=statistics)


def checked(selection: Selection, task: LinearTask, pattern: Pattern, selector: Selector) -> Selection:
    """``selection``, or an error that names what it breaks: nothing false may reach the report."""
    device, keep_OD, weight_OD = task.weight_OD.device, selection.keep_OD, selection.weight_OD
    shape = tuple(task.weight_OD.shape)
    problem = ""
    if not isinstance(keep_OD, Tensor) or keep_OD.dtype != torch.bool or tuple(keep_OD.shape) != shape:
        problem = f"keep must be boolean of shape {shape} (True = the weight survives)"
    elif weight_OD is not None and not _floats(weight_OD, shape):
        problem = f"its weights must be finite floats of shape {shape}"
    elif weight_OD is not None and bool((weight_OD.to(device) * ~keep_OD.to(device)).any()):
        problem = "its weights are not zero where keep is False"
    else:
        problem = count_error(keep_OD, pattern)
    if problem:
        raise RecipeError(
            f"selector {type(selector).__name__} broke its contract on {task.name}, pattern {pattern}: {problem}: mend "
            f"the selector, or leave the linear out with --ignore '{re.escape(task.name)}'"
        )
    return Selection(keep_OD.to(device), None if weight_OD is None else weight_OD.to(device))


def _floats(weight_OD: object, shape: tuple[int, ...]) -> bool:
    if not isinstance(weight_OD, Tensor) or tuple(weight_OD.shape) != shape:
        return False
    return weight_OD.is_floating_point() and all_finite(weight_OD)


def _kept(task: LinearTask, selection: Selection) -> Tensor:
    """The selector's weights, in the dense weight's dtype: its own, or the dense ones on its mask."""
    if selection.weight_OD is not None:
        return selection.weight_OD.to(task.weight_OD.dtype)
    return task.weight_OD * selection.keep_OD


def _measure(
    task: LinearTask,
    selection: Selection,
    weight_OD: Tensor,
    solution: RowSolution | None,
    rounded: Rounded | None,
) -> dict[str, Any]:
    """The errors of a record: ||X (V - W)^T||^2 / ||X W^T||^2 of the undamped H, all but the mask's as written.

    Solver and rounding have looked at what they leave, and at the mask: half of the damped error of each row is known.
    """
    hessian, weight_dtype = task.hessian, task.weight_OD.dtype

    def plain(lost_O: Tensor, change_OD: Tensor) -> float:
        return float(task.statistics.plain_loss(lost_O, change_OD).sum())

    def share(lost: float, whole: float) -> float:
        """0 where nothing changed, whether or not there is an output at all."""
        return 0.0 if lost == 0.0 else lost / whole if whole else math.inf

    def lost(new_OD: Tensor, error_O: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Of new weights: each row's loss, and the change."""
        change_OD = new_OD.to(weight_dtype) - task.weight_OD
        return hessian.loss(change_OD) if error_O is None else hessian.undamped(2.0 * error_O, change_OD), change_OD

    energy_O = hessian.loss(task.weight_OD)
    energy, written = float(energy_O.sum()), lost(weight_OD, None if rounded is None else rounded.error_R)
    error = share(float(written[0].sum()), energy)
    masked_OD = task.weight_OD * selection.keep_OD
    known_O = None if solution is None else solution.mask_error_R
    if known_O is None and torch.equal(weight_OD.to(weight_dtype), masked_OD):
        mask = error
    else:
        mask = share(float(lost(masked_OD, known_O)[0].sum()), energy)
    selector = mask
    if selection.weight_OD is not None:
        selector = share(float(lost(selection.weight_OD.to(weight_OD.dtype))[0].sum()), energy)
    alike = share(plain(*written), plain(energy_O, task.weight_OD))
    return {"error_mask": mask, "error_selector": selector, "error": error, "error_plain": alike}


def certified(solution: RowSolution | None, rounded: Rounded | None) -> dict[str, Any]:
    """What the solver did and what is proven, before and after rounding, as fields of a ``LinearRecord``."""
    if solution is None or rounded is None:
        gaps = dict.fromkeys(("gap_max", "gap_median", "gap_written_max", "gap_written_median", "loss_written"))
        return {"solver": "none", "iterations_mean": 0.0, "iterations_max": 0, "rows_not_converged": 0, **gaps}
    return {
        "solver": solution.solver,
        "gap_max": float(solution.gap_R.max()),
        "gap_median": float(solution.gap_R.median()),
        "gap_written_max": float(rounded.gap_R.max()),
        "gap_written_median": float(rounded.gap_R.median()),
        "loss_written": above_least(rounded),
        "iterations_mean": float(solution.iterations_R.double().mean()),
        "iterations_max": int(solution.iterations_R.max()),
        "rows_not_converged": int((solution.status_R != Status.CONVERGED).sum()),
    }


def above_least(rounded: Rounded) -> float:
    """Loss of all rows as written above what their masks must lose by the certificates, relative to that."""
    least = float(rounded.least_R.sum())
    return float((rounded.gap_R * rounded.least_R).sum()) / least if least else 0.0


def _notes(task: LinearTask, solution: RowSolution | None) -> tuple[str, ...]:
    notes = []
    if task.hessian.damping != task.hessian.requested_damping:
        notes.append(f"{task.name}: damping raised to {task.hessian.damping:g} to factorise its hessian")
    if solution is not None and solution.note:
        notes.append(f"{task.name}: {solution.note}")
    return tuple(notes)
