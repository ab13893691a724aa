"""ADMM, ALPS, Thanos and Optima against a few lines of float64 written from their papers.

The references work with columns (D x O), explicit inverses and one row at a time: they share no code with the package.
"""

from __future__ import annotations

import weakref
from dataclasses import replace

import pytest
import torch
from closeness import assert_close_in_norm, assert_masks_alike
from layers import DAMPING, PATTERNS, hessian_of, layer_of, lowest, make_layer, plain_keep, row_counts, steps
from torch import Tensor

from optima.core import BatchedCholesky, Hessian, solve
from optima.patterns import NM, Pattern, Unstructured
from optima.selectors.admm import ADMM
from optima.selectors.alps import ALPS
from optima.selectors.base import LinearTask
from optima.selectors.optima import Optima, rough_mask
from optima.selectors.thanos import Thanos

DEAD = (0, 7, 8, 47)
# Iterations in float64 magnify rounding to a few 1e-9: eps times this is 2e-7.
ITERATED = 2.0**30


def unit_problem(weight_OD: Tensor, inputs_TD: Tensor, damping: float) -> tuple[Tensor, Tensor, Tensor]:
    """(X^T X / T + damping, scaled to a unit diagonal; W^T in those units; the norms)."""
    dead = inputs_TD.abs().sum(0) == 0
    hessian_DD = inputs_TD.T @ inputs_TD / len(inputs_TD)
    mean = hessian_DD.diagonal()[~dead].mean()
    hessian_DD = hessian_DD + damping * mean * torch.eye(len(dead))
    hessian_DD[dead, dead] = 1
    norm_D = hessian_DD.diagonal().sqrt()
    weight_DO = (weight_OD * ~dead * norm_D).T
    return hessian_DD / norm_D[:, None] / norm_D[None, :], weight_DO, norm_D


