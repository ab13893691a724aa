"""The OPTIMA paper's solver: MPAX's raPDHG (arXiv 2412.09734), from its own package, vmapped over rows.

In the paper's variables d = v - w the program of a row is: minimise 1/2 d^T H d with d free where the weight is kept
and d = -w where it is pruned (arXiv 2512.13886, which allows a slack of 1e-4). Pruned weights are set to zero
afterwards. Two ways to call MPAX 0.2.4:

* ``sparse``: ``create_qp``'s default stores H as a sparse matrix.
* ``dense``: ``use_sparse_matrix=False``. Without a constraint the package estimates ||A|| as 0/0, so there is one
  harmless row (x_j >= -1e3), at the column where it slows the method least.

Shapes: R rows, D inputs.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from mpax import create_qp, raPDHG
from torch import Tensor

from optima.core import Hessian, RowProblem

STRETCH = 64  # iterations between two looks of raPDHG at its stopping rule and its limit


@dataclass(frozen=True)
class MpaxRows:
    """The rows as MPAX takes them: one dense Q, and two bounds per variable."""

    matrix_DD: jax.Array
    lower_RD: jax.Array
    upper_RD: jax.Array

    @classmethod
    def build(cls, hessian: Hessian, problem: RowProblem) -> MpaxRows:
        target_RD, keep_RD = problem.target_RD.cpu().float(), problem.keep_RD.cpu()
        lower_RD = torch.where(keep_RD, -torch.inf, -target_RD)
        upper_RD = torch.where(keep_RD, torch.inf, -target_RD)
        tensors = (hessian.damped_DD.float().cpu(), lower_RD, upper_RD)
        return cls(*(jnp.asarray(tensor.numpy()) for tensor in tensors))

    def solve(self, form: str, tolerance: float, stretches: int) -> tuple[np.ndarray, np.ndarray]:
        """Corrections d (R, D) and iterations (R,), computed to the end."""
        found = _solve(self.matrix_DD, self.lower_RD, self.upper_RD, tolerance, stretches * STRETCH, form)
        correction, iterations = jax.block_until_ready(found)
        return np.asarray(correction), np.asarray(iterations)


def masked_weight(problem: RowProblem, correction_RD: np.ndarray) -> Tensor:
    """The sparse weight that a correction stands for."""
    weight_RD = problem.target_RD + torch.from_numpy(np.array(correction_RD)).to(problem.target_RD)
    return weight_RD.masked_fill(~problem.keep_RD, 0.0)


@functools.partial(jax.jit, static_argnames="form")
def _solve(matrix_DD: Any, lower_RD: Any, upper_RD: Any, tolerance: Any, limit: Any, form: str) -> tuple[Any, Any]:
    size = matrix_DD.shape[0]
    heaviest = jnp.argmax(jnp.abs(matrix_DD).sum(axis=0))
    row_1D = jnp.zeros((1, size)).at[:, heaviest].set(1.0)

    def one(lower_D: Any, upper_D: Any) -> tuple[Any, Any]:
        program = create_qp(
            matrix_DD, jnp.zeros(size), jnp.zeros((0, size)), jnp.zeros(0), row_1D, jnp.full(1, -1e3),
            lower_D, upper_D, use_sparse_matrix=form == "sparse",
        )  # fmt: skip
        program.is_lp = False  # the dense path would decide this from a traced value
        output = raPDHG(eps_abs=tolerance, eps_rel=tolerance, iteration_limit=limit).optimize(program)
        return output.primal_solution, output.iteration_count

    return jax.vmap(one)(lower_RD, upper_RD)
