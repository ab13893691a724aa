"""Fisher weights: how much the model's loss depends on each token and each output, from one gradient pass.

To second order the loss grows by 1/2 sum_o sum_t g_to^2 (x_t . (v_o - w_o))^2, g the gradient at output o of a linear
on token t, with labels sampled from the model itself (the true Fisher: Martens, JMLR 2020, section 5). The rank-one fit
g_to^2 ~ r_o s_t puts token weights s_t into the Hessian, which all rows go on sharing; row weights r_o let rows compete
in units of the loss (docs/objective.md).

Gradients are heavy-tailed, so squares are tempered: used at a root. Where that leaves fewer than ``EFFECTIVE``
effective tokens an input (Kish: (sum s)^2 / sum s^2), weights are shrunk towards their mean, as far as needed. An input
that all sequences start with, such as BOS, keeps its weight and is not counted: it is one input.

The pass goes from the last block to the first over the dense inputs of every block, one block on the device, on a
fraction of the sequences. Row weights are means over tokens, which a part of them gives. Token weights depend on the
position (first tokens above all): tokens without gradients get the mean weight of their position.

Shapes: B sequences in a batch, L tokens in a sequence, T tokens, O outputs, E hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from optima.calibration.correlation import Halves, finished, packed
from optima.calibration.halving import rows_of
from optima.calibration.lm_head import at_the_head, head_device
from optima.calibration.probe import hidden_of
from optima.calibration.streams import Streams
from optima.data.batches import words_size
from optima.device import backward_explained, differentiable, give_back_freed_memory
from optima.distributed import Ranks
from optima.errors import NotDifferentiableError
from optima.main_memory import total_memory
from optima.models.blocks import Block, Stack
from optima.models.inspect import head_of
from optima.models.offload import Resident, Weights

Named = TypeVar("Named")
LOGITS = "the cross-entropy of labels sampled from the model"
# Token weights are s^POWER, row weights r^POWER: the square is the second-order loss, too heavy-tailed to be trusted.
POWER = 0.5
# Effective tokens for each input of a linear, at least.
EFFECTIVE = 8
# Row weights estimated from so many tokens are shrunk halfway to their mean.
FEW_TOKENS = 16
# Gradients are taken of, and blocks are tuned on, so many tokens at least, if there are as many.
LEAST_TOKENS, LEAST_TUNED = 8192, 32768
# What leaves the last block of equal tokens differs by less, relative to its norm, unless it depends on the text.
ALIKE = 0.05
# Inputs of all blocks that wait for the backward pass: so many bytes at least, or this share of main memory.
KEPT_BYTES, KEPT_SHARE = 4 * 2**30, 1.0 / 8.0
# Random numbers that are skipped, at a time.
AT_ONCE = 2**24
# Of a share times a count.
ROUNDING = 1e-9


class Moments(NamedTuple):
    """Of the tempered weights of a linear's tokens, without those of an input that all sequences start with.

    Attributes:
        tokens: so many.
        total: sum of their weights.
        squares: sum of the squares of their weights.
        inputs: of the linear; 0: any number of effective tokens will do.
    """

    tokens: float
    total: float
    squares: float
    inputs: int = 0

    @classmethod
    def of(cls, squares: Sequence[Tensor], inputs: int) -> Moments:
        """Of the tokens of several batches, untempered squares (T,)."""
        own = [square_T.pow(POWER) for square_T in squares]
        total, squared = sum(float(own_T.sum()) for own_T in own), sum(float(own_T @ own_T) for own_T in own)
        return cls(sum(map(len, own)), total, squared, inputs)

    @classmethod
    def over(cls, parts: Sequence[Moments]) -> Moments:
        """Of all tokens that ``parts`` have."""
        count, total, squares = (sum(part[number] for part in parts) for number in range(3))
        return cls(count, total, squares, parts[0].inputs)

    def among(self, count: float) -> Moments:
        """Of ``count`` tokens, of which all others have the mean."""
        if not self.total:
            return self._replace(tokens=count)
        mean, others = self.total / self.tokens, count - self.tokens
        return self._replace(tokens=count, total=mean * count, squares=self.squares + others * mean**2)

    @property
    def kept(self) -> float:
        """What is left of the deviations from the mean, 0 to 1."""
        wanted = EFFECTIVE * self.inputs
        effective = self.total**2 / self.squares
        if effective >= wanted:
            return 1.0
        return (
            math.sqrt((self.tokens / wanted - 1.0) / (self.tokens / effective - 1.0)) if wanted < self.tokens else 0.0
        )

    @property
    def effective(self) -> float:
        """Effective sample size (Kish) once the weights are shrunk towards their mean."""
        return self.tokens / (1.0 + self.kept**2 * (self.tokens * self.squares / self.total**2 - 1.0))

    def weights(self, square_T: Tensor, start_T: Tensor) -> Tensor:
        """Of tokens of these squares, (T,), some of them of a shared start; of mean 1 over all others."""
        own_T = square_T.pow(POWER) * (self.tokens / self.total)
        return torch.where(start_T, own_T, torch.lerp(torch.ones_like(own_T), own_T, self.kept))


def tempering(square_T: Tensor) -> Tensor:
    """By what to multiply what is summed over tokens of these squares, (T,), so that few of them do not decide."""
    return square_T.pow(POWER - 1.0).masked_fill_(square_T == 0.0, 0.0)


def rows_of_sums(sum_2O: Tensor) -> Tensor:
    """Of a linear's rows, (O,): the second of these sums, of tempered squares, at the level of the first."""
    square, tempered = sum_2O.sum(dim=1).tolist()
    return sum_2O[1] * (square / tempered if tempered else 0.0)


