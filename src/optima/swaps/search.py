"""Swaps one by one: exchange one kept and one pruned weight of a row for as long as that lowers the row's optimum.

What a swap gains is that of the *re-optimised* weights (``optima.swaps.pivots``); SparseSwaps (arXiv 2512.10922)
freezes them. With v a row's optimum on its mask, r the negative gradient there and K = H^-1, a swap of i for
j lowers the error only if

    |v_i| < |r_j| sqrt(K_jj) (sqrt(K_ii) + sqrt(K_ii - 1 / H_ii)),                           (docs/mathematics.md)

so that candidates are ranked by the two sides, and a set that holds every weight which passes the test for some partner
proves that no swap is left: the row is at a one-swap optimum.

Shapes: O outputs, R rows of a chunk, A rows still active, D inputs, N most weights kept by a row, B candidates,
G groups of an N:M pattern.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from optima.linalg.gather import gather_systems, selected
from optima.linalg.hessian import Hessian
from optima.linalg.products import keep_freed_memory
from optima.linalg.scaling import unit_diagonal
from optima.patterns import NM, Pattern, group_width
from optima.swaps.exchange import exchange
from optima.swaps.pivots import Tableau

# Growth of the number of candidates once those tried leave no swap and prove nothing.
WIDEN = 4
# Numbers in the kept-set matrices of one chunk of rows, and in the tableaus of those that are examined together.
CHUNK_ENTRIES = 2**25
LARGEST_CHUNK = 512
# Most kept weights of a chunk's rows, relative to the fewest: rows are padded to the former.
PADDING = 1.25
TABLEAU_ENTRIES = 2**23


class Swapped(NamedTuple):
    """The outcome, row by row.

    Attributes:
        keep_OD: the mask, with the same number of kept weights in every row (in every N:M group).
        weight_OD: the optimal weights on it, in the dtype of the dense weights.
        error_O: 1/2 (v - w)^T H (v - w) on it, float64; never above that of the mask that was given.
        swaps_O: swaps made, int64.
        optimal_O: True where all single swaps were looked at, and none lowers the error by more than ``LEAST_GAIN`` of
            it, as far as the working precision tells (float32 up to a condition of 1e8).
    """

    keep_OD: Tensor
    weight_OD: Tensor
    error_O: Tensor
    swaps_O: Tensor
    optimal_O: Tensor


@dataclass(frozen=True)
class SwapSearch:
    """Swaps in bulk first (``optima.swaps.exchange``), then one by one at their exact gains.

    The latter go in rounds: candidates, swaps among them from the best down, new optimum, new candidates.

    Args:
        rounds: most rounds at exact gains; 0 leaves the mask as it is. Rows that are not done then are not proven
            optimal.
        candidates: weights of a row considered in the first round. Where they leave no swap but do not prove that there
            is none, the next round takes four times as many.
        most_candidates: no round takes more; None for all inputs, with which every row can be proven.
    """

    rounds: int = 8
    candidates: int = 64
    most_candidates: int | None = None

    def search(self, hessian: Hessian, weight_OD: Tensor, keep_OD: Tensor, pattern: Pattern) -> Swapped:
        """Improve the mask ``keep_OD`` of the dense weights ``weight_OD``; exact counts stay as they are."""
        keep_freed_memory()
        if not keep_OD.numel():
            nothing_O = keep_OD.sum(dim=1)
            return Swapped(keep_OD, weight_OD, nothing_O.double(), nothing_O, nothing_O == 0)
        weight_OD = weight_OD.masked_fill(hessian.dead_D, 0.0)
        swaps_O = keep_OD.new_zeros(len(keep_OD), dtype=torch.int64)
        if self.rounds:
            keep_OD, swaps_O = exchange(hessian, weight_OD, keep_OD, pattern)
        dtype = torch.float64 if weight_OD.dtype == torch.float64 else hessian.working_dtype
        # Linears of one hessian may have sparsities of their own, which make no difference to it.
        groups = group_width(pattern, hessian.num_inputs), isinstance(pattern, NM)
        system = hessian.memo((System, dtype, groups), lambda: System(hessian, dtype, pattern))
        count_O, order_O = keep_OD.sum(dim=1).sort(stable=True)
        chunks = order_O.split(chunk_sizes(count_O.tolist()))
        parts = [_Rows(self, system, weight_OD[rows], keep_OD[rows]).run() for rows in chunks]
        back_O = order_O.argsort()
        swapped = Swapped(*(torch.cat(values)[back_O] for values in zip(*parts, strict=True)))
        return swapped._replace(swaps_O=swapped.swaps_O + swaps_O)


def chunk_sizes(counts: Sequence[int]) -> list[int]:
    """Rows of each chunk, their counts of kept weights ascending: few enough to fit, alike enough to be padded."""
    sizes: list[int] = []
    smallest = 0
    for count in counts:
        alike = count <= max(PADDING * smallest, smallest + 8)
        if sizes and alike and sizes[-1] < min(LARGEST_CHUNK, CHUNK_ENTRIES // max(count, 1) ** 2):
            sizes[-1] += 1
        else:
            sizes.append(1)
            smallest = count
    return sizes


class System:
    """H in units of a unit diagonal, what bounds the effect of a swap, and which inputs may exchange their weights.

    Attributes:
        num_inputs: D.
        norm_D: an input's unit, float64.
        unit_DD: H in those units, float64.
        bordered: the same in the working precision, with one more input that stands for "none".
        reach_D: sqrt(K_ii) + sqrt(K_ii - 1 / H_ii).
        gain_D: sqrt(K_jj).
        group_D: swaps stay within a group of inputs, so that the pattern's counts stay exact.
        width: inputs in a group if groups are small enough to be tried whole, else None.
    """

    def __init__(self, hessian: Hessian, dtype: torch.dtype, pattern: Pattern) -> None:
        size = hessian.num_inputs
        self.unit_DD, self.norm_D = unit_diagonal(hessian.damped_DD, hessian.dead_D)
        self.bordered = torch.zeros(size + 1, size + 1, dtype=dtype, device=hessian.device)
        self.bordered[:size, :size] = self.unit_DD
        spread_D = (hessian.inverse_diagonal_D * self.norm_D.square()).clamp_min(1.0)
        self.reach_D = spread_D.sqrt() + (spread_D - 1.0).sqrt()
        self.gain_D = spread_D.sqrt()
        self.width = pattern.m if isinstance(pattern, NM) else None
        self.num_inputs = size
        self.group_D = torch.arange(size + 1, device=hessian.device) // group_width(pattern, size)


class _Rows:
    """One chunk of rows: the best mask of each so far, and what has been proven of it."""

    def __init__(self, options: SwapSearch, system: System, dense_RD: Tensor, keep_RD: Tensor) -> None:
        self.options, self.system, self.dtype = options, system, dense_RD.dtype
        self.dense_RD = dense_RD.double() * system.norm_D
        self.keep_RD = keep_RD.clone()
        self.weight_RD = torch.zeros_like(self.dense_RD)
        self.error_R = torch.full_like(self.dense_RD[:, 0], torch.inf)
        self.swaps_R = torch.zeros_like(self.error_R, dtype=torch.int64)
        self.optimal_R = torch.zeros_like(self.error_R, dtype=torch.bool)
        self.rounds = options.rounds

    def run(self) -> Swapped:
        """Few candidates first; rows that they leave open go on with more."""
        rows = torch.arange(len(self.keep_RD), device=self.keep_RD.device)
        most = min(self.options.most_candidates or self.system.num_inputs, self.system.num_inputs)
        candidates = min(self.options.candidates, most)
        while len(rows):
            rows = self._swap_among(rows, candidates)
            if candidates == most or not self.rounds:
                break
            candidates = min(candidates * WIDEN, most)
        weight_RD = (self.weight_RD / self.system.norm_D).to(self.dtype)
        return Swapped(self.keep_RD, weight_RD, self.error_R, self.swaps_R, self.optimal_R)

    def _swap_among(self, rows: Tensor, candidates: int) -> Tensor:
        """Swap in ``rows`` until none moves; returns those without a swap and without a proof that there is none."""
        keep_AD, swaps_A, unproven = self.keep_RD[rows], torch.zeros_like(rows), [rows[:0]]
        while len(rows):
            optimum = solve(self.system, self.dense_RD[rows], keep_AD)
            # Where rounding has made a loss of a swap, the row stays as it was.
            same_A = (keep_AD == self.keep_RD[rows]).all(dim=1)
            taken_A = same_A | (optimum.error_A < self.error_R[rows])
            rows, swaps_A = rows[taken_A], swaps_A[taken_A]
            if len(rows) < len(taken_A):
                optimum = Optimum(*(entry[taken_A] for entry in optimum))
            self.keep_RD[rows], self.weight_RD[rows] = optimum.keep_AD, optimum.weight_AD
            self.error_R[rows] = optimum.error_A
            self.swaps_R[rows] += swaps_A
            if not (self.rounds and len(rows)):
                break
            self.rounds -= 1
            keep_AD, swaps_A, complete_A = swap(self.system, optimum, candidates)
            del optimum  # the next one needs its memory
            moved_A = swaps_A > 0
            self.optimal_R[rows] = complete_A & ~moved_A
            unproven.append(rows[~complete_A & ~moved_A])
            rows, keep_AD, swaps_A = rows[moved_A], keep_AD[moved_A], swaps_A[moved_A]
        return torch.cat(unproven)


class Optimum(NamedTuple):
    """The optimal weights of rows on their masks, in units of a unit diagonal.

    Attributes:
        keep_AD: the masks.
        index_AN: kept inputs of each row, ascending, then D for "none".
        factor_ANN: lower Cholesky factor of H on them, the identity where there is none.
        weight_AD: the optimum, float64.
        residual_AD: negative gradient there, float64: zero on the kept set.
        error_A: 1/2 (v - w)^T H (v - w), float64.
    """

    keep_AD: Tensor
    index_AN: Tensor
    factor_ANN: Tensor
    weight_AD: Tensor
    residual_AD: Tensor
    error_A: Tensor


def solve(system: System, dense_AD: Tensor, keep_AD: Tensor) -> Optimum:
    """By Cholesky of every row's own matrix, restarted once from float64 residuals."""
    index_AN, real_AN = selected(keep_AD, int(keep_AD.sum(dim=1).max()))
    index_AN = index_AN.masked_fill(~real_AN, system.num_inputs)
    matrix_ANN = gather_systems(system.bordered, index_AN, real_AN)
    factor_ANN, info_A = torch.linalg.cholesky_ex(matrix_ANN)
    if bool(info_A.any()):
        factor_ANN = torch.linalg.cholesky(matrix_ANN.double()).to(matrix_ANN.dtype)
    weight_AD = torch.zeros_like(dense_AD)
    residual_AD = dense_AD @ system.unit_DD
    for _ in range(2):
        padded_AD = torch.nn.functional.pad(residual_AD, (0, 1))
        kept_AN1 = padded_AD.gather(1, index_AN)[:, :, None].to(matrix_ANN.dtype)
        half_AN1 = torch.linalg.solve_triangular(factor_ANN, kept_AN1, upper=False)
        step_AN = torch.linalg.solve_triangular(factor_ANN.mT, half_AN1, upper=True)[:, :, 0].double()
        padded_AD.zero_().scatter_(1, index_AN, step_AN * real_AN)
        weight_AD = weight_AD + padded_AD[:, :-1]
        residual_AD = (dense_AD - weight_AD) @ system.unit_DD
    error_A = 0.5 * torch.linalg.vecdot(dense_AD - weight_AD, residual_AD).clamp_min(0.0)
    return Optimum(keep_AD, index_AN, factor_ANN, weight_AD, residual_AD, error_A)


