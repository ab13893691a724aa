"""Exact gains of all swaps among a row's candidates, and the row's state after a swap, by principal pivoting.

For a row with kept set S, optimum v and negative gradient r, let a_i = (H_SS^-1)_ii, c_ij = (H_SS^-1 H_Sj)_i, and d_j
the variance of input j that S leaves unexplained. Removing i and adding j changes twice the optimal error by exactly

    v_i^2 / a_i - (r_j + v_i c_ij / a_i)^2 / (d_j + c_ij^2 / a_i).                           (docs/mathematics.md)

These numbers are one small matrix a row, the principal pivot transform of H on S, restricted to the candidates; a swap
is two pivots of it (Tsatsomeros, Principal pivot transforms, 2000).

Shapes: A rows, B candidates.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# A swap counts as one if it lowers the row's error by more than this fraction; below, rounding decides.
LEAST_GAIN = {torch.float32: 1e-5, torch.float64: 1e-9}


class Tableau(NamedTuple):
    """Principal pivot transform of H on a row's kept set, restricted to candidates.

    Attributes:
        matrix_ABB: (H_SS^-1) between kept candidates, H_SS^-1 H_SP between kept and pruned ones, and the Schur
            complement H_PP - H_PS H_SS^-1 H_SP between pruned ones.
        value_AB: the weight of a kept candidate, the negative gradient of a pruned one.
        kept_AB: True for candidates that are kept.
        group_AB: group of each candidate; -1 for "none".
    """

    matrix_ABB: Tensor
    value_AB: Tensor
    kept_AB: Tensor
    group_AB: Tensor

    def improve(self, error_A: Tensor) -> Tensor:
        """Make the best swap of every row until none lowers its error by ``LEAST_GAIN``; returns the swaps made."""
        least_A = 2.0 * LEAST_GAIN[self.matrix_ABB.dtype] * error_A
        swaps_A = torch.zeros_like(error_A, dtype=torch.int64)
        part, rows = self, torch.arange(len(error_A), device=error_A.device)
        for _ in range(self.kept_AB.shape[1]):
            change_A, out_A, in_A = part.best_swap()
            going_A = change_A.double() < -least_A[rows]
            part = Tableau(*(entry[going_A] for entry in part))
            rows = rows[going_A]
            if not len(rows):
                break
            part.pivot(out_A[going_A])
            part.pivot(in_A[going_A])
            swaps_A[rows] += 1
            self.kept_AB[rows] = part.kept_AB
        return swaps_A

    def best_swap(self) -> tuple[Tensor, Tensor, Tensor]:
        """Change of twice the error, and the candidates that leave and enter, for each row's best swap."""
        own_AB = self.matrix_ABB.diagonal(dim1=1, dim2=2)
        share_AB = self.value_AB / own_AB
        gain_ABB = (self.value_AB[:, None, :] + share_AB[:, :, None] * self.matrix_ABB).square_()
        gain_ABB /= self.matrix_ABB.square().div_(own_AB[:, :, None]).add_(own_AB[:, None, :])
        change_ABB = (share_AB * self.value_AB)[:, :, None] - gain_ABB
        allowed_ABB = self.kept_AB[:, :, None] & ~self.kept_AB[:, None, :]
        allowed_ABB &= (self.group_AB[:, :, None] == self.group_AB[:, None, :]) & (self.group_AB >= 0)[:, None, :]
        best = change_ABB.masked_fill_(~allowed_ABB, torch.inf).flatten(1).min(dim=1)
        size = own_AB.shape[1]
        return best.values, best.indices // size, best.indices % size

    def pivot(self, chosen_A: Tensor) -> None:
        """Remove the chosen candidate of each row if it is kept, add it if it is pruned."""
        rows = torch.arange(len(chosen_A), device=chosen_A.device)
        column_AB, value_A = self.matrix_ABB[rows, :, chosen_A], self.value_AB[rows, chosen_A]
        pivot_A, was_kept_A1 = column_AB[rows, chosen_A], self.kept_AB[rows, chosen_A][:, None]
        other_AB = torch.where(self.kept_AB == was_kept_A1, 0.0, column_AB)
        scaled_AB2 = torch.stack([-column_AB, 2.0 * other_AB], dim=2) / pivot_A[:, None, None]
        self.matrix_ABB.baddbmm_(scaled_AB2, torch.stack([column_AB, other_AB], dim=1))
        gains_AB = torch.where(was_kept_A1 & ~self.kept_AB, column_AB, -column_AB)
        self.value_AB.addcmul_(gains_AB, (value_A / pivot_A)[:, None])
        self.value_AB[rows, chosen_A] = value_A / pivot_A
        new_AB = torch.where(self.kept_AB, -column_AB, column_AB) / pivot_A[:, None]
        self.matrix_ABB[rows, :, chosen_A] = new_AB
        self.matrix_ABB[rows, chosen_A, :] = new_AB
        self.matrix_ABB[rows, chosen_A, chosen_A] = 1.0 / pivot_A
        self.kept_AB[rows, chosen_A] = ~was_kept_A1[:, 0]
