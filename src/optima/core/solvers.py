"""Solve rows to a certified relative gap: which solver a row gets, restarts from float64 residuals, chunks of rows.

The inner solve gets residuals and returns corrections; what decides convergence is the certificate, computed from
scratch (Wilkinson's iterative refinement; Higham, Accuracy and Stability of Numerical Algorithms, ch. 12). Only the
first residual is taken in the working precision: an error in it costs another round, never a wrong answer. Rows that
stall in float32 go on in float64.

Shapes: R rows, D inputs, A rows still active.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from optima.core.certificate import ALL, Certificate, Verifier
from optima.core.cg import conjugate_gradient
from optima.core.cholesky import solve_kept
from optima.core.hessian import Hessian
from optima.core.problem import Correction, Residuals, RowProblem, RowSolution, Status, concatenate, row_chunks
from optima.core.products import all_finite, keep_freed_memory, multiply
from optima.device import full_precision, in_halves
from optima.errors import NumericalError, RecipeError

MAX_ROUNDS = 10
# A round that does not shrink the bound by this factor has hit its precision.
STAGNATION = 0.5
# A row that gained less than this over its start is compared with it in float64.
CLOSE = 0.99
# What float64 leaves of E, relative to the row's energy.
ROUNDING = 1e-13
# Costs on a CPU in operations of a dense float32 product, fitted to the measurements in ``Auto``: small batched
# factorisations run at a tenth of its speed, and a gathered number costs as much as a thousand operations.
FACTOR, GATHER, INVERSE = 10.0 / 3.0, 1200.0, 2.0
# Iterations for every digit of the gap.
ITERATIONS_PER_DIGIT = 2.5

# Approximately solves H_SS step_S = residual_S for each row, in the residuals' dtype.
Inner = Callable[[Residuals], Correction]


class RowSolver(Protocol):
    """Re-solves the kept weights of rows that share one Hessian.

    What depends on the Hessian alone belongs in ``Hessian.memo``; the work space of ``solve`` grows with the rows, and
    ``optima.core.solve_rows`` chooses how many.

    Attributes:
        name: what recipes and reports call it.
    """

    name: str

    def solve(self, hessian: Hessian, problem: RowProblem) -> RowSolution:
        """Solve every row of ``problem``."""
        ...


def solve_with_restarts(hessian: Hessian, problem: RowProblem, inner: Inner, gap: float, name: str = "") -> RowSolution:
    """Alternate ``inner`` and the certificate until every row's certified gap is at most ``gap`` or stalls.

    ``name``: of the solver, for the solution.
    """
    with full_precision(), torch.no_grad():
        dtype = hessian.working_dtype
        note = "float64 for all rows" if dtype == torch.float64 else ""
        verifier = Verifier(hessian, problem)
        unit_R = hessian.mean_diagonal * verifier.scale_R.square()  # errors in solvers' units times this are errors
        weight_RD, best, iterations_R, mask_error_R = _first_round(verifier, inner, unit_R)
        status_R = torch.full_like(iterations_R, Status.CONVERGED, dtype=torch.int8)
        active = (~(best.gap_R <= gap)).nonzero()[:, 0]
        for _ in range(MAX_ROUNDS):
            if not len(active):
                break
            before = best.rows(active)
            mask_AD, error_A = verifier.mask_RD[active].to(dtype), before.error_R / unit_R[active]
            correction = inner(Residuals(before.residual_RD.to(dtype), mask_AD, error_A, repeated=True))
            candidate_AD = _stepped(verifier, correction, weight_RD[active], active)
            found = verifier(candidate_AD, active)
            iterations_R[active] += correction.iterations_R
            stalled_A = ~(found.bound_R <= STAGNATION * before.bound_R)
            noise_A = ROUNDING * verifier.energy_R[active]
            better_A = (found.error_R <= before.error_R + noise_A) & (found.gap_R <= before.gap_R)
            _replace(weight_RD, best, active[better_A], candidate_AD[better_A], found.rows(better_A))
            open_A = ~(best.gap_R[active] <= gap)
            if dtype == torch.float64:
                status_R[active[open_A & stalled_A]] = Status.STAGNATED
                open_A &= ~stalled_A
            elif bool((open_A & stalled_A).any()):
                dtype, note = torch.float64, "float64 for some rows"  # without a count: chunks share their note
            active = active[open_A]
        status_R[active] = Status.ITERATION_LIMIT
        facts = best.error_R, best.gap_R, status_R, iterations_R, mask_error_R
        return RowSolution(weight_RD, *facts, solver=name, note=note)


def _first_round(verifier: Verifier, inner: Inner, unit_R: Tensor) -> tuple[Tensor, Certificate, Tensor, Tensor]:
    start_RD, *others = _starts(verifier, ALL)
    residual_RD, error_R = _residual(verifier, start_RD)
    mask_error_R = error_R * unit_R
    for other_RD in others:
        other_residual_RD, other_R = _residual(verifier, other_RD)
        better_R1 = (other_R < error_R)[:, None]
        start_RD = torch.where(better_R1, other_RD, start_RD)
        residual_RD, error_R = torch.where(better_R1, other_residual_RD, residual_RD), torch.minimum(other_R, error_R)
    correction = inner(Residuals(residual_RD, verifier.mask_RD, error_R))
    weight_RD = _stepped(verifier, correction, start_RD, ALL)
    best, iterations_R = verifier(weight_RD), correction.iterations_R
    # Rows that hardly gained: compare with both starts in float64, so that no row ever gets worse.
    doubtful = (~(best.error_R < CLOSE * error_R * unit_R)).nonzero()[:, 0]
    for start_AD in _starts(verifier, doubtful) if len(doubtful) else []:
        start = verifier(start_AD, doubtful)
        worse = best.error_R[doubtful] > start.error_R
        _replace(weight_RD, best, doubtful[worse], start_AD[worse], start.rows(worse))
    return weight_RD, best, iterations_R, mask_error_R


def _starts(verifier: Verifier, rows: slice | Tensor) -> list[Tensor]:
    problem = verifier.problem
    masked_RD = problem.target_RD[rows] * verifier.mask_RD[rows].to(problem.target_RD.dtype)
    return [masked_RD] if problem.start_RD is None else [masked_RD, problem.start_RD[rows]]


def _residual(verifier: Verifier, weight_RD: Tensor) -> tuple[Tensor, Tensor]:
    """The residual on keep and the error of these weights, in solvers' units and the working precision."""
    dtype = verifier.hessian.working_dtype
    scale_R1 = verifier.scale_R.to(dtype)[:, None]
    difference_RD = (verifier.problem.target_RD - weight_RD).to(dtype).div_(scale_R1)
    residual_RD = multiply(difference_RD, verifier.hessian.operator(dtype))
    error_R = 0.5 * torch.linalg.vecdot(difference_RD, residual_RD).double().clamp_min(0.0)
    return residual_RD.mul_(verifier.mask_RD), error_R


