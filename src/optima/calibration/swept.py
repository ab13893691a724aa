"""Which sequences gradients are taken of, and what stands in for the weights of the tokens of the others.

What the loss feels of a row is a mean over tokens, which a part of them gives. What it feels of a token hangs on its
place (first tokens above all): tokens that were not swept weigh what those at the same place of other sequences do.

Shapes: B sequences in a batch, L tokens in a sequence, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from optima.calibration.streams import Streams
from optima.calibration.tempering import POWER
from optima.distributed import Ranks
from optima.main_memory import total_memory

# At least so many tokens are swept, or tuned on, if there are as many.
LEAST_TOKENS, LEAST_TUNED = 8192, 32768
# What leaves the last block of equal tokens differs by less, relative to its norm, unless it depends on the text.
ALIKE = 0.05
# Inputs of all blocks that wait for the way back: so many bytes at least, or this share of main memory.
KEPT_BYTES, KEPT_SHARE = 4 * 2**30, 1.0 / 8.0
# Numbers that are drawn to be passed over, at a time.
AT_ONCE = 2**24
# A third of three is one.
ROUNDING = 1e-9


def swept_share(share: float, tokens: int) -> float:
    """The share of the sequences that is swept: of so many ``tokens``, when ``share`` of them would do."""
    return _at_least(share, tokens, LEAST_TOKENS)


def tuned_share(share: float, tokens: int) -> float:
    """As ``swept_share``, of the sequences that blocks are tuned on."""
    return _at_least(share, tokens, LEAST_TUNED)


def surveyed_share(share: float, tokens: int, experts: bool) -> float:
    """As ``swept_share``, of the sequences of a survey: all where there are experts, each of which is given few."""
    return 1.0 if experts else swept_share(share, tokens)


def _at_least(share: float, tokens: int, least: int) -> float:
    return min(max(share, least / max(tokens, 1)), 1.0)


def _batch_size(streams: Streams) -> int:
    """How many sequences a batch has, over all processes."""
    return max(streams.ranks.gather(max((samples for samples, _ in streams.sizes), default=1)))


def _taken(batches: int, share: float) -> int:
    """How many of the first so many ``batches`` are a ``share`` of them; the first one always is."""
    return math.ceil(batches * share - ROUNDING)


def sweep_numbers(streams: Streams, share: float) -> list[int]:
    """Of each batch, the number of its first sequence among those that are swept, over all processes."""
    share, size = swept_share(share, streams.tokens), _batch_size(streams)
    firsts = accumulate((samples for samples, _ in streams.sizes), initial=streams.before[0])
    return [_taken(first // size, share) * size + first % size for first in firsts]


def swept_batches(streams: Streams, share: float) -> list[int]:
    """The batches of this process that are swept."""
    return _spread(streams, swept_share(share, streams.tokens))


def tuned_batches(streams: Streams, share: float) -> list[int]:
    """The batches of this process that blocks are tuned on."""
    return _spread(streams, tuned_share(share, streams.tokens))


def surveyed_batches(streams: Streams, share: float, experts: bool) -> list[int]:
    """The batches of this process that a survey takes."""
    return _spread(streams, surveyed_share(share, streams.tokens, experts))


def _spread(streams: Streams, share: float) -> list[int]:
    """A share of the batches, evenly spread, counted over all processes."""
    size, first, chosen = _batch_size(streams), streams.before[0], []
    for batch, (samples, _) in enumerate(streams.sizes):
        place = first // size
        # Where tokens are counted before sequences they are not told by their place.
        if _taken(place + 1, share) > _taken(place, share) or streams.probe.sequence_first:
            chosen.append(batch)
        first += samples
    return chosen


def kept_bytes(processes: int = 1) -> int:
    """Most of the inputs of all blocks that wait together; of more sequences, one part is swept after the other.

    Every part reads all weights anew. ``processes``: of the run, on this machine.
    """
    return max(KEPT_BYTES, int(KEPT_SHARE * total_memory() / processes))


def at_a_time(streams: Streams, blocks: int, swept: Sequence[int]) -> list[Sequence[int]]:
    """The batches ``swept`` in parts, of each of which the inputs of all blocks are kept together."""
    size, room = max((hidden.nbytes for hidden in streams.hidden), default=1), kept_bytes(streams.ranks.here())
    if streams.store.budget is not None:  # what is more would wait in files
        room = max(min(room, streams.store.budget), KEPT_BYTES)
    count = max(room // (size * (blocks + 1)), 1)
    return [swept[start : start + count] for start in range(0, len(swept), count)]


def first_tokens(streams: Streams, hidden: Tensor) -> Tensor:
    """What hidden states have of each sequence's first token, (B, E); nothing where tokens are not told by place."""
    if streams.probe.sequence_first:
        return hidden.new_empty(0, 0)
    # Gemma 3n has several versions of them. A copy: a view would hold all tokens.
    return hidden.select(streams.probe.token_dims - 1, 0).movedim(streams.probe.sample_dim, 0).flatten(1).clone()


