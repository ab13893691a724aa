"""What differs between CUDA and a CPU: bfloat16, TF32, rarer convergence checks, larger blocks, smaller chunks.

Shapes: D inputs, R rows.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from closeness import assert_close_in_norm
from qp_reference import Reference, make_matrix, make_rows, reference
from tiny import make_llama, make_tokens
from torch import Tensor

import optima
from optima.calibration.hessians import Accumulator
from optima.core import (
    Auto,
    BatchedCholesky,
    Hessian,
    LowRankCG,
    RowProblem,
    RowSolver,
    Status,
    certify,
    make_problem,
    solve_rows,
)
from optima.core.rounding import round_rows
from optima.linear import Methods, prune_linear
from optima.patterns import Unstructured
from optima.selectors.base import LinearTask
from optima.selectors.scores import Wanda

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="tests/gpu/test_cuda.py needs a CUDA device")
CUDA = torch.device("cuda")


def layer(rows: int, num_inputs: int) -> tuple[Hessian, RowProblem, Reference]:
    """On the device; the reference is NumPy's."""
    matrix_DD = make_matrix(num_inputs, 2 * num_inputs, seed=1)
    weight_RD, keep_RD = make_rows(rows, num_inputs, seed=2)
    truth = reference(matrix_DD, 0.01, make_problem(Hessian(matrix_DD), weight_RD, keep_RD))
    hessian = Hessian(matrix_DD.to(CUDA))
    return hessian, make_problem(hessian, weight_RD, keep_RD), truth


def assert_certified(weight_RD: Tensor, gap_R: Tensor, truth: Reference) -> None:
    assert weight_RD.device.type == "cuda"
    assert (truth.loss(weight_RD.double().cpu()) <= truth.allowance(gap_R.cpu().numpy())).all()


@pytest.mark.parametrize("gap", [1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize("solver", [LowRankCG, BatchedCholesky, Auto])
def test_rows_reach_their_gap(solver: type[Auto], gap: float) -> None:
    hessian, problem, truth = layer(48, 640)
    solution = solve_rows(solver(gap), hessian, problem)
    assert_certified(solution.weight_RD, solution.gap_R, truth)
    assert (solution.status_R == Status.CONVERGED).all()
    assert (solution.gap_R <= gap).all()


def test_twice_the_same_bits() -> None:
    first, second = (solve_rows(Auto(), *layer(48, 640)[:2]) for _ in range(2))
    assert torch.equal(first.weight_RD, second.weight_RD)


@pytest.mark.parametrize("solver", [LowRankCG(), BatchedCholesky()], ids=lambda solver: solver.name)
def test_small_blocks_change_nothing(solver: RowSolver, monkeypatch: pytest.MonkeyPatch) -> None:
    hessian, problem, truth = layer(40, 96)
    whole = certify(hessian, problem, problem.masked(problem.target_RD))
    monkeypatch.setattr("optima.core.certificate.DEVICE_BLOCK_ENTRIES", 7 * 96)
    monkeypatch.setattr("optima.core.cholesky.DEVICE_BATCH_ENTRIES", 1)
    parts = certify(hessian, problem, problem.masked(problem.target_RD))
    assert_close_in_norm(parts.error_R, whole.error_R, 2.0**20)  # float64 sums that cancel
    torch.testing.assert_close(parts.bound_R, whole.bound_R, rtol=1e-3, atol=0.0)
    solution = solve_rows(solver, hessian, problem)
    assert_certified(solution.weight_RD, solution.gap_R, truth)
    rounded = round_rows(hessian, problem, solution, torch.bfloat16)
    assert_certified(rounded.weight_RD, rounded.gap_R, truth)


def test_a_linear_as_on_a_cpu() -> None:
    matrix_DD, (weight_OD, _) = make_matrix(128, 256, seed=3), make_rows(64, 128, seed=4)
    methods, records = Methods(Wanda(), solver=Auto()), []
    for device in (CUDA, torch.device("cpu")):
        task = LinearTask("linear", weight_OD.to(device), Hessian(matrix_DD.to(device)))
        result = prune_linear(task, Unstructured(0.5, "row"), methods, torch.bfloat16)
        assert result.weight_OD.device.type == result.keep_OD.device.type == device.type
        assert not result.weight_OD[~result.keep_OD].any()
        records.append(result.record)
    ours, theirs = records
    assert ours.error == pytest.approx(theirs.error, rel=1e-2)
    assert ours.sparsity == pytest.approx(theirs.sparsity, abs=1e-3)
    assert ours.rows_not_converged == theirs.rows_not_converged == 0


@pytest.fixture
def little_memory() -> Iterator[None]:
    """300 MiB more than is in use."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(CUDA).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 300 * 2**20) / total)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


def test_hessians_of_bfloat16_inputs_lose_nothing_by_tf32() -> None:
    inputs_TD = torch.randn(4096, 512, generator=torch.Generator().manual_seed(0)).bfloat16()
    accumulator = Accumulator(512, CUDA)
    accumulator.add(inputs_TD.to(CUDA))
    expected_DD = inputs_TD.double().mT @ inputs_TD.double() / 4096
    scale_D = expected_DD.diagonal().sqrt()
    assert ((accumulator.mean().cpu() - expected_DD) / scale_D / scale_D[:, None]).abs().max() < 1e-5


@pytest.mark.usefixtures("little_memory")
def test_out_of_memory_reduces_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """A buffer of all rows takes 32 MiB, and a solve needs more than six of them."""
    hessian = Hessian(make_matrix(128, 256, seed=5).to(CUDA))
    problem = make_problem(hessian, *make_rows(2**16, 128, seed=6))
    monkeypatch.setattr("optima.core.problem.BUDGET_BYTES", 2**33)
    solution = solve_rows(LowRankCG(), hessian, problem)
    assert "out of memory" in solution.note
    assert (solution.status_R == Status.CONVERGED).all()


def test_channels_permuted_on_the_device_are_the_same_function() -> None:
    model, tokens = make_llama(), make_tokens()
    with torch.no_grad():
        before = model(tokens).logits
    found = optima.permute(model, optima.Recipe(pattern=["2:4"]), calibration=tokens, device="cuda", progress=False)
    assert found.permuted
    assert found.rotated
    with torch.no_grad():
        assert_close_in_norm(model(tokens).logits, before)