def plain_admm(weight_OD: Tensor, inputs_TD: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    hessian_DD, dense_DO, norm_D = unit_problem(weight_OD, inputs_TD, damping=0)
    eye_DD = torch.eye(len(hessian_DD), dtype=torch.float64)
    hessian_DD = hessian_DD + 0.1 * eye_DD
    weight_DO, dual_DO = dense_DO, torch.zeros_like(dense_DO)
    for step in range(1, 21):
        score_OD = (weight_DO + dual_DO).T.abs()
        share = pattern.sparsity * (1 - (1 - step / 15) ** 3)
        if step == 15:
            keep_OD = plain_keep(score_OD, pattern)
        elif step < 15 and isinstance(pattern, NM):
            score_OD[plain_keep(score_OD, pattern)] = torch.inf
            keep_OD = plain_keep(score_OD, Unstructured(share, "layer"))
        elif step < 15:
            keep_OD = plain_keep(score_OD, replace(pattern, sparsity=share))
        kept_DO = (weight_DO + dual_DO) * keep_OD.T
        dual_DO = dual_DO + weight_DO - kept_DO
        weight_DO = torch.linalg.solve(hessian_DD + eye_DD, hessian_DD @ dense_DO + kept_DO - dual_DO)
    return keep_OD, ((weight_DO + dual_DO) * keep_OD.T).T / norm_D


def plain_alps(weight_OD: Tensor, inputs_TD: Tensor, pattern: Pattern, settled: float = 3e-4) -> tuple[Tensor, Tensor]:
    hessian_DD, dense_DO, norm_D = unit_problem(weight_OD, inputs_TD, DAMPING)

    def project(matrix_DO: Tensor) -> Tensor:
        return matrix_DO * plain_keep(matrix_DO.T.abs(), pattern).T

    rho, grown = 0.1, False
    sparse_DO = project(dense_DO)
    dual_DO = torch.zeros_like(dense_DO)
    before_DO = sparse_DO != 0
    for iteration in range(1, 301):
        shifted_DD = hessian_DD + rho * torch.eye(len(hessian_DD), dtype=torch.float64)
        fit_DO = torch.linalg.solve(shifted_DD, hessian_DD @ dense_DO - dual_DO + rho * sparse_DO)
        sparse_DO = project(fit_DO + dual_DO / rho)
        dual_DO = dual_DO + rho * (fit_DO - sparse_DO)
        if iteration % 3:
            continue
        now_DO = sparse_DO != 0
        changed = float((now_DO != before_DO).sum())
        share = changed / ((1 - pattern.sparsity) * dense_DO.numel())
        before_DO = now_DO
        if share > 0.005 or (changed and grown):
            rho, grown = rho * (1.3 if share > 0.1 else 1.2 if share > 0.005 else 1.1), True
        elif changed:
            rho, sparse_DO, dual_DO = rho / 5, project(dense_DO), torch.zeros_like(dense_DO)
        elif grown:
            break
        else:
            rho = rho / 5
        if iteration > 30 and share < settled:
            break
    fit_DO = project(fit_DO)
    support_DO = fit_DO != 0
    for row in range(dense_DO.shape[1]):  # ten steps of textbook conjugate gradient
        (index,) = support_DO[:, row].nonzero(as_tuple=True)
        matrix, solution = hessian_DD[index][:, index], fit_DO[index, row]
        residual = (hessian_DD @ dense_DO[:, row])[index] - matrix @ solution
        direction = residual
        for _ in range(10):
            step = residual @ residual / (direction @ matrix @ direction)
            solution, old = solution + step * direction, residual
            residual = residual - step * (matrix @ direction)
            direction = residual + (residual @ residual) / (old @ old) * direction
        fit_DO[index, row] = solution
    return support_DO.T, fit_DO.T / norm_D


def plain_thanos(weight_OD: Tensor, inputs_TD: Tensor, pattern: Pattern, blocksize: int) -> tuple[Tensor, Tensor]:
    """Each row on its own; H of the columns from j on is inverted anew at every block."""
    dead = inputs_TD.abs().sum(0) == 0
    hessian_DD = hessian_of(inputs_TD).damped(DAMPING)
    weight_OD = weight_OD * ~dead
    outputs, inputs = weight_OD.shape
    pruned_OD = torch.zeros_like(weight_OD, dtype=torch.bool)
    if isinstance(pattern, Unstructured) and pattern.scope == "group":
        blocksize = pattern.group_size
    for j in range(0, inputs, blocksize):
        end = min(j + blocksize, inputs)
        score_OD = weight_OD[:, j:].abs() * inputs_TD[:, j:].norm(dim=0)
        if isinstance(pattern, NM):
            mask_OD = ~plain_keep(score_OD[:, : end - j], pattern)
        elif pattern.scope == "layer":
            left = round(pattern.sparsity * outputs * inputs) - int(pruned_OD.sum())
            mask_OD = lowest(score_OD.reshape(1, -1), left).reshape(score_OD.shape)
        elif pattern.scope == "row":
            counts = row_counts(pattern, outputs, inputs)
            left_O = [count - int(row.sum()) for count, row in zip(counts, pruned_OD, strict=True)]
            mask_OD = lowest(score_OD, left_O)
        else:
            (count,) = steps(pattern.sparsity, [outputs * j, outputs * end])
            mask_OD = lowest(score_OD[:, : end - j].reshape(1, -1), count).reshape(outputs, -1)
        pruned_OD[:, j:end] = mask_OD[:, : end - j]
        inverse_DD = torch.linalg.inv(hessian_DD[j:, j:])
        for row in range(outputs):
            (index,) = pruned_OD[row, j:end].nonzero(as_tuple=True)
            multiplier = torch.linalg.solve(inverse_DD[index][:, index], weight_OD[row, j + index])
            weight_OD[row, j:] -= multiplier @ inverse_DD[index]
            weight_OD[row, j + index] = 0
    return ~pruned_OD, weight_OD


def plain_optima(weight_OD: Tensor, inputs_TD: Tensor, pattern: Pattern) -> Tensor:
    """Cost of a removal between w^2 H_ii and w^2 / K_ii; thresholds of unstructured masks live for six iterations."""
    damped_DD = hessian_of(inputs_TD).damped(DAMPING)
    dead = inputs_TD.abs().sum(0) == 0
    unit_D = damped_DD.diagonal() ** 0.125 / torch.linalg.inv(damped_DD).diagonal() ** 0.375
    hessian_DD = damped_DD / unit_D[:, None] / unit_D[None, :]
    dense_DO = (weight_OD * ~dead * unit_D).T
    eye_DD = torch.eye(len(unit_D), dtype=torch.float64)
    held = isinstance(pattern, Unstructured) and pattern.scope != "group"
    stages = 6 if isinstance(pattern, NM) else 8
    sparse_DO = dense_DO * plain_keep(dense_DO.T.abs(), pattern).T
    multiplier_DO = torch.zeros_like(dense_DO)
    for iteration in range(3 * stages):
        rho = 0.3 * (2.0 / 0.3) ** (iteration // 3 / (stages - 1))
        right_DO = hessian_DD @ dense_DO + rho * sparse_DO - multiplier_DO
        sum_DO = torch.linalg.solve(hessian_DD + rho * eye_DD, right_DO) + multiplier_DO / rho
        score_OD = sum_DO.T.abs()
        if held and iteration % 6 == 0:
            rows = score_OD if pattern.scope == "row" else score_OD.reshape(1, -1)
            threshold = rows.sort(dim=1).values[:, round(pattern.sparsity * rows.shape[1]) - 1, None]
        keep_OD = score_OD > threshold if held else plain_keep(score_OD, pattern)
        sparse_DO = sum_DO * keep_OD.T
        multiplier_DO = rho * (sum_DO - sparse_DO)
    return plain_keep(score_OD, pattern)


def plain_coupled(weight_OD: Tensor, inputs_TD: Tensor, rows_OO: Tensor) -> Tensor:
    """The same at 2:4 where rows go together: one system of all weights, C x H."""
    damped_DD, keeps = hessian_of(inputs_TD).damped(DAMPING), NM(2, 4)
    unit_D = damped_DD.diagonal() ** 0.125 / torch.linalg.inv(damped_DD).diagonal() ** 0.375
    unit_O1 = torch.linalg.inv(rows_OO).diagonal()[:, None] ** -0.375
    matrix = torch.kron(rows_OO / unit_O1 / unit_O1.T, damped_DD / unit_D[:, None] / unit_D)
    dense_OD = weight_OD * unit_D * unit_O1
    sparse_OD = dense_OD * plain_keep(dense_OD.abs(), keeps)
    multiplier_OD = torch.zeros_like(dense_OD)
    for iteration in range(18):
        rho = 0.3 * (2.0 / 0.3) ** (iteration // 3 / 5)
        right = matrix @ dense_OD.flatten() + (rho * sparse_OD - multiplier_OD).flatten()
        solved = torch.linalg.solve(matrix + rho * torch.eye(len(matrix), dtype=torch.float64), right)
        sum_OD = solved.view_as(dense_OD) + multiplier_OD / rho
        sparse_OD = sum_OD * plain_keep(sum_OD.abs(), keeps)
        multiplier_OD = rho * (sum_OD - sparse_OD)
    return plain_keep(sum_OD.abs(), keeps)


def test_optima_with_coupled_rows() -> None:
    weight_OD, inputs_TD = make_layer(8, 24)
    mixing_OO = torch.eye(8, dtype=torch.float64) + 0.4 * torch.randn(8, 8, generator=torch.Generator().manual_seed(1))
    product_OO = mixing_OO @ mixing_OO.mT
    rows_OO = product_OO / product_OO.diagonal().sqrt() / product_OO.diagonal().sqrt()[:, None]
    task = replace(layer_of(weight_OD, inputs_TD), coupling_OO=rows_OO)
    keep_OD = Optima().select(task, NM(2, 4)).keep_OD
    assert torch.equal(keep_OD, plain_coupled(weight_OD, inputs_TD, rows_OO))
    assert not torch.equal(keep_OD, plain_optima(weight_OD, inputs_TD, NM(2, 4)))


@pytest.mark.parametrize("dead", [(), DEAD], ids=["live", "dead"])
@pytest.mark.parametrize("rows", [12, 20])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_against_the_papers(pattern: Pattern, rows: int, dead: tuple[int, ...]) -> None:
    """Few rows, and enough to form the shifted inverse."""
    weight_OD, inputs_TD = make_layer(rows, dead=dead)
    task = layer_of(weight_OD, inputs_TD)
    assert torch.equal(Optima().select(task, pattern).keep_OD, plain_optima(weight_OD, inputs_TD, pattern))
    for selector, plain in ((ADMM(), plain_admm), (ALPS(), plain_alps)):
        found, (keep_OD, expected_OD) = selector.select(task, pattern), plain(weight_OD, inputs_TD, pattern)
        assert torch.equal(found.keep_OD, keep_OD)
        assert_close_in_norm(found.weight_OD, expected_OD, ITERATED)


@pytest.mark.parametrize(("noise", "damping"), [(1e-2, 1e-2), (1e-2, 1e-4), (1e-3, 1e-6), (1e-4, 0.0)], ids=str)
def test_optima_in_float32_where_inputs_are_collinear(noise: float, damping: float) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs_TD = torch.randn(600, 1, generator=generator) * torch.randn(1, 128, generator=generator)
    inputs_TD = (inputs_TD + noise * torch.randn(600, 128, generator=generator)).double()
    weight_OD = torch.randn(32, 128, generator=generator)
    hessian = hessian_of(inputs_TD, damping)
    errors = []
    for dtype in (torch.float32, torch.float64):
        task = LinearTask("linear", weight_OD.to(dtype), hessian)
        keep_OD = Optima().select(task, Unstructured(0.5)).keep_OD
        errors.append(float(solve(hessian, weight_OD.double(), keep_OD, solver=BatchedCholesky()).error_R.sum()))
    # Iterations in float32 lose some of it where float64 is needed to see anything; a wrong spectrum loses all.
    assert errors[0] <= 20 * errors[1]
    if damping >= 1e-4:
        assert errors[0] == pytest.approx(errors[1], rel=0.02)


@pytest.mark.parametrize("factor", [1e-35, 1e35])
def test_optima_at_any_scale_of_the_activations(factor: float) -> None:
    weight_OD, inputs_TD = make_layer(dtype=torch.float32)
    keep_OD = Optima().select(layer_of(weight_OD, inputs_TD), NM(2, 4)).keep_OD
    scaled = Hessian(hessian_of(inputs_TD).matrix_DD * factor, DAMPING)
    assert_masks_alike(Optima().select(layer_of(weight_OD, scaled), NM(2, 4)).keep_OD, keep_OD)


@pytest.mark.parametrize("shape", [(1536, 576), (576, 1536), (192, 576), (256, 640), (640, 2048)])
def test_the_sample_for_a_rough_threshold_visits_all_columns(shape: tuple[int, int]) -> None:
    """With columns of very different scores a threshold from some of them would be far off."""
    generator = torch.Generator().manual_seed(0)
    score_OD = torch.rand(shape, generator=generator) * torch.exp(2.0 * torch.randn(shape[1], generator=generator))
    keep_OD, _ = rough_mask(score_OD, Unstructured(0.5, "layer"), None)
    assert float(keep_OD.double().mean()) == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("blocksize", [48, 16, 12, 20])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_thanos(pattern: Pattern, blocksize: int) -> None:
    weight_OD, inputs_TD = make_layer(dead=(3, 40))
    before = weight_OD.clone()
    selection = Thanos(blocksize, blocksize).select(layer_of(weight_OD, inputs_TD), pattern)
    width = blocksize // pattern.m * pattern.m if isinstance(pattern, NM) else blocksize
    keep_OD, expected_OD = plain_thanos(weight_OD, inputs_TD, pattern, width)
    assert torch.equal(selection.keep_OD, keep_OD)
    assert_close_in_norm(selection.weight_OD, expected_OD, 2.0**13)
    assert torch.equal(weight_OD, before), "the dense weight is the caller's"


@pytest.mark.parametrize("selector", [ADMM(), ALPS(), Optima()], ids=lambda selector: type(selector).__name__)
def test_shared_preparation_is_dropped_with_its_hessian(selector: ADMM | ALPS | Optima) -> None:
    weight_OD, inputs_TD = make_layer()
    task = layer_of(weight_OD, inputs_TD)
    first = selector.select(task, NM(2, 4))
    assert torch.equal(selector.select(task, NM(2, 4)).keep_OD, first.keep_OD)
    hessian = weakref.ref(task.hessian)
    del task
    assert hessian() is None, "nothing that it holds refers to it"


def test_alps_ends_where_few_weights_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """One in fifty of a small layer stands for 0.03% of a large one."""
    weight_OD, inputs_TD = make_layer()
    early_OD, late_OD = (plain_alps(weight_OD, inputs_TD, NM(2, 4), settled)[1] for settled in (0.02, 3e-4))
    assert not torch.allclose(early_OD, late_OD, rtol=1e-6, atol=1e-6)
    monkeypatch.setattr("optima.selectors.alps.SETTLED", 0.02)
    selection = ALPS().select(layer_of(weight_OD, inputs_TD), NM(2, 4))
    assert_close_in_norm(selection.weight_OD, early_OD, ITERATED)