def _stepped(verifier: Verifier, correction: Correction, weight_AD: Tensor, rows: slice | Tensor) -> Tensor:
    """The corrected weight in its own dtype, zero off the mask; a correction that is not finite is not taken."""
    scale_A1 = verifier.scale_R[rows, None].to(weight_AD.dtype)
    step_AD = correction.step_RD.to(weight_AD.dtype)
    # Whatever a solver returns: the certificate speaks of weights on the mask.
    new_AD = torch.addcmul(weight_AD, step_AD, scale_A1).mul_(verifier.mask_RD[rows])
    finite_A = new_AD.sum(dim=1).isfinite()
    return new_AD if bool(finite_A.all()) else torch.where(finite_A[:, None], new_AD, weight_AD)


def _replace(weight_RD: Tensor, best: Certificate, rows: Tensor, new_AD: Tensor, found: Certificate) -> None:
    weight_RD[rows] = new_AD
    for ours, theirs in zip(best, found, strict=True):
        ours[rows] = theirs


@dataclass(frozen=True)
class LowRankCG:
    """Conjugate gradient, preconditioned row by row with the factor model of H: no inverse to make.

    Args:
        gap: certified relative gap at which a row stops.
        max_iterations: after which the residual is recomputed from scratch, in float64.
    """

    gap: float = 1e-4
    max_iterations: int = 150

    name = "low-rank-cg"

    def solve(self, hessian: Hessian, problem: RowProblem) -> RowSolution:
        """See ``RowSolver``."""

        def inner(residuals: Residuals) -> Correction:
            # Where the certificate asked for another round, iterate to more than at first.
            aim = 0.5 * self.gap if residuals.repeated else self.gap
            return conjugate_gradient(hessian, residuals, aim, self.max_iterations)

        return solve_with_restarts(hessian, problem, inner, self.gap, self.name)


