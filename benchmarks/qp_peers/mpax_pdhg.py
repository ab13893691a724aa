"""The OPTIMA paper's solver: MPAX's raPDHG (arXiv 2412.09734), from its own package, vmapped over rows.

In the paper's variables d = v - w the program of a row is: minimise 1/2 d^T H d with d free where the weight is kept
and -w <= d <= -w + slack where it is pruned (arXiv 2512.13886; slack 1e-4, eps 1e-2). Pruned weights are set to zero
afterwards. Three ways to call it, from the least to the most favourable to MPAX 0.2.4:

* ``sparse``: ``create_qp``'s default stores H as a sparse matrix.
* ``dense``: ``use_sparse_matrix=False``. Still needs a constraint: with none the package estimates ||A|| as 0/0, so
  one harmless row (x_j >= -1e3) is added, at the column where it slows the method least.
* ``repaired``: no constraints, and ||A|| = 0 put right by a subclass. The package does not do this; it is the fastest
  form that we found, and the one to beat.

Shapes: R rows, D inputs.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import torch
from mpax import create_qp, raPDHG
from torch import Tensor

from optima.core import Hessian, RowProblem

Form = Literal["sparse", "dense", "repaired"]
PAPER_SLACK = 1e-4
PAPER_EPS = 1e-2
# raPDHG looks at its stopping rule, and counts its limit, in units of this many iterations.
STRETCH = 64


class _NoConstraints(raPDHG):
    """raPDHG with the norm of an empty constraint matrix, 0, in place of the package's 0/0."""

    def initialize_solver_status(self, *args: Any, **kwargs: Any) -> Any:
        status = super().initialize_solver_status(*args, **kwargs)
        self._norm_A = 0.0
        return status


@dataclass(frozen=True)
class MpaxRows:
    """The rows as MPAX takes them: one dense Q, and two bounds per variable."""

    matrix_DD: jax.Array
    lower_RD: jax.Array
    upper_RD: jax.Array

    @classmethod
    def build(cls, hessian: Hessian, problem: RowProblem, slack: float, scale: float = 1.0) -> MpaxRows:
        """``scale`` multiplies H: the stopping rule is absolute, so X^T X and X^T X / T differ under the same eps."""
        target_RD, keep_RD = problem.target_RD.cpu().float(), problem.keep_RD.cpu()
        lower_RD = torch.where(keep_RD, -torch.inf, -target_RD)
        upper_RD = torch.where(keep_RD, torch.inf, slack - target_RD)
        matrix_DD = (scale * hessian.damped_DD).float().cpu()
        return cls(*(jnp.asarray(tensor.numpy()) for tensor in (matrix_DD, lower_RD, upper_RD)))

    def solve(self, form: Form, eps: float, stretches: int) -> tuple[np.ndarray, np.ndarray]:
        """Corrections d (R, D) and iterations (R,), computed to the end."""
        correction, iterations = _solve(self.matrix_DD, self.lower_RD, self.upper_RD, eps, stretches * STRETCH, form)
        jax.block_until_ready(correction)
        return np.asarray(correction), np.asarray(iterations)


def masked_weight(problem: RowProblem, correction_RD: np.ndarray) -> Tensor:
    """The sparse weight that a correction stands for."""
    weight_RD = problem.target_RD + torch.from_numpy(np.array(correction_RD)).to(problem.target_RD)
    return weight_RD.masked_fill(~problem.keep_RD, 0.0)


@functools.partial(jax.jit, static_argnames="form")
def _solve(matrix_DD: Any, lower_RD: Any, upper_RD: Any, eps: Any, limit: Any, form: Form) -> tuple[Any, Any]:
    size = matrix_DD.shape[0]
    constraints = 0 if form == "repaired" else 1
    heaviest = jnp.argmax(jnp.abs(matrix_DD).sum(axis=0))
    row_D = jnp.zeros((constraints, size)).at[:, heaviest].set(1.0)

    def one(lower_D: Any, upper_D: Any) -> tuple[Any, Any]:
        program = create_qp(
            matrix_DD, jnp.zeros(size), jnp.zeros((0, size)), jnp.zeros(0), row_D, jnp.full(constraints, -1e3),
            lower_D, upper_D, use_sparse_matrix=form == "sparse",
        )  # fmt: skip
        program.is_lp = False  # the dense path would decide this from a traced value
        solver = _NoConstraints if form == "repaired" else raPDHG
        output = solver(eps_abs=eps, eps_rel=eps, iteration_limit=limit).optimize(program)
        return output.primal_solution, output.iteration_count

    return jax.vmap(one)(lower_RD, upper_RD)
