"""The sum X^T S X of linears that share their input, over batches and over ranks.

Shapes: T tokens, D inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from optima.core.hessian import Hessian
from optima.core.problem import chunk_rows
from optima.core.products import ROUND_ROWS, add_gram, mirror
from optima.core.statistics import Statistics
from optima.device import bfloat16_products
from optima.distributed import Ranks
from optima.models.blocks import Linear

# A linear's products of O x D x D, for select, solve and rounding; its Hessian costs a few of D^3.
PRODUCTS = 10


class Accumulator:
    """X^T S X over the tokens seen so far, S their weights: float32 products of each batch, summed in float64.

    Where X is of bfloat16, so is S^1/2 X.
    """

    def __init__(self) -> None:
        self.sum_DD: Tensor | None = None
        self.tokens = 0
        self._weight: float | Tensor = 0.0  # tr S; a tensor stays on the device, and is not waited for

    def add(self, inputs_TD: Tensor, weight_T: Tensor | None = None) -> None:
        """Add tokens that weigh 1 each, or ``weight_T``. Out of memory, it adds nothing at all."""
        tokens = len(inputs_TD)
        weight = tokens if weight_T is None else weight_T.sum(dtype=torch.float64)
        if self.sum_DD is None:
            size = inputs_TD.shape[1]
            self.sum_DD = torch.zeros(size, size, dtype=torch.float64, device=inputs_TD.device)
        if weight_T is not None:
            weighted_TD = inputs_TD.float() * weight_T.sqrt()[:, None]
            # Rounded as the model rounds its inputs, for bfloat16 multiplies faster.
            inputs_TD = weighted_TD.bfloat16() if inputs_TD.dtype == torch.bfloat16 else weighted_TD
        # oneDNN compiles a product for each number of tokens: zeros make the numbers at experts repeat.
        if missing := -tokens % ROUND_ROWS:
            inputs_TD = nn.functional.pad(inputs_TD, (0, 0, 0, missing))
        with bfloat16_products() if inputs_TD.dtype == torch.bfloat16 else nullcontext():
            add_gram(self.sum_DD, inputs_TD)
        self.tokens, self._weight = self.tokens + tokens, self._weight + weight

    def mean(self) -> Tensor:
        """X^T S X / tr S, (D, D), float64. The sum is used up."""
        assert self.sum_DD is not None
        sum_DD, self.sum_DD = mirror(self.sum_DD), None
        return sum_DD.div_(float(self._weight))

    def finish(self, damping: float) -> Statistics | None:
        """The Hessian, ``mean``, and the number of tokens; None if there were none. The accumulator is used up."""
        return None if self.sum_DD is None else Statistics(Hessian(self.mean(), damping), self.tokens)

    def counts(self) -> tuple[int, int, float]:
        """D, tokens, and their weight."""
        return 0 if self.sum_DD is None else len(self.sum_DD), self.tokens, float(self._weight)

    def reduce(
        self, counts: Sequence[tuple[int, int, float]], owner: int | None, ranks: Ranks, device: torch.device
    ) -> None:
        """Add up the sums of all ranks at the ``owner``, or at all; they are empty elsewhere. ``counts``: of each."""
        sizes, tokens, weights = zip(*counts, strict=True)
        self.tokens, self._weight = sum(tokens), sum(weights)
        if not self.tokens:
            return
        if self.sum_DD is None:
            self.sum_DD = torch.zeros(max(sizes), max(sizes), dtype=torch.float64, device=device)
        ranks.all_reduce_(self.sum_DD, owner)
        if owner not in (None, ranks.rank):
            self.sum_DD = None


def reduce_to(
    owners: Mapping[str, int | None], sums: Mapping[str, Accumulator], ranks: Ranks, device: torch.device
) -> None:
    """Add up the sums of all ranks at their owners, or at all ranks where the owner is None. All ranks call it."""
    if ranks.size > 1:
        found = ranks.gather({name: sums[name].counts() for name in owners})
        for name, owner in owners.items():
            sums[name].reduce([counts[name] for counts in found], owner, ranks, device)


def owners_of(groups: Sequence[Sequence[Linear]], ranks: int, device: torch.device) -> dict[str, int | None]:
    """The rank that prunes each group of linears, by its first linear; None: all ranks together."""
    chunked = [
        any(chunk_rows(linear.shape[1], linear.shape[0], device) < linear.shape[0] for linear in group)
        for group in groups
    ]
    owners = share_out([cost(group) for group in groups], ranks, chunked) if ranks > 1 else [0] * len(groups)
    return {group[0].name: owner for group, owner in zip(groups, owners, strict=True)}


def share_out(costs: Sequence[float], ranks: int, divisible: Sequence[bool] = ()) -> list[int | None]:
    """The owner of each task: the largest task first, each to the rank with the least work.

    None, for a task above a fair share that is ``divisible`` (all are, if it is empty): all ranks do it together.
    """
    load, fair = [0.0] * ranks, sum(costs) / ranks
    owners: list[int | None] = [None] * len(costs)
    for index in sorted(range(len(costs)), key=lambda index: -costs[index]):
        together = ranks > 1 and costs[index] > fair and (not divisible or divisible[index])
        if not together:
            least = min(range(ranks), key=load.__getitem__)
            owners[index] = least
            load[least] += costs[index]
    return owners


def cost(group: Sequence[Linear]) -> float:
    """Of a group's linears and their Hessian, in multiplications."""
    size = group[0].shape[1]
    return float(size**3 + PRODUCTS * sum(linear.shape[0] for linear in group) * size**2)
