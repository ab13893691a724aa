"""The rows to benchmark: real layers from dump.py, and synthetic ones with LLM-like spectra.

A dump is one safetensors file per linear, named after it, with ``hessian`` (D, D), undamped X^T X / T, and
``weight`` (O, D).

Shapes: O outputs (rows), D inputs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from qp_peers.pdhg import RestartedPDHG
from safetensors.torch import load_file
from torch import Tensor

from optima.core import SOLVERS, Hessian, RowProblem, RowSolver, make_problem, make_solver
from optima.errors import RecipeError
from optima.patterns import Unstructured
from optima.selectors.base import LinearTask, make_selector


@dataclass(frozen=True)
class Case:
    """One linear: its weight and the undamped Hessian of its inputs."""

    name: str
    hessian_DD: Tensor
    weight_OD: Tensor

    @property
    def num_inputs(self) -> int:
        return self.hessian_DD.shape[0]

    @property
    def num_rows(self) -> int:
        return self.weight_OD.shape[0]

    def problem(self, hessian: Hessian, sparsity: float) -> RowProblem:
        """The rows under Wanda's mask, which prunes the same number of weights in each."""
        task = LinearTask(self.name, self.weight_OD, hessian)
        selection = make_selector("wanda").select(task, Unstructured(sparsity, "row"))
        return make_problem(hessian, self.weight_OD, selection.keep_OD)


# Ours, and the paper's method behind the same protocol.
SOLVER_NAMES = (*SOLVERS, "pdhg")


def solver_of(name: str, gap: float) -> RowSolver:
    """One of ``SOLVER_NAMES`` at a certified gap."""
    solver = RestartedPDHG(gap) if name == "pdhg" else make_solver(name, gap)
    assert solver is not None
    return solver


def load_cases(directory: Path, pattern: str, device: torch.device, max_rows: int | None = None) -> list[Case]:
    """Every dumped linear whose name matches ``pattern``, smallest D first.

    Raises:
        RecipeError: if there is none.
    """
    paths = [path for path in sorted(directory.glob("*.safetensors")) if re.search(pattern, path.stem)]
    if not paths:
        known = ", ".join(path.stem for path in sorted(directory.glob("*.safetensors"))) or "no .safetensors file"
        raise RecipeError(f"no dumped layer in {directory} matches {pattern!r}: found {known}")
    cases = []
    for path in paths:
        tensors = load_file(path, device=str(device))
        cases.append(Case(path.stem, tensors["hessian"], tensors["weight"].float()[:max_rows]))
    return sorted(cases, key=lambda case: case.num_inputs)


def synthetic_case(num_inputs: int, num_rows: int, device: torch.device, seed: int = 0) -> Case:
    """A linear with the spectrum of an LLM's: power law, correlated inputs, a few massive activations."""
    generator = torch.Generator().manual_seed(seed)
    hessian_DD = llm_like_hessian(num_inputs, device, generator)
    weight_OD = 0.03 * torch.randn(num_rows, num_inputs, generator=generator)
    return Case(f"synthetic-{num_inputs}", hessian_DD, weight_OD.to(device))


def llm_like_hessian(num_inputs: int, device: torch.device, generator: torch.Generator) -> Tensor:
    """S (0.85 C + 0.15 I) S in float32, C a random covariance with eigenvalues i^-0.9 and S the scales of the inputs.

    Fitted to the layers of Gemma 3 270M: correlation spectra that fall as a power law from about 100 and flatten
    at 0.1 .. 0.3, diagonals over three to five decades, 0.3 % of the inputs 30 times larger than the rest (the
    "massive activations" of Sun et al., COLM 2024).
    """
    mixing_DD = torch.randn(num_inputs, num_inputs, generator=generator).to(device)
    strength_D = torch.arange(1, num_inputs + 1, dtype=torch.float32, device=device) ** -0.9
    mixing_DD *= (0.85 * strength_D / strength_D.sum()).sqrt()[:, None]
    correlated_DD = mixing_DD.mT @ mixing_DD
    correlated_DD = 0.5 * (correlated_DD + correlated_DD.mT)  # a product's two triangles may round differently
    correlated_DD.diagonal().add_(0.15)
    scale_D = torch.randn(num_inputs, generator=generator).mul(0.5).exp()
    massive = torch.randperm(num_inputs, generator=generator)[: max(num_inputs * 3 // 1000, 1)]
    scale_D[massive] *= 30.0
    scale_D = scale_D.to(device)
    return correlated_DD.mul_(torch.outer(scale_D, scale_D))