@dataclass(frozen=True)
class BatchedCholesky:
    """Solve rows exactly, up to rounding, then certify them; in float64 the oracle of the tests.

    Args:
        gap: certified relative gap to reach; only rounding stands in the way, and restarts take most of it.
        dtype: precision of the factorisations. float32 halves their cost; rows where it does not suffice are
            factorised again in float64.
    """

    gap: float = 1e-4
    dtype: torch.dtype = torch.float64

    name = "cholesky"

    def solve(self, hessian: Hessian, problem: RowProblem) -> RowSolution:
        """See ``RowSolver``."""

        def inner(residuals: Residuals) -> Correction:
            dtype = torch.promote_types(self.dtype, residuals.residual_RD.dtype)
            step_RD = solve_kept(hessian, residuals.residual_RD.to(dtype), residuals.mask_RD)
            iterations_R = torch.zeros(len(step_RD), dtype=torch.int32, device=step_RD.device)
            return Correction(step_RD.to(residuals.residual_RD.dtype), iterations_R)

        return solve_with_restarts(hessian, problem, inner, self.gap, self.name)


@dataclass(frozen=True)
class Auto:
    """Low-rank CG or Cholesky, whichever costs a row less.

    Measured (float32, one core of a Zen 5 server, to a certified gap of 1e-4, Gemma 3 270M): Cholesky is faster than CG
    up to about 12, 13, 64, 100 and 200 weights on the smaller of a row's two sets for 64, 128, 640, 1024 and 2048
    inputs. Where all rows are solved by their kept set it also saves the inverse. On a GPU nothing of this was timed:
    there a row is solved directly where its system has no more entries than the row itself.

    A row that iterations do not bring to the gap is solved by Cholesky in float64 as well: damping is next to nothing.

    Args:
        gap: certified relative gap at which a row stops.
    """

    gap: float = 1e-4

    name = "auto"

    def solve(self, hessian: Hessian, problem: RowProblem) -> RowSolution:
        """See ``RowSolver``; ``solver`` of the solution names the choice."""
        # A sum of floats: torch adds booleans an order of magnitude slower.
        kept_R = problem.keep_RD.to(torch.float32).sum(dim=1).double()
        direct_R = self._direct(hessian, kept_R)
        if not bool(direct_R.any()):
            return self._iterated(hessian, problem)
        direct = BatchedCholesky(self.gap, torch.float32)
        if bool(direct_R.all()):
            return direct.solve(hessian, problem)
        rows = [(~direct_R).nonzero()[:, 0], direct_R.nonzero()[:, 0]]
        parts = [self._iterated(hessian, problem.rows(rows[0])), direct.solve(hessian, problem.rows(rows[1]))]
        return _joined(parts, rows)

    def _iterated(self, hessian: Hessian, problem: RowProblem) -> RowSolution:
        found = LowRankCG(self.gap).solve(hessian, problem)
        open_R = found.status_R != Status.CONVERGED
        if not bool(open_R.any()):
            return found
        rows = [(~open_R).nonzero()[:, 0], open_R.nonzero()[:, 0]]
        begun = found.rows(rows[1])
        direct = BatchedCholesky(self.gap).solve(hessian, replace(problem.rows(rows[1]), start_RD=begun.weight_RD))
        direct = replace(direct, iterations_R=begun.iterations_R, solver=f"{direct.solver}+{found.solver}")
        return _joined([found.rows(rows[0]), direct], rows)

    def _direct(self, hessian: Hessian, kept_R: Tensor) -> Tensor:
        num_inputs = float(hessian.num_inputs)
        size_R = torch.minimum(kept_R, num_inputs - kept_R)
        dual_R = 2 * kept_R > num_inputs
        if hessian.device.type != "cpu":
            return (size_R.square() <= num_inputs) & ~dual_R  # which alone would have K made
        direct_R = FACTOR * size_R**3 + GATHER * size_R**2 + torch.where(dual_R, 4 * num_inputs**2, 0.0)
        iterations = max(-ITERATIONS_PER_DIGIT * math.log10(self.gap), 1.0)
        cost = iterations * 2 * num_inputs**2
        found_R = direct_R <= cost
        # Iterations do without K, which rows that keep much must save first. Counted though K may be at hand: the
        # choice must not hang on what was solved before.
        saved = float((cost - direct_R)[found_R & dual_R].sum())
        return found_R & ~dual_R if saved <= INVERSE * num_inputs**3 else found_R


def _joined(parts: list[RowSolution], rows: list[Tensor]) -> RowSolution:
    return concatenate(parts).rows(torch.cat(rows).argsort())


