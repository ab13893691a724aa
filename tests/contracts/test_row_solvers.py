"""Every row solver against the contract."""

from __future__ import annotations

import pytest
import torch
from qp_peers.pdhg import RestartedPDHG
from row_solver_contract import RowSolverContract

from optima.core import (
    SOLVERS,
    Auto,
    BatchedCholesky,
    LowRankCG,
    RowSolver,
    make_solver,
)


class TestLowRankCG(RowSolverContract):
    def make(self, gap: float) -> RowSolver:
        return LowRankCG(gap=gap)


class TestLowRankCGTight(TestLowRankCG):
    gap = 1e-6


class TestCholesky(RowSolverContract):
    """Primal and dual: the contract's masks keep from none to all weights."""

    gap = 1e-6

    def make(self, gap: float) -> RowSolver:
        return BatchedCholesky(gap=gap)


class TestCholeskyFloat32(RowSolverContract):
    def make(self, gap: float) -> RowSolver:
        return BatchedCholesky(gap=gap, dtype=torch.float32)


class TestPDHG(RowSolverContract):
    """The paper's method, a peer of the benchmarks behind the same protocol."""

    gap = 1e-2

    def make(self, gap: float) -> RowSolver:
        return RestartedPDHG(gap=gap)


class TestAuto(RowSolverContract):
    def make(self, gap: float) -> RowSolver:
        return Auto(gap=gap)


@pytest.mark.parametrize("name", SOLVERS)
def test_every_registered_solver_inherits_the_contract(name: str) -> None:
    solver = make_solver(name, 1e-3)
    assert solver is not None
    contracts = [value for key, value in globals().items() if key.startswith("Test")]
    made = [contract().make(1e-3) for contract in contracts]
    assert any(type(solver) is type(other) for other in made)
