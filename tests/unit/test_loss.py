"""What a change of the weights loses on the undamped Hessian.

Shapes: O outputs, D inputs.
"""

from __future__ import annotations

import pytest
import torch
from qp_reference import make_matrix, make_rows
from torch import Tensor

from optima.core import Hessian, make_problem, solve_rows
from optima.core.solvers import Auto


def solved(matrix_DD: Tensor, damping: float, dtype: torch.dtype) -> tuple[Hessian, Tensor]:
    """The hessian, and the change of the weights."""
    hessian = Hessian(matrix_DD, damping)
    problem = make_problem(hessian, *make_rows(40, len(matrix_DD), seed=1))
    solution = solve_rows(Auto(), hessian, make_problem(hessian, problem.target_RD.to(dtype), problem.keep_RD))
    return hessian, problem.target_RD.double() - solution.weight_RD


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("damping", [1e-6, 0.01, 1.0])
@pytest.mark.parametrize("tokens", [40, 400])
def test_loss_against_float64(damping: float, tokens: int, dtype: torch.dtype) -> None:
    matrix_DD = make_matrix(96, tokens, seed=2)
    matrix_DD[5] = matrix_DD[:, 5] = 0.0
    hessian, change_OD = solved(matrix_DD, damping, dtype)
    expected_O = torch.linalg.vecdot(change_OD @ matrix_DD.double(), change_OD)
    expected_O = expected_O.clamp_min(0.0)  # rounded to float32, a singular matrix has negative eigenvalues
    torch.testing.assert_close(hessian.loss(change_OD), expected_O, rtol=2e-4, atol=0.0)
    torch.testing.assert_close(float(hessian.loss(change_OD).sum()), float(expected_O.sum()), rtol=1e-5, atol=0.0)


def test_nothing_changed_nothing_lost() -> None:
    hessian = Hessian(make_matrix(16, 32, seed=3))
    assert not hessian.loss(torch.zeros(3, 16)).any()
    assert hessian.loss(torch.zeros(0, 16)).shape == (0,)


def test_one_matrix_is_kept() -> None:
    """Undamped and damped differ on the diagonal: the given matrix is let go once it has been factorised."""
    matrix_DD = make_matrix(32, 64, seed=4).double()
    hessian = Hessian(matrix_DD, 0.5)
    before_DD = hessian.matrix_DD
    assert torch.equal(hessian.factorisation.damped_DD, hessian.damped(0.5))
    matrix_DD.zero_()
    assert torch.equal(hessian.matrix_DD, before_DD)
    torch.testing.assert_close(
        hessian.damped_DD.diagonal() - hessian.diagonal_D,
        torch.full_like(hessian.diagonal_D, 0.5 * hessian.mean_diagonal),
    )


def test_a_dead_input_loses_nothing() -> None:
    """Whatever becomes of its weight."""
    matrix_DD = make_matrix(24, 48, seed=2)
    matrix_DD[5] = matrix_DD[:, 5] = 0.0
    hessian = Hessian(matrix_DD)
    change_OD = torch.randn(10, 24, generator=torch.Generator().manual_seed(0))
    expected_O = torch.linalg.vecdot(change_OD.double() @ matrix_DD.double(), change_OD.double())
    torch.testing.assert_close(hessian.loss(change_OD), expected_O, rtol=1e-4, atol=0.0)


def test_loss_is_undamped_where_the_damping_was_raised() -> None:
    matrix_DD = make_matrix(96, 40, seed=2)
    hessian = Hessian(matrix_DD.double() - 1e-6 * float(matrix_DD.diagonal().mean()) * torch.eye(96), damping=0.0)
    change_OD = torch.randn(10, 96, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected_O = torch.linalg.vecdot(change_OD @ hessian.matrix_DD, change_OD)
    assert hessian.damping > hessian.requested_damping
    torch.testing.assert_close(hessian.loss(change_OD), expected_O, rtol=1e-7, atol=0.0)
