"""Properties of the QP engine that hold for every problem.

Shapes: R rows, D inputs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from hypothesis import given, settings, strategies as st
from qp_peers.pdhg import RestartedPDHG
from qp_reference import ROUNDING, Array, Reference, make_matrix, make_rows, reference
from torch import Tensor

from optima.core import (
    Auto,
    BatchedCholesky,
    Hessian,
    LowRankCG,
    RowProblem,
    RowSolution,
    RowSolver,
    certify,
    make_problem,
    solve_rows,
)

GAP = 1e-5
DIRECT: list[RowSolver] = [BatchedCholesky(GAP), BatchedCholesky(GAP, torch.float32)]
SOLVERS: list[RowSolver] = [*DIRECT, RestartedPDHG(1e-2), Auto(GAP), LowRankCG(GAP)]
quick = settings(max_examples=60)


@dataclass(frozen=True)
class Layer:
    """A drawn problem: shown in full by hypothesis, so that a failure can be typed in again."""

    num_inputs: int
    rows: int
    tokens: int
    spread: float
    kept: float
    damping: float
    double: bool
    seed: int

    @property
    def matrix_DD(self) -> Tensor:
        return make_matrix(self.num_inputs, self.tokens, self.seed, self.spread)

    def make(self) -> tuple[Hessian, RowProblem, Reference]:
        hessian = Hessian(self.matrix_DD, self.damping)
        weight_RD, keep_RD = make_rows(self.rows, self.num_inputs, self.seed + 1, self.kept)
        problem = make_problem(hessian, weight_RD.double() if self.double else weight_RD, keep_RD)
        return hessian, problem, reference(self.matrix_DD, hessian.damping, problem)

    @property
    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    def candidate(self, problem: RowProblem) -> Tensor:
        """Some feasible weight."""
        noise_RD = torch.randn(problem.target_RD.shape, generator=self.generator).to(problem.target_RD)
        return problem.masked(problem.target_RD + 0.3 * noise_RD)


def layers() -> st.SearchStrategy[Layer]:
    return st.builds(
        Layer,
        num_inputs=st.integers(1, 40),
        rows=st.integers(1, 6),
        tokens=st.sampled_from([3, 20, 200]),
        spread=st.sampled_from([0.0, 1.0, 3.0]),
        kept=st.sampled_from([0.1, 0.5, 0.9]),
        damping=st.sampled_from([1e-3, 1e-2, 1.0]),
        double=st.booleans(),
        seed=st.integers(0, 10**6),
    )


def solvers() -> st.SearchStrategy[RowSolver]:
    return st.sampled_from(SOLVERS)


def excess(truth: Reference, weight_RD: Tensor) -> Array:
    """E - E*, as far as float64 tells."""
    error: Array = truth.loss(weight_RD) - truth.loss(truth.optimum()) - ROUNDING * truth.energy_R
    return error


def assert_certified(solution: RowSolution, problem: RowProblem, truth: Reference) -> None:
    assert torch.equal(problem.masked(solution.weight_RD), solution.weight_RD), "not feasible"
    assert (truth.loss(solution.weight_RD) <= truth.allowance(solution.gap_R.numpy())).all()


def assert_same_optimum(one_RD: Tensor, other_RD: Tensor, truth: Reference, gap_R: Array) -> None:
    """Both within their gap of the optimum: by strong convexity this close to each other, at most."""
    room_R = 4 * (truth.allowance(gap_R) - truth.loss(truth.optimum()))
    assert (truth.distance(one_RD, other_RD) <= room_R).all()


def worst(*solutions: RowSolution) -> Array:
    return np.max([solution.gap_R.numpy() for solution in solutions], axis=0)


@quick
@given(layers(), solvers())
def test_certified_gap_is_at_least_the_true_gap(layer: Layer, solver: RowSolver) -> None:
    hessian, problem, truth = layer.make()
    assert_certified(solve_rows(solver, hessian, problem), problem, truth)


@quick
@given(layers())
def test_any_feasible_weight_is_certified(layer: Layer) -> None:
    hessian, problem, truth = layer.make()
    weight_RD = layer.candidate(problem)
    certificate = certify(hessian, problem, weight_RD)
    np.testing.assert_allclose(certificate.error_R, truth.loss(weight_RD), rtol=1e-9, atol=0)
    assert (excess(truth, weight_RD) <= certificate.bound_R.numpy()).all()


@quick
@given(layers(), solvers())
def test_the_order_of_inputs_does_not_matter(layer: Layer, solver: RowSolver) -> None:
    hessian, problem, truth = layer.make()
    order = torch.randperm(layer.num_inputs, generator=layer.generator)
    shuffled = Hessian(layer.matrix_DD[order][:, order], layer.damping)
    other = make_problem(shuffled, problem.target_RD[:, order], problem.keep_RD[:, order])
    plain, permuted = solve_rows(solver, hessian, problem), solve_rows(solver, shuffled, other)
    assert_same_optimum(plain.weight_RD, permuted.weight_RD[:, order.argsort()], truth, worst(plain, permuted))


@quick
@given(layers(), solvers(), st.floats(1e-6, 1e6))
def test_the_unit_of_the_activations_does_not_matter(layer: Layer, solver: RowSolver, factor: float) -> None:
    hessian, problem, truth = layer.make()
    scaled = Hessian(layer.matrix_DD.double() * factor, layer.damping)
    plain, other = solve_rows(solver, hessian, problem), solve_rows(solver, scaled, problem)
    assert_same_optimum(plain.weight_RD, other.weight_RD, truth, worst(plain, other))
    np.testing.assert_allclose(other.error_R / factor, truth.loss(other.weight_RD), rtol=1e-9, atol=1e-300)


@quick
@given(layers(), st.integers(-20, 20), st.sampled_from([LowRankCG(GAP), BatchedCholesky(GAP)]))
def test_powers_of_two_change_no_bit(layer: Layer, power: int, solver: RowSolver) -> None:
    """Solvers work in units that are powers of two of the row's size, so this scaling is exact all the way."""
    hessian, problem, _ = layer.make()
    factor = 2.0**power
    plain = solve_rows(solver, hessian, problem)
    other = solve_rows(solver, hessian, replace(problem, target_RD=problem.target_RD * factor))
    assert torch.equal(plain.weight_RD * factor, other.weight_RD)
    assert torch.equal(plain.gap_R, other.gap_R)


@quick
@given(layers(), solvers())
def test_more_kept_weights_never_lose_more(layer: Layer, solver: RowSolver) -> None:
    """Nested masks: up to the gap that was asked for, the errors are in order."""
    hessian, problem, truth = layer.make()
    fewer_RD = problem.keep_RD & (torch.rand(problem.keep_RD.shape, generator=layer.generator) < 0.6)
    more = solve_rows(solver, hessian, problem)
    fewer = solve_rows(solver, hessian, replace(problem, keep_RD=fewer_RD))
    room_R = more.gap_R.numpy() * np.maximum(fewer.error_R.numpy(), 1e-8 * truth.energy_R)
    assert (more.error_R.numpy() <= fewer.error_R.numpy() + room_R + ROUNDING * truth.energy_R).all()