def make_problem(hessian: Hessian, target_RD: Tensor, keep_RD: Tensor, start_RD: Tensor | None = None) -> RowProblem:
    """Check and normalise the rows of one linear.

    Low-precision weights become float32. A dead input has no influence, so its pruned weight costs nothing
    (its target becomes 0) and its kept weight stays as it is.

    Raises:
        RecipeError: on wrong shapes or dtypes.
        NumericalError: on NaN or Inf in the weights.
    """
    shape = (len(target_RD) if target_RD.ndim else 0, hessian.num_inputs)
    for name, tensor in (("weight", target_RD), ("keep", keep_RD), ("start", start_RD)):
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise RecipeError(
                f"{name} has shape {tuple(tensor.shape)} but the weight has {shape[0]} rows and the hessian "
                f"{shape[1]} inputs"
            )
        if name == "keep":
            if tensor.dtype != torch.bool:
                raise RecipeError(f"keep must be boolean (True = the weight survives), got {tensor.dtype}")
        elif not tensor.is_floating_point():
            raise RecipeError(f"{name} must be a float tensor, got {tensor.dtype}")
        elif not all_finite(tensor):
            raise NumericalError(f"{name} contains NaN or Inf: repair the checkpoint first")
    dtype = torch.float64 if target_RD.dtype == torch.float64 else torch.float32
    keep_RD = keep_RD.to(hessian.device)
    target_RD = target_RD.detach().to(hessian.device, dtype)
    if bool(hessian.dead_D.any()):
        target_RD = torch.where(hessian.dead_D, target_RD * keep_RD, target_RD)
    problem = RowProblem(target_RD, keep_RD)
    if start_RD is not None:
        start_RD = torch.where(hessian.dead_D, target_RD, start_RD.detach().to(hessian.device, dtype))
        problem = replace(problem, start_RD=problem.masked(start_RD))
    return problem


# Every row solver, made for a certified relative gap, by the name that recipes and reports call it.
SOLVERS: dict[str, Callable[[float], RowSolver]] = {
    "auto": Auto,
    "low-rank-cg": LowRankCG,
    "cholesky": lambda gap: BatchedCholesky(gap, torch.float32),
}


def make_solver(name: str, gap: float) -> RowSolver | None:
    """The solver called ``name`` that stops at certified relative gap ``gap``; None for ``none``."""
    return None if name == "none" else SOLVERS[name](gap)


def solve_rows(solver: RowSolver, hessian: Hessian, problem: RowProblem) -> RowSolution:
    """Solve every row, chunk by chunk."""
    chunks = row_chunks(hessian.num_inputs, len(problem.target_RD), hessian.device)
    return concatenate([solve_chunk(solver, hessian, problem.rows(rows)) for rows in chunks])


def solve_chunk(solver: RowSolver, hessian: Hessian, problem: RowProblem) -> RowSolution:
    """Solve rows together; fewer rows at a time when the device runs out of memory."""
    keep_freed_memory()
    sizes: list[int] = []
    with full_precision(), torch.no_grad():
        _ = hessian.factorisation  # every certificate needs it, and fewer rows would not help where it does not fit
        parts = in_halves(
            len(problem.target_RD), lambda rows: solver.solve(hessian, problem.rows(rows)), reduced=sizes.append
        )
    solution = concatenate(parts)
    note = f"out of memory: rows in chunks of {sizes[-1]} instead" if sizes else ""
    notes = filter(None, [solution.note, note])
    return replace(solution, solver=solution.solver or solver.name, note="; ".join(notes))


def solve(
    hessian: Hessian | Tensor,
    weight: Tensor,
    keep: Tensor,
    *,
    start: Tensor | None = None,
    solver: RowSolver | None = None,
) -> RowSolution:
    """Re-solve the kept weights of every row.

    For each row: minimise 1/2 (v - w)^T H (v - w) with v = 0 off keep, where w is the row of ``weight``. For a linear
    term g instead, which makes it 1/2 v^T H v - g^T v, let w = H^-1 g.

    Args:
        hessian: X^T X / T, shape (D, D), float32 or float64, or a ``Hessian``, which carries the damping (else 0.01).
        weight: dense rows, shape (R, D), float64, float32, bfloat16 or float16; any strides.
        keep: boolean, shape (R, D), True = the weight survives.
        start: a warm start, zero off keep; used row by row where it is better than the masked weight.
        solver: defaults to ``Auto(gap=1e-4)``.

    Returns:
        The solution with its certificate. ``weight_RD`` is float32 (float64 for a float64 weight).

    Raises:
        RecipeError: on wrong shapes or dtypes.
        NumericalError: on NaN, Inf or an indefinite hessian.
    """
    with full_precision():  # rounded by a caller's autocast, a symmetric matrix may not look like one
        hessian = hessian if isinstance(hessian, Hessian) else Hessian(hessian)
    return solve_rows(solver or Auto(), hessian, make_problem(hessian, weight, keep, start))
