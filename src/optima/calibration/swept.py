"""Which sequences the sweep for the loss takes, and what stands in for the weights of the other tokens.

What the loss feels of a row is a mean over tokens, which a part of them gives. What it feels of a token hangs on its
place (first tokens above all): tokens that were not swept weigh what those at the same place of other sequences do.

Shapes: B sequences in a batch, L tokens in a sequence, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from optima.calibration.streams import Streams
from optima.calibration.tempering import POWER
from optima.distributed import Ranks

# At least so many tokens are swept, if there are as many.
LEAST_TOKENS = 8192


def swept_share(share: float, tokens: int) -> float:
    """One in how many sequences is swept, as a share: of so many ``tokens``, when ``share`` of them would do."""
    return 1.0 / max(int(1.0 / max(share, LEAST_TOKENS / max(tokens, 1))), 1)


def chosen_batches(streams: Streams, share: float) -> list[int]:
    """The batches of this process that are swept: every so many, counted over all processes."""
    every = round(1.0 / swept_share(share, streams.tokens))
    size = max(streams.ranks.gather(max((samples for samples, _ in streams.sizes), default=1)))
    first, chosen = streams.before[0], []
    for batch, (samples, _) in enumerate(streams.sizes):
        # Hidden states that are not batch first have tokens in another order: they are not told by their place.
        if first // size % every == 0 or streams.probe.sample_dim:
            chosen.append(batch)
        first += samples
    return chosen


def start_alike(streams: Streams) -> bool:
    """Whether all sequences of all processes start with the same input, such as a BOS token."""
    # Hidden states of other layouts have tokens that are not told by their place.
    known = not streams.probe.sample_dim and all(hidden.ndim == 3 for hidden in streams.hidden)
    starts_BE = [hidden[:, 0] for hidden in streams.hidden] if known else []
    everyone = streams.ranks.collect(starts_BE[0][:1] if starts_BE else None)
    first_1E = next((start_1E for start_1E in everyone if start_1E is not None), torch.empty(0))
    return all(streams.ranks.gather(known and all(bool((start_BE == first_1E).all()) for start_BE in starts_BE)))


class Draws:
    """A generator for labels: a sequence has the same whichever process it is in, and whichever others are swept.

    Args:
        counts: of the numbers of each batch of this process.
        ranks: the processes.
        seed: of all of them.
    """

    def __init__(self, counts: Sequence[int], ranks: Ranks, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._counts = counts
        self._left = sum(ranks.gather(sum(counts))[: ranks.rank])  # to be passed over
        self._next = 0

    def of(self, batch: int) -> torch.Generator:
        """For the numbers of a batch, all of which are drawn; batches come in their order."""
        torch.rand(self._left + sum(self._counts[self._next : batch]), generator=self._generator)
        self._left, self._next = 0, batch + 1
        return self._generator


def fill_in(tokens: dict[str, list[Tensor]], streams: Streams, swept: list[int]) -> None:
    """Give every batch its weights of tokens, where ``tokens`` has those of the batches ``swept``; squares, (T,).

    Means are of the roots that are used.
    """
    ranks = streams.ranks
    found = ranks.gather(
        (list(tokens), len(swept) == len(streams.sizes), max((n for _, n in streams.sizes), default=0))
    )
    if all(whole for _, whole, _ in found):
        return
    length = max(own for _, _, own in found)
    for name in dict.fromkeys(name for names, _, _ in found for name in names):
        own = dict(zip(swept, tokens.get(name, []), strict=False))
        sum_2L = torch.zeros(2, length, dtype=torch.float64)
        for batch, square_T in own.items():
            root_BL = square_T.double().pow(POWER).reshape(streams.sizes[batch])
            sum_2L[0, : root_BL.shape[1]] += root_BL.sum(dim=0)
            sum_2L[1, : root_BL.shape[1]] += len(root_BL)
        weight_L, count_L = ranks.total(sum_2L)
        mean_L = torch.where(count_L > 0, weight_L / count_L.clamp_min(1), weight_L.sum() / count_L.sum())
        square_L = mean_L.pow(1.0 / POWER).float()
        filled = {size: square_L[: size[1]].repeat(size[0]) for size in set(streams.sizes)}  # batches share them
        tokens[name] = [own.get(batch, filled[size]) for batch, size in enumerate(streams.sizes)]


def fill_in_routed(routed: dict[str, list[tuple[Tensor, Tensor]]], streams: Streams, swept: list[int]) -> None:
    """Give every batch an entry, where ``routed`` has the tokens of experts in the batches ``swept``."""
    nowhere = torch.zeros(0, dtype=torch.int64), torch.zeros(0)
    for name, known in routed.items():
        own = dict(zip(swept, known, strict=True))
        routed[name] = [own.get(batch, nowhere) for batch in range(len(streams.sizes))]
