"""Every row solver against the contract."""

from __future__ import annotations

import torch
from row_solver_contract import BoundedSolverContract, RowSolverContract

from optima.qp import BatchedCholesky, RowSolver, SharedInverseCG
from optima.qp.bounded import Bounded
from optima.qp.pdhg import RestartedPDHG


class TestSharedInverseCG(RowSolverContract):
    def make(self, gap: float) -> RowSolver:
        return SharedInverseCG(gap=gap)


class TestSharedInverseCGTight(TestSharedInverseCG):
    gap = 1e-6


class TestCholesky(RowSolverContract):
    """Primal and dual: the contract's masks keep from none to all weights."""

    gap = 1e-6

    def make(self, gap: float) -> RowSolver:
        return BatchedCholesky(gap=gap)


class TestCholeskyFloat32(RowSolverContract):
    def make(self, gap: float) -> RowSolver:
        return BatchedCholesky(gap=gap, dtype=torch.float32)


class TestBounded(BoundedSolverContract):
    def make(self, gap: float) -> RowSolver:
        return Bounded(gap=gap)


class TestPDHG(BoundedSolverContract):
    gap = 1e-2

    def make(self, gap: float) -> RowSolver:
        return RestartedPDHG(gap=gap)
