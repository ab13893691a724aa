"""Every row solver against the contract."""

from __future__ import annotations

import pytest
import torch
from qp_peers.pdhg import RestartedPDHG
from row_solver_contract import RowSolverContract

from optima.core import SOLVERS, Auto, BatchedCholesky, LowRankCG, RowSolver, make_solver


class TestLowRankCG(RowSolverContract):
    def make(self, gap: float) -> RowSolver:
        return LowRankCG(gap)


class TestLowRankCGTight(TestLowRankCG):
    gap = 1e-6


class TestCholesky(RowSolverContract):
    gap = 1e-6

    def make(self, gap: float) -> RowSolver:
        return BatchedCholesky(gap)


class TestCholeskyFloat32(RowSolverContract):
    def make(self, gap: float) -> RowSolver:
        return BatchedCholesky(gap, torch.float32)


class TestPDHG(RowSolverContract):
    """The paper's method, a peer of the benchmarks."""

    gap = 1e-2

    def make(self, gap: float) -> RowSolver:
        return RestartedPDHG(gap)


class TestAuto(RowSolverContract):
    def make(self, gap: float) -> RowSolver:
        return Auto(gap)


@pytest.mark.parametrize("name", SOLVERS)
def test_every_registered_solver_inherits_the_contract(name: str) -> None:
    made = [value().make(1e-3) for key, value in globals().items() if key.startswith("Test")]
    assert type(make_solver(name, 1e-3)) in map(type, made)