def swap(system: System, optimum: Optimum, candidates: int) -> tuple[Tensor, Tensor, Tensor]:
    """The best swaps among ``candidates`` weights of each row, one after the other.

    Returns:
        The new masks (A, D); the number of swaps in each row; True where the candidates include every weight that
        could take part in a swap which lowers the error.
    """
    chosen_AB, complete_A = _choose(system, optimum, candidates)
    tried, kept = chosen_AB.shape[1], optimum.index_AN.shape[1]
    rows = max(TABLEAU_ENTRIES // max(tried * max(tried, kept), 1), 1)
    swaps_parts, kept_parts = [], []
    for *entries, part_AB in zip(*(entry.split(rows) for entry in (*optimum, chosen_AB)), strict=True):
        part = Optimum(*entries)
        tableau = tableau_of(system, part, part_AB)
        swaps_parts.append(tableau.improve(part.error_A))
        kept_parts.append(tableau.kept_AB)
    keep_AD = torch.nn.functional.pad(optimum.keep_AD, (0, 1)).scatter(1, chosen_AB, torch.cat(kept_parts))[:, :-1]
    return keep_AD, torch.cat(swaps_parts), complete_A


def _choose(system: System, optimum: Optimum, candidates: int) -> tuple[Tensor, Tensor]:
    """The inputs most likely to swap, by the two sides of the necessary condition, and whether they are all."""
    keep_AD = optimum.keep_AD
    cost_AD = (optimum.weight_AD.abs() / system.reach_D).masked_fill(~keep_AD, torch.inf)
    gain_AD = (optimum.residual_AD.abs() * system.gain_D).masked_fill(keep_AD, -torch.inf)
    if system.width is not None:
        width = system.width
        cost_AG, gain_AG = cost_AD.unflatten(1, (-1, width)).amin(2), gain_AD.unflatten(1, (-1, width)).amax(2)
        chosen = (gain_AG - cost_AG).topk(min(max(candidates // width, 1), cost_AG.shape[1]), dim=1)
        chosen_AB = (chosen.indices[:, :, None] * width + torch.arange(width, device=keep_AD.device)).flatten(1)
        return chosen_AB, (gain_AG > cost_AG).sum(dim=1) <= chosen.indices.shape[1]
    size = keep_AD.shape[1]
    half = min(-(-candidates // 2), size) if candidates < size else size
    count_A = keep_AD.sum(dim=1)
    cheap = cost_AD.topk(min(half, int(count_A.max())), dim=1, largest=False)
    strong = gain_AD.topk(min(half, size - int(count_A.min())), dim=1)
    possible_A = (cost_AD < gain_AD.amax(dim=1, keepdim=True)).sum(dim=1) <= half
    possible_A &= (gain_AD > cost_AD.amin(dim=1, keepdim=True)).sum(dim=1) <= half
    chosen_AB = torch.cat([part.indices.masked_fill(~part.values.isfinite(), size) for part in (cheap, strong)], dim=1)
    return chosen_AB, possible_A


def tableau_of(system: System, optimum: Optimum, chosen_AB: Tensor) -> Tableau:
    """The tableau of the chosen inputs at the optimum of the rows."""
    pad = torch.nn.functional.pad
    index_AN = optimum.index_AN
    kept_AB = pad(optimum.keep_AD, (0, 1)).gather(1, chosen_AB)
    none_AB = chosen_AB == system.num_inputs
    unit_ANB = (index_AN[:, :, None] == chosen_AB[:, None, :]).to(system.bordered.dtype)
    column_ANB = torch.where(
        kept_AB[:, None, :], unit_ANB, system.bordered[index_AN[:, :, None], chosen_AB[:, None, :]]
    )
    solved_ANB = torch.linalg.solve_triangular(optimum.factor_ANN, column_ANB, upper=False)
    matrix_ABB = solved_ANB.mT @ solved_ANB
    pruned_ABB = ~kept_AB[:, :, None] & ~kept_AB[:, None, :]
    own_ABB = system.bordered[chosen_AB[:, :, None], chosen_AB[:, None, :]]
    matrix_ABB = torch.where(pruned_ABB, own_ABB - matrix_ABB, matrix_ABB)
    diagonal_AB = matrix_ABB.diagonal(dim1=1, dim2=2)
    diagonal_AB.clamp_min_(torch.finfo(matrix_ABB.dtype).eps).masked_fill_(none_AB, 1.0)
    value_AD = torch.where(optimum.keep_AD, optimum.weight_AD, optimum.residual_AD)
    value_AB = pad(value_AD, (0, 1)).gather(1, chosen_AB).to(matrix_ABB.dtype)
    return Tableau(matrix_ABB, value_AB, kept_AB, system.group_D[chosen_AB].masked_fill(none_AB, -1))
