"""The rows to solve: many small quadratic programs that share one Hessian.

Shapes: R rows, D inputs.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, fields, replace
from enum import IntEnum
from typing import Any, Protocol

import torch
from torch import Tensor

from optima.core.finite import all_finite
from optima.core.hessian import Hessian
from optima.errors import NumericalError, RecipeError


class Status(IntEnum):
    """How a row ended. Data, not an exception: the caller counts and reports."""

    CONVERGED = 0
    ITERATION_LIMIT = 1
    STAGNATED = 2


@dataclass(frozen=True)
class RowProblem:
    """minimise 1/2 (v - w)^T H (v - w) over v with v = 0 off keep.

    This is the program of OPTIMA (arXiv 2512.13886) with the linear term written as g = H w: w is the
    unconstrained optimum, the dense row when the linear's outputs are to be reproduced.

    Attributes:
        target_RD: w, float32 or float64.
        keep_RD: boolean, True = the weight survives.
        start_RD: where to start, zero off keep; the better of this and ``keep * target`` is used.
    """

    target_RD: Tensor
    keep_RD: Tensor
    start_RD: Tensor | None = None

    def rows(self, index: slice | Tensor) -> RowProblem:
        """The sub-problem of the rows that ``index`` selects."""
        start_RD = None if self.start_RD is None else self.start_RD[index]
        return RowProblem(self.target_RD[index], self.keep_RD[index], start_RD)

    def masked(self, weight_RD: Tensor) -> Tensor:
        """``weight_RD`` on keep, zero elsewhere."""
        # On a CPU torch multiplies by floats an order of magnitude faster than it fills by boolean masks.
        return weight_RD * self.keep_RD.to(weight_RD.dtype)


@dataclass(frozen=True)
class RowSolution:
    """What a solver returns, with the certificate computed independently in float64.

    Attributes:
        weight_RD: the solution, zero off keep, in the target's dtype.
        error_R: 1/2 (v - w)^T H (v - w), float64.
        gap_R: certified bound on the relative suboptimality, float64; see ``optima.core.certificate``.
        status_R: ``Status`` values, int8.
        iterations_R: iterations spent on each row, int32 (0 for a direct solve).
        mask_error_R: the error of the target on keep, float64; None if that was not looked at.
        solver: name of the solver that ran; of several, in alphabetical order, joined by a plus.
        note: what a reader of the report should know: where the precision was raised, what had to be halved; empty if
            nothing.
    """

    weight_RD: Tensor
    error_R: Tensor
    gap_R: Tensor
    status_R: Tensor
    iterations_R: Tensor
    mask_error_R: Tensor | None = None
    _: KW_ONLY
    solver: str = ""
    note: str = ""

    def rows(self, index: slice | Tensor) -> RowSolution:
        """The solution of the rows that ``index`` selects."""
        chosen: dict[str, Any] = {name: tensor[index] for name, tensor in self.tensors().items()}
        return replace(self, **chosen)

    def tensors(self) -> dict[str, Tensor]:
        """All that has an entry (or a row) per row, by the name of its attribute."""
        return {field.name: value for field in fields(self) if isinstance(value := getattr(self, field.name), Tensor)}


class RowSolver(Protocol):
    """Re-solves the kept weights of rows that share one Hessian.

    A solver never sees a model, a block or a file. What depends on the Hessian alone belongs in ``Hessian.memo``; the
    work space of ``solve`` grows with the rows it is given, and ``optima.core.rows.solve_rows`` chooses how many.

    Attributes:
        name: what recipes and reports call it.
    """

    name: str

    def solve(self, hessian: Hessian, problem: RowProblem) -> RowSolution:
        """Solve every row of ``problem``."""
        ...


def concatenate(parts: list[RowSolution]) -> RowSolution:
    """One solution of the rows of all ``parts``, in order; at least one part."""
    if len(parts) == 1:
        return parts[0]
    solvers = sorted({name for part in parts for name in part.solver.split("+")})
    notes = dict.fromkeys(part.note for part in parts if part.note)
    every = [part.tensors() for part in parts]
    joined: dict[str, Any] = {
        name: torch.cat([own[name] for own in every]) if all(name in own for own in every) else None
        for name in every[0]
    }
    return replace(parts[0], **joined, solver="+".join(solvers), note="; ".join(notes))


def make_problem(
    hessian: Hessian,
    target_RD: Tensor,
    keep_RD: Tensor,
    start_RD: Tensor | None = None,
) -> RowProblem:
    """Check and normalise the rows of one linear.

    Low-precision weights become float32. A dead input has no influence, so its pruned weight costs nothing
    (its target becomes 0) and its kept weight stays as it is.

    Raises:
        RecipeError: on wrong shapes or dtypes.
        NumericalError: on NaN or Inf in the weights.
    """
    given = {"weight": target_RD, "keep": keep_RD, "start": start_RD}
    tensors = {name: tensor for name, tensor in given.items() if tensor is not None}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise RecipeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if keep_RD.dtype != torch.bool:
        raise RecipeError(f"keep must be boolean (True = the weight survives), got {keep_RD.dtype}")
    for name, tensor in tensors.items():
        _check_rows(name, tensor, (len(target_RD) if target_RD.ndim else 0, hessian.num_inputs))
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


def _check_rows(name: str, tensor: Tensor, shape: tuple[int, int]) -> None:
    if tensor.ndim != 2 or tensor.shape != shape:
        raise RecipeError(
            f"{name} has shape {tuple(tensor.shape)} but the weight has {shape[0]} rows and the hessian "
            f"{shape[1]} inputs"
        )
    if tensor.dtype == torch.bool or not tensor.numel():
        return
    if not tensor.is_floating_point():
        raise RecipeError(f"{name} must be a float tensor, got {tensor.dtype}")
    if not all_finite(tensor):
        raise NumericalError(f"{name} contains NaN or Inf: repair the checkpoint first")


def target_of(hessian: Hessian, linear_term_RD: Tensor) -> Tensor:
    """The unconstrained optimum w = K g of 1/2 v^T H v - g^T v, float64: what ``make_problem`` wants for a given g.

    Raises:
        RecipeError: on wrong shapes, or where g pulls on a dead input, for then nothing bounds the weight.
        NumericalError: on NaN or Inf.
    """
    _check_rows("linear_term", linear_term_RD, (len(linear_term_RD) if linear_term_RD.ndim else 0, hessian.num_inputs))
    linear_term_RD = linear_term_RD.detach().to(hessian.device, torch.float64)
    if bool((linear_term_RD[:, hessian.dead_D] != 0).any()):
        raise RecipeError("linear_term is not zero at a dead input (H_ii = 0), where it has no minimum: set it to zero")
    return torch.cholesky_solve(linear_term_RD.mT, hessian.factor_DD).mT.contiguous()