def row_weights(square_O: Tensor, tokens: float = math.inf) -> Tensor:
    """Of a linear's rows, (O,), with the mean of their squares; shrunk towards it where ``tokens`` are few."""
    tempered_O = square_O.pow(POWER)
    weight_O = tempered_O * (square_O.mean() / tempered_O.mean())
    return weight_O if tokens == math.inf else torch.lerp(weight_O.mean(), weight_O, tokens / (tokens + FEW_TOKENS))


@dataclass
class FisherWeights:
    """Squares of gradients at the outputs of linears and blocks, untempered.

    Attributes:
        loss: whose gradients they are, for the report.
        note: what the report mentions of how they were found.
        tokens: by the name of a group's first linear, or of a block: for each batch (T,), summed over the outputs.
            Groups that are not given every token, as experts, have none.
        routed: by the name of an expert's linear: for each batch the tokens that were routed to it, and their squares.
        rows: by the name of a linear: the mean over tokens of g_to^2, tempered as tokens are, with the mean of what is
            not, (O,); during the pass the sums of both, (2, O).
        reached: by the name of a linear that is not given every token: so many have known gradients, of all processes.
        residual: by the name of a block: the mean over tokens of g g^T at its outputs, (E, E).
        coupling: by the name of a linear: how its rows go together, (O, O); during the pass the sums of both halves,
            see ``calibration.correlation.packed``.
        inputs: of each linear, by its name.
        lengths: of each batch's sequences, if all start with the same input; empty if they do not.
        shared: of the tokens of all processes, by the names of ``tokens`` and ``routed``, which are of this process's.
    """

    loss: str
    tokens: dict[str, list[Tensor]] = field(default_factory=dict)
    routed: dict[str, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)
    reached: dict[str, float] = field(default_factory=dict)
    residual: dict[str, Tensor] = field(default_factory=dict)
    coupling: dict[str, Tensor] = field(default_factory=dict)
    note: str = ""
    inputs: dict[str, int] = field(default_factory=dict)
    lengths: list[int] = field(default_factory=list)
    shared: dict[str, Moments] = field(default_factory=dict)

    def forget(self, names: Collection[str]) -> None:
        """A block and its linears are done: let go of what is needed once."""
        for known in (self.tokens, self.routed, self.rows, self.residual, self.coupling):
            for name in names:
                known.pop(name, None)

    def part(self, batches: Sequence[int]) -> FisherWeights:
        """The weights of some batches, as ``Streams.part``; what is known of all tokens stays."""
        tokens, routed = (
            {name: [own[batch] for batch in batches] for name, own in known.items()}
            for known in (self.tokens, self.routed)
        )
        lengths = [self.lengths[batch] for batch in batches] if self.lengths else []
        return replace(self, tokens=tokens, routed=routed, lengths=lengths)  # type: ignore[arg-type]

    def moments(self, name: str) -> Moments:
        """Of the tempered weights, for a name of ``tokens`` or ``routed``."""
        if name in self.shared:
            return self.shared[name]
        own = (
            self.routed[name]
            if name in self.routed
            else [(_places(all_T), all_T) for all_T in self.tokens.get(name, [])]
        )
        counted = [own_T[~self._starts(batch, at_T)] for batch, (at_T, own_T) in enumerate(own)]
        return Moments.of(counted, self.inputs.get(name, 0))

    def _starts(self, batch: int, at_T: Tensor) -> Tensor:
        """Which of a batch's tokens, at places ``at_T``, are the input that all sequences start with."""
        return at_T % self.lengths[batch] == 0 if self.lengths else torch.zeros_like(at_T, dtype=torch.bool)

    def of_tokens(self, name: str) -> list[Tensor] | None:
        """Weights of each batch's tokens, (T,), for a group's first linear or a block ``name``; see ``Moments``.

        None where they are not known, or no token matters.
        """
        moments = self.moments(name)
        if not moments.total or name not in self.tokens:
            return None
        own = enumerate(self.tokens[name])
        return [moments.weights(own_T, self._starts(batch, _places(own_T))) for batch, own_T in own]

    def of_routed(self, name: str, batch: int, size: int) -> Tensor | None:
        """As ``of_tokens`` at an expert's linear ``name``: of a batch's ``size`` tokens, wherever they were routed.

        A token that the dense model sent elsewhere has the mean of the expert's, which is 1.
        """
        moments = self.moments(name)
        if not moments.total or name not in self.routed:
            return None
        tokens_T, own_T = self.routed[name][batch]
        weight_T = torch.ones(size)
        weight_T[tokens_T.long()] = moments.weights(own_T, self._starts(batch, tokens_T))
        return weight_T

    def effective_tokens(self, name: str) -> float | None:
        """(sum s)^2 / sum s^2 of the weights (Kish): the effective sample size."""
        moments = self.moments(name)
        return moments.effective if moments.total else None

    def of_rows(self, name: str) -> Tensor | None:
        """Tempered weights of a linear's rows, (O,), with the mean of those that are not; None if none matters."""
        row_O = self.rows.get(name)
        known = self.reached.get(name, math.inf)
        return None if row_O is None or not bool(row_O.any()) else row_weights(row_O, known)

    def compared(self, name: str, outputs: int) -> Tensor:
        """As ``of_rows``, where linears compete: zeros if none matters, as for an expert that no token reached."""
        row_O = self.of_rows(name)
        return torch.zeros(outputs) if row_O is None else row_O