def start_alike(streams: Streams, ends: Sequence[Tensor]) -> bool:
    """Whether all sequences of all processes start with one input, such as BOS, which is one in every block.

    It is not where a token sees later ones, or what an encoder made of another text.

    Args:
        streams: what enters the first block.
        ends: of the batches that were swept, ``first_tokens`` of what leaves the last block.
    """
    starts = [first_tokens(streams, hidden) for hidden in streams.hidden]
    everyone = streams.ranks.all_gather((starts[0][:1] if starts else None, ends[0][:1] if ends else None))
    start_1E = next((start for start, _ in everyone if start is not None), torch.empty(0))
    end_1E = next((end for _, end in everyone if end is not None), torch.empty(0)).float()
    ended = sum(streams.ranks.gather(sum(map(len, ends))))  # one says nothing of others
    alike = ended > 1 and all(bool((start_BE == start_1E).all()) for start_BE in starts)
    for end_BE in ends:  # rounded as their batches are
        alike = alike and bool(((end_BE.float() - end_1E).norm(dim=1) <= ALIKE * end_1E.norm(dim=1)).all())
    return not streams.probe.sequence_first and all(streams.ranks.gather(alike))


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
        passed = self._left + sum(self._counts[self._next : batch])
        for start in range(0, passed, AT_ONCE):
            torch.rand(min(passed - start, AT_ONCE), generator=self._generator)
        self._left, self._next = 0, batch + 1
        return self._generator


def fill_in(tokens: dict[str, list[Tensor]], streams: Streams, swept: list[int]) -> None:
    """Give every batch its weights of tokens, where ``tokens`` has those of the batches ``swept``; squares, (T,).

    Means are of the roots that are used. Of several versions of the hidden states each has tokens of its own.
    """
    ranks = streams.ranks
    versions = {name: len(own[0]) // math.prod(streams.sizes[swept[0]]) for name, own in tokens.items()}
    found = ranks.gather((versions, len(swept) == len(streams.sizes), max((n for _, n in streams.sizes), default=0)))
    if all(whole for _, whole, _ in found):
        return
    length = max(own for _, _, own in found)
    for name, count in {name: count for known, _, _ in found for name, count in known.items()}.items():
        own = dict(zip(swept, tokens.get(name, []), strict=False))
        sum_2L = torch.zeros(2, length, dtype=torch.float64)
        for batch, square_T in own.items():
            root_BL = square_T.double().pow(POWER).reshape(-1, streams.sizes[batch][1])
            sum_2L[0, : root_BL.shape[1]] += root_BL.sum(dim=0)
            sum_2L[1, : root_BL.shape[1]] += len(root_BL)
        weight_L, count_L = ranks.all_reduce(sum_2L)
        mean_L = torch.where(count_L > 0, weight_L / count_L.clamp_min(1), weight_L.sum() / count_L.sum())
        square_L = mean_L.pow(1.0 / POWER).float()
        # Batches share them.
        filled = {size: square_L[: size[1]].repeat(count * size[0]) for size in set(streams.sizes)}
        tokens[name] = [own.get(batch, filled[size]) for batch, size in enumerate(streams.sizes)]


def fill_in_routed(routed: dict[str, list[tuple[Tensor, Tensor]]], streams: Streams, swept: list[int]) -> None:
    """Give every batch an entry, where ``routed`` has the tokens of experts in the batches ``swept``."""
    nowhere = torch.zeros(0, dtype=torch.int32), torch.zeros(0)
    for name, known in routed.items():
        own = dict(zip(swept, known, strict=True))
        routed[name] = [own.get(batch, nowhere) for batch in range(len(streams.sizes))]
