"""Row correlations: found by the gradient pass, and used by the masks of ``optima``."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from closeness import assert_close_in_norm
from families import gradient_at, stack_of
from layers import layer_of, make_layer
from tiny import make_llama, make_tokens

from optima.calibration.activations import capture
from optima.calibration.fisher import fisher_weights
from optima.calibration.weights import SHRINKAGE, correlated_rows, couples
from optima.core.shifted import coupled_inverse, eigen_inverse, eigendecomposition, factored_inverse
from optima.patterns import NM, Pattern, Unstructured
from optima.selectors.optima import Optima


def correlations(product_OO: torch.Tensor) -> torch.Tensor:
    unit_O = product_OO.diagonal().rsqrt()
    return product_OO * unit_O * unit_O[:, None]


def test_they_are_those_of_the_gradients_of_the_whole_model() -> None:
    model = make_llama().eval()
    tokens_NL = make_tokens(8, 16)
    stack = stack_of(model)
    acts = capture(model, stack, list(tokens_NL.split(4)), whole=True)
    found = fisher_weights(model, stack, acts, seed=3, coupled=True)
    assert set(found.coupling) == {linear.name for block in stack.blocks for linear in block.linears if couples(linear)}
    name = "model.layers.1.mlp.down_proj"
    halves = torch.zeros(2, 32, 32, dtype=torch.float64)
    for number, gradient_LO in enumerate(gradient_at(model, model.get_submodule(name), tokens_NL).double().split(16)):
        tempered_LO = gradient_LO / gradient_LO.norm(dim=1, keepdim=True).sqrt()
        halves[number % 2] += tempered_LO.mT @ tempered_LO
    assert_close_in_norm(found.coupling[name], correlated_rows(halves), 2.0)  # stored in float16
    off_OO = correlations(halves.sum(dim=0)).fill_diagonal_(0.0)
    share = float(found.coupling[name].double().fill_diagonal_(0.0).norm() / off_OO.norm())
    assert 0.0 < share < SHRINKAGE


def test_what_halves_do_not_agree_on_is_shrunk() -> None:
    torch.manual_seed(0)
    mixing_OO = torch.eye(24) + 0.3 * torch.randn(24, 24)
    truth_OO = correlations(mixing_OO @ mixing_OO.mT)
    left, off = [], []
    for tokens in (30, 3000):
        gradients = torch.randn(2, tokens, 24) @ mixing_OO.mT
        halves = gradients.mT @ gradients
        found_OO = correlated_rows(halves)
        assert float(torch.linalg.eigvalsh(found_OO)[0]) > 0.0
        left.append(float((found_OO - truth_OO).norm()))
        off.append(float((correlations(halves.sum(dim=0)) - truth_OO).norm()))
    assert left[0] < off[0], "of little text less is kept"
    assert left[1] < left[0]
    for seed in range(20):  # two rows alone agree or not, and rows without gradients have nothing to say
        torch.manual_seed(seed)
        few = torch.randn(2, 5, 2)
        few_OO = torch.nn.functional.pad(few.mT @ few, (0, seed % 3, 0, seed % 3))
        assert float(torch.linalg.eigvalsh(correlated_rows(few_OO))[0]) > 0.05
    alone = torch.stack([torch.eye(3), torch.eye(3)])
    assert torch.equal(correlated_rows(alone), torch.eye(3))
    nothing = torch.zeros(2, 3, 3)
    assert torch.equal(correlated_rows(nothing), torch.eye(3)), "rows without gradients"


@pytest.mark.parametrize("outputs", [4, 40])  # the matrix is formed for many rows alone
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_factorisation_solves_as_an_eigendecomposition_does(outputs: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    root_DD = torch.randn(60, 60, dtype=torch.float64)
    matrix_DD, rows_OD = root_DD @ root_DD.mT, torch.randn(outputs, 60)
    factored = factored_inverse(matrix_DD.to(dtype), rows_OD, products=3)
    eigen = eigen_inverse(eigendecomposition(matrix_DD, torch.float32), rows_OD, products=3)
    for penalty in (0.3, 2.0):
        shifted_DD = matrix_DD + penalty * torch.eye(60)
        exact_OD = torch.linalg.solve(shifted_DD, rows_OD.double().mT).mT
        for found_OD in (factored(penalty)(rows_OD), eigen(penalty)(rows_OD)):
            assert found_OD.dtype == torch.float32
            assert_close_in_norm(found_OD, exact_OD, 4 * float(torch.linalg.cond(shifted_DD)))


def test_the_inverse_solves_its_equation() -> None:
    torch.manual_seed(0)
    rows_OO, inputs_DD = (a @ a.mT + torch.eye(len(a)) for a in (torch.randn(6, 6), torch.randn(9, 9)))
    right_OD = torch.randn(6, 9)
    inverse = coupled_inverse(eigendecomposition(rows_OO, torch.float32), eigendecomposition(inputs_DD, torch.float32))
    for penalty in (0.3, 2.0):
        found_OD = inverse(penalty)(right_OD)
        condition = float(torch.linalg.cond(rows_OO) * torch.linalg.cond(inputs_DD))
        assert_close_in_norm(rows_OO @ found_OD @ inputs_DD + penalty * found_OD, right_OD, condition)


def least_loss(
    keep_OD: torch.Tensor, weight_OD: torch.Tensor, rows_OO: torch.Tensor, hessian_DD: torch.Tensor
) -> float:
    """The least tr(C D H D^T) of any weights with this mask, by a dense solve of all rows together."""
    kept = keep_OD.flatten().nonzero()[:, 0]
    matrix = torch.kron(rows_OO, hessian_DD)
    change = -weight_OD.flatten().clone()
    rest = matrix[kept] @ change - matrix[kept][:, kept] @ change[kept]
    change[kept] = torch.linalg.solve(matrix[kept][:, kept], -rest)
    return float(change @ matrix @ change)


@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.5, "layer")])
def test_masks_that_use_them_lose_less(pattern: Pattern) -> None:
    gained = []
    for seed in range(6):
        task = layer_of(*make_layer(16, 24 + 4 * seed))
        torch.manual_seed(seed)
        mixing_OO = torch.randn(16, 6) @ torch.randn(6, 16) / 6 + 0.5 * torch.eye(16)
        rows_OO = correlations((mixing_OO @ mixing_OO.mT).double())
        coupled = replace(task, coupling_OO=rows_OO)
        plain, using = (
            least_loss(Optima().select(each, pattern).keep_OD, task.weight_OD, rows_OO, task.hessian.damped_DD)
            for each in (task, coupled)
        )
        gained.append(using / plain)
    assert sum(gained) / len(gained) < 0.9