def _places(tokens: Tensor) -> Tensor:
    return torch.arange(len(tokens))


def fisher_share(share: float, tokens: int) -> float:
    """The share of the sequences that is used: of so many ``tokens``, when ``share`` of them would do."""
    return _at_least(share, tokens, LEAST_TOKENS)


def tuned_share(share: float, tokens: int) -> float:
    """As ``fisher_share``, of the sequences that blocks are tuned on."""
    return _at_least(share, tokens, LEAST_TUNED)


def sensitivity_share(share: float, tokens: int, experts: bool) -> float:
    """As ``fisher_share``, of the sequences of a survey: all where there are experts, each of which is given few."""
    return 1.0 if experts else fisher_share(share, tokens)


def _at_least(share: float, tokens: int, least: int) -> float:
    return min(max(share, least / max(tokens, 1)), 1.0)


def _batch_size(streams: Streams) -> int:
    """How many sequences a batch has, over all processes."""
    return max(streams.ranks.gather(max((samples for samples, _ in streams.sizes), default=1)))


def _taken(batches: int, share: float) -> int:
    """How many of the first so many ``batches`` are a ``share`` of them; the first one always is."""
    return math.ceil(batches * share - ROUNDING)


def fisher_numbers(streams: Streams, share: float) -> list[int]:
    """Of each batch, the number of its first sequence among those that are used, over all processes."""
    share, size = fisher_share(share, streams.tokens), _batch_size(streams)
    firsts = accumulate((samples for samples, _ in streams.sizes), initial=streams.before[0])
    return [_taken(first // size, share) * size + first % size for first in firsts]


def fisher_batches(streams: Streams, share: float) -> list[int]:
    """The batches of this process that are used."""
    return _spread(streams, fisher_share(share, streams.tokens))


def tuned_batches(streams: Streams, share: float) -> list[int]:
    """The batches of this process that blocks are tuned on."""
    return _spread(streams, tuned_share(share, streams.tokens))


def sensitivity_batches(streams: Streams, share: float, experts: bool) -> list[int]:
    """The batches of this process that a survey takes."""
    return _spread(streams, sensitivity_share(share, streams.tokens, experts))


def _spread(streams: Streams, share: float) -> list[int]:
    """A share of the batches, evenly spread, counted over all processes."""
    size, first, chosen = _batch_size(streams), streams.before[0], []
    for batch, (samples, _) in enumerate(streams.sizes):
        place = first // size
        # Where tokens are counted before sequences positions are not known.
        if _taken(place + 1, share) > _taken(place, share) or streams.probe.sequence_first:
            chosen.append(batch)
        first += samples
    return chosen


def kept_bytes(processes: int = 1) -> int:
    """Most of the inputs of all blocks that wait together; of more sequences, one part is used after the other.

    Every part reads all weights anew. ``processes``: of the run, on this machine.
    """
    return max(KEPT_BYTES, int(KEPT_SHARE * total_memory() / processes))


def at_a_time(streams: Streams, blocks: int, used: Sequence[int]) -> list[Sequence[int]]:
    """The batches ``used`` in parts, of each of which the inputs of all blocks are kept together."""
    size, room = max((hidden.nbytes for hidden in streams.hidden), default=1), kept_bytes(streams.ranks.here())
    if streams.store.budget is not None:  # what is more would wait in files
        room = max(min(room, streams.store.budget), KEPT_BYTES)
    count = max(room // (size * (blocks + 1)), 1)
    return [used[start : start + count] for start in range(0, len(used), count)]


def first_tokens(streams: Streams, hidden: Tensor) -> Tensor:
    """What hidden states have of each sequence's first token, (B, E); nothing where positions are not known."""
    if streams.probe.sequence_first:
        return hidden.new_empty(0, 0)
    # Gemma 3n has several versions of them. A copy: a view would hold all tokens.
    return hidden.select(streams.probe.token_dims - 1, 0).movedim(streams.probe.sample_dim, 0).flatten(1).clone()


def start_alike(streams: Streams, ends: Sequence[Tensor]) -> bool:
    """Whether all sequences of all processes start with one input, such as BOS, which is one in every block.

    It is not where a token sees later ones, or what an encoder made of another text.

    Args:
        streams: what enters the first block.
        ends: of the batches that were used, ``first_tokens`` of what leaves the last block.
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
    """A generator for labels: a sequence has the same whichever process it is in, and whichever others are used.

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


def fill_in(tokens: dict[str, list[Tensor]], streams: Streams, used: list[int]) -> None:
    """Give every batch its weights of tokens, where ``tokens`` has those of the batches ``used``; squares, (T,).

    Means are of the roots that are used. Of several versions of the hidden states each has tokens of its own.
    """
    ranks = streams.ranks
    versions = {name: len(own[0]) // math.prod(streams.sizes[used[0]]) for name, own in tokens.items()}
    found = ranks.gather((versions, len(used) == len(streams.sizes), max((n for _, n in streams.sizes), default=0)))
    if all(whole for _, whole, _ in found):
        return
    length = max(own for _, _, own in found)
    for name, count in {name: count for known, _, _ in found for name, count in known.items()}.items():
        own = dict(zip(used, tokens.get(name, []), strict=False))
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


def fill_in_routed(routed: dict[str, list[tuple[Tensor, Tensor]]], streams: Streams, used: list[int]) -> None:
    """Give every batch an entry, where ``routed`` has the tokens of experts in the batches ``used``."""
    nowhere = torch.zeros(0, dtype=torch.int32), torch.zeros(0)
    for name, known in routed.items():
        own = dict(zip(used, known, strict=True))
        routed[name] = [own.get(batch, nowhere) for batch in range(len(streams.sizes))]


def fisher_weights(
    model: PreTrainedModel,
    stack: Stack,
    streams: Streams,
    seed: int,
    residual: bool = False,
    weights: Weights | None = None,
    share: float = 1.0,
    progress: Callable[[float], None] = lambda done: None,
    coupled: bool = False,
) -> FisherWeights:
    """Take gradients of the dense model.

    The loss is the cross-entropy of labels sampled from the model's logits. Of a model without an LM head it is the
    square of the change of the last block's output: labels are random signs then (Hutchinson's estimator).

    Args:
        model: the whole model, in evaluation mode.
        stack: the stack that its head reads.
        streams: what enters the first block, with the calls of all blocks; left as it is.
        seed: of the labels.
        residual: find ``FisherWeights.residual`` too, at a product of E x E entries a token and block.
        weights: brings blocks to the device; None: they are all in main memory.
        share: of the sequences that are used, see ``optima.calibration.used``.
        progress: called with the fraction of the work that is done, 0 to 1.
        coupled: find ``FisherWeights.coupling`` too, see ``calibration.correlation.couples``.

    Raises:
        NotDifferentiableError: if there are no gradients, or they are not finite; of several processes, in all.
    """
    found, problem, used = None, "", fisher_batches(streams, share)
    ends: list[Tensor] = []
    parts = at_a_time(streams, len(stack.blocks), used)
    try:
        # Where tokens are counted before sequences, sequences cannot be split into halves.
        numbers = fisher_numbers(streams, share) if coupled and not streams.probe.sequence_first else None
        most = max((math.prod(streams.sizes[batch]) for batch in used), default=0)
        place, place_note = head_device(model, stack, streams.device, most)
        gradient_pass = _GradientPass(
            model, stack, streams, weights or Resident(model), progress, place, residual, numbers
        )
        found, ends = gradient_pass.run(parts, seed)
    except NotDifferentiableError as error:
        problem = str(error)
    if problem := next(filter(None, streams.ranks.gather(problem)), ""):
        raise NotDifferentiableError(problem)
    assert found is not None
    found.note = place_note
    fill_in(found.tokens, streams, used)
    fill_in_routed(found.routed, streams, used)
    _reduce(found, stack, streams, used, start_alike(streams, ends))
    give_back_freed_memory()
    return found


def _reduce(found: FisherWeights, stack: Stack, streams: Streams, used: Sequence[int], alike: bool) -> None:
    """Means over the tokens of all processes, of which each keeps the weights of its own."""
    ranks = streams.ranks
    tokens = sum(ranks.gather(sum(math.prod(streams.sizes[batch]) for batch in used)))
    found.inputs = {linear.name: linear.shape[1] for block in stack.blocks for linear in block.linears}
    found.lengths = [length for _, length in streams.sizes] if alike else []
    own = {name: found.moments(name) for name in (*found.tokens, *found.routed)}
    shapes = _shapes(found.rows), _shapes(found.residual), _shapes(found.coupling)
    known = ranks.gather((own, list(found.routed), *shapes))
    routed = {name for _, names, *_ in known for name in names}
    for name in _union(moments for moments, *_ in known):
        every = Moments.over([moments[name] for moments, *_ in known if name in moments])
        # An expert's tokens of sequences that were not used are to come, with the mean.
        found.shared[name] = every.among(every.tokens * streams.tokens / tokens) if name in routed else every
    reached = ranks.gather(found.reached)
    found.reached = {name: sum(own.get(name, 0.0) for own in reached) for name in _union(reached)}
    for name, shape in _union(rows for _, _, rows, *_ in known).items():  # what one was not given, another was
        own_2O = found.rows.get(name, torch.zeros(shape, dtype=torch.float64))
        found.rows[name] = rows_of_sums(ranks.all_reduce(own_2O) / tokens).float()
    for name, shape in _union(residual for *_, residual, _ in known).items():
        total_EE = ranks.all_reduce(found.residual.pop(name, torch.zeros(shape)))
        found.residual[name] = streams.store.keep(total_EE / tokens)
    for name, shape in _union(halves for *_, halves in known).items():
        sums_OP = ranks.all_reduce(found.coupling.pop(name, torch.zeros(shape)))
        found.coupling[name] = streams.store.keep(finished(sums_OP.to(streams.device)).cpu())


def _union(parts: Iterable[Mapping[str, Named]]) -> dict[str, Named]:
    return {name: value for part in parts for name, value in part.items()}


def _shapes(sums: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in sums.items()}


@dataclass(frozen=True)
class _GradientPass:
    """There and back through the dense model, some of the sequences at a time.

    Attributes:
        model, stack, streams, weights: see ``fisher_weights``.
        progress: called with the fraction that is done.
        place: where the head runs.
        residual: whether ``FisherWeights.residual`` is found.
        numbers: of each batch's first sequence, if ``FisherWeights.coupling`` is found; see ``Halves``.
    """

    model: PreTrainedModel
    stack: Stack
    streams: Streams
    weights: Weights
    progress: Callable[[float], None]
    place: torch.device
    residual: bool
    numbers: Sequence[int] | None

    def run(self, parts: Sequence[Sequence[int]], seed: int) -> tuple[FisherWeights, list[Tensor]]:
        """Sums over this process's tokens of the batches in all ``parts``, where ``fisher_weights`` returns means.

        And what leaves the last block of each sequence's first token.
        """
        if reason := _shared_between_blocks(self.stack, self.streams):
            raise NotDifferentiableError(reason)
        if any(parameter.is_inference() for parameter in self.model.parameters()):
            raise NotDifferentiableError("the model was made inside torch.inference_mode()")
        found = FisherWeights(LOGITS if self._has_head else "the square of the change of the last hidden states")
        ends: list[Tensor] = []
        draws = self._draws(seed)
        with torch.inference_mode(False), torch.enable_grad(), differentiable(self.model):
            for number, batches_now in enumerate(parts):
                part = self.streams.part(batches_now)
                kept = self._there(part)
                ends += [first_tokens(self.streams, hidden) for hidden in part.hidden]
                gradients = self._at_the_head(part, batches_now, draws)
                own = None if self.numbers is None else [self.numbers[batch] for batch in batches_now]
                self._back(part, kept, gradients, found, own, partial(self._done, number, len(parts)))
        return found, ends

    def _done(self, part: int, parts: int, backward: float) -> None:
        """Report progress: a forward pass is a quarter of the work, ``backward`` the fraction of the rest."""
        self.progress((part + 0.25 + 0.75 * backward) / parts)

    @property
    def _has_head(self) -> bool:
        return head_of(self.model) is not None

    def _draws(self, seed: int) -> Draws:
        """Of labels for all batches of this process, whichever are used."""
        words = [math.prod(words_size(self.model, batch)) for batch in self.streams.batches] if self._has_head else []
        return Draws(words or [hidden.numel() for hidden in self.streams.hidden], self.streams.ranks, seed)

    def _there(self, part: Streams) -> list[list[Tensor]]:
        """Through all blocks; what entered each."""
        kept = []
        for block in self.stack.blocks:
            kept.append(list(part.hidden))
            with self.weights.on(block, part.device):
                part.advance(block)
        return kept

    def _at_the_head(self, part: Streams, batches_now: Sequence[int], draws: Draws) -> list[Tensor]:
        """Gradients at the output of the last block, of each of ``batches_now``."""
        gradients = []
        give_back_freed_memory()  # logits are large
        with self.weights.outside(self.place):
            for batch, hidden in enumerate(part.hidden):
                generator = draws.of(batches_now[batch])
                if self._has_head:
                    drawn_BL = torch.rand(words_size(self.model, part.batches[batch]), generator=generator)
                    gradient = at_the_head(self.model, self.stack, part, batch, drawn_BL)
                else:
                    gradient = torch.randint(0, 2, hidden.shape, generator=generator).mul_(2).sub_(1).to(hidden)
                gradients.append(self.streams.store.keep(gradient))
        return gradients

    def _back(
        self,
        part: Streams,
        kept: list[list[Tensor]],
        gradients: list[Tensor],
        found: FisherWeights,
        numbers: Sequence[int] | None,
        done: Callable[[float], None],
    ) -> None:
        """Through all blocks, the last first; ``numbers`` of the batches of ``part``."""
        for left, block in reversed(list(enumerate(self.stack.blocks))):
            part.hidden = kept.pop()
            if self.residual:
                sum_EE = second_moment(gradients, part.device, found.residual.get(block.name))
                found.residual[block.name] = self.streams.store.keep(sum_EE)
            with self.weights.on(block, part.device):
                through(block, part, gradients, found, numbers)
            done(1.0 - left / len(self.stack.blocks))


def second_moment(gradients: Sequence[Tensor], device: torch.device, before_EE: Tensor | None = None) -> Tensor:
    """The sum over tokens of g g^T, (E, E), on the CPU; batches are added to that of earlier ones, one by one."""
    size = gradients[0].shape[-1]
    product_EE = torch.zeros(size, size, device=device) if before_EE is None else before_EE.to(device, copy=True)
    for gradient in gradients:
        flat_TE = gradient.to(device).flatten(0, -2).float()
        product_EE += flat_TE.mT @ flat_TE
    return product_EE.cpu()


class _Notes:
    """Squares of the gradients at a block's linears: of rows at once, of tokens once all batches were through."""

    def __init__(self, block: Block, streams: Streams, found: FisherWeights, numbers: Sequence[int] | None) -> None:
        self._block, self._sizes, self._unordered, self._found = block, streams.sizes, streams.probe.routed, found
        self._leaders = {linear.name: group[0].name for group in streams.groups(block) for linear in group}
        self._rows: dict[str, Tensor] = {}  # float64, on the device until the block is done
        self._tokens: dict[str, list[Tensor]] = {}
        self._routed: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self._halves, self._store = Halves(block, streams.sizes, numbers, found.coupling), streams.store

    @contextmanager
    def watch(self, batch: int, part: slice) -> Iterator[None]:
        """Note the gradients of samples of a batch in a backward pass inside, if it gets to its end."""
        noted: list[Callable[[], None]] = []

        def note(name: str, gradient: Tensor, tokens_T: Tensor | None = None) -> None:
            gradient_TO = gradient.detach().flatten(0, -2)
            square_TO = gradient_TO.float().square()
            sum_T = square_TO.sum(dim=1)
            factor_T = tempering(sum_T)
            sum_2O = torch.stack((square_TO.sum(dim=0), factor_T @ square_TO))
            noted.append(partial(self._note, name, batch, part, sum_2O, sum_T.cpu(), tokens_T))
            by_position = name not in self._unordered
            products = self._halves.products(name, gradient_TO, factor_T, batch, part) if by_position else None
            if products is not None:
                noted.append(partial(self._halves.add, name, products))

        with ExitStack() as hooks:
            for linear in self._block.linears:
                see = partial(note, linear.name)
                if linear.expert is not None:
                    nowhere = torch.zeros(0, dtype=torch.int32), torch.zeros(0)
                    self._routed.setdefault(linear.name, [nowhere for _ in self._sizes])
                hooks.callback(linear.watch(see).remove)
            hooks.enter_context(self._block.linearized())
            yield
        for each in noted:
            each()

    def _note(self, name: str, batch: int, part: slice, sum_2O: Tensor, sum_T: Tensor, tokens_T: Tensor | None) -> None:
        length = self._sizes[batch][1]
        if not bool(sum_T.isfinite().all()):
            raise NotDifferentiableError(f"gradients at the outputs of {name} are not finite")
        self._rows[name] = self._rows.get(name, 0.0) + sum_2O.double()
        begin, count = part.start * length, (part.stop - part.start) * length
        if name in self._routed or name in self._unordered:
            self._found.reached[name] = self._found.reached.get(name, 0.0) + len(sum_T)
        if name in self._routed:
            if tokens_T is not None:
                known = self._routed[name][batch]
                found = ((tokens_T.cpu() + begin).int(), sum_T)
                self._routed[name][batch] = torch.cat((known[0], found[0])), torch.cat((known[1], found[1]))
        elif name not in self._unordered and len(sum_T) == count:
            if (leader := self._leaders[name]) not in self._tokens:
                self._tokens[leader] = [torch.zeros(math.prod(size)) for size in self._sizes]
            own = self._tokens[leader]
            own[batch][begin : begin + count] += sum_T

    def close(self) -> None:
        """Hand on what was noted of tokens, and of rows that go together."""
        rows = self._found.rows
        for name, sum_2O in self._rows.items():
            rows[name] = rows.get(name, 0.0) + sum_2O.cpu()
        for name, halves in self._halves.sums.items():
            self._found.coupling[name] = self._store.keep(packed(halves).cpu())
        parted = self._routed.keys() | self._unordered
        ordered = {leader for name, leader in self._leaders.items() if name not in parted}
        for name in sorted(ordered):  # one that was not called has zeros, for another part of the batches may call it
            batches = self._tokens.get(name) or [torch.zeros(math.prod(size)) for size in self._sizes]
            self._found.tokens.setdefault(name, []).extend(batches)
        for name, routed in self._routed.items():
            self._found.routed.setdefault(name, []).extend(routed)


def through(
    block: Block,
    streams: Streams,
    gradients: list[Tensor],
    found: FisherWeights,
    numbers: Sequence[int] | None = None,
) -> None:
    """Carry ``gradients`` from the block's outputs to its inputs, and note them at its linears.

    ``numbers``: see ``Halves``.
    """
    notes = _Notes(block, streams, found, numbers)

    def back(batch: int, part: slice) -> tuple[Tensor, Tensor]:
        gradient = rows_of(gradients[batch], part, streams.sizes[batch][0]).to(streams.device)
        square_T = gradient.float().square().flatten(streams.probe.token_dims).sum(dim=-1).flatten()
        if not bool(square_T.isfinite().all()):
            raise NotDifferentiableError(f"gradients at the output of {block.name} are not finite")
        leaves: list[Tensor] = []

        def call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            leaves.append(args[0].detach().requires_grad_(True))
            return block.module(leaves[0], *args[1:], **kwargs)

        with notes.watch(batch, part):
            output = hidden_of(streams.run(block, batch, part, call))
            if not output.requires_grad:
                raise NotDifferentiableError(f"the output of {block.name} does not depend on its input by a gradient")
            with backward_explained(block.name):
                output.backward(gradient)
        assert leaves[0].grad is not None
        return square_T.cpu(), leaves[0].grad.cpu()

    for batch in range(len(gradients)):
        squares, parts = zip(*streams.in_parts(block, batch, partial(back, batch)), strict=True)
        found.tokens.setdefault(block.name, []).append(torch.cat(squares))
        gradients[batch] = streams.store.keep(parts[0] if len(parts) == 1 else torch.cat(parts))
    notes.close()


def _shared_between_blocks(stack: Stack, streams: Streams) -> str:
    """Why gradients cannot go block by block: they would need what blocks share besides hidden states."""
    for block in stack.blocks:
        for batch, hidden in enumerate(streams.hidden):
            if streams.states(block, batch):
                return "its blocks share keys and values"
            carried = (streams.carried[batch].get(source) for source in streams.probe.carried[block.index].values())
            if any(each is not None and each.shape[:2] == hidden.shape[:2] for each in carried):
                return "its blocks pass on other activations than hidden states"
    return ""
