"""How much the model's loss feels each token and each output: one backward pass over the dense model.

To second order the loss grows by 1/2 sum_o sum_t g_to^2 (x_t . (v_o - w_o))^2, g the gradient at output o of a linear
on token t, with labels drawn from the model itself (the true Fisher: Martens, JMLR 2020, section 5). The rank-one fit
g_to^2 ~ r_o s_t puts token weights s_t into the hessian, which rows go on sharing; r_o lets rows compete in units of
the loss (docs/objective.md). Gradients are heavy-tailed, so both are used at a root.

The sweep goes from the last block to the first, the dense inputs of every block kept, one block on the device.

Shapes: B sequences in a batch, L tokens in a sequence, T tokens, O outputs, E hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from optima.calibration.backward import second_moment, through
from optima.calibration.coupling import finished
from optima.calibration.head import at_the_head
from optima.calibration.left_behind import HandedOn, LeftBehind
from optima.calibration.places import head_device
from optima.calibration.streams import Streams
from optima.calibration.swept import (
    Draws,
    at_a_time,
    fill_in,
    fill_in_routed,
    first_tokens,
    start_alike,
    sweep_numbers,
    swept_batches,
)
from optima.calibration.tempering import LossWeights, Moments, rows_of_sums
from optima.data.batches import words_size
from optima.device import differentiable, give_back_freed_memory
from optima.errors import NotDifferentiableError
from optima.models.reading import head_of
from optima.models.stacks import Block, Stack, count_parameters
from optima.models.weights import Resident, Weights

WORDS = "that of words drawn from the model"


def loss_weights(
    model: PreTrainedModel,
    stack: Stack,
    streams: Streams,
    seed: int,
    residual: bool = False,
    weights: Weights | None = None,
    share: float = 1.0,
    told: Callable[[float], None] = lambda done: None,
    coupled: bool = False,
) -> LossWeights:
    """Sweep the dense model.

    The loss is that of the model's own words where it has a head for them. Else it is the square of the change of the
    last block's output, every number alike: the gradient's labels are random signs then (Hutchinson's estimator).

    Args:
        model: the whole model, in evaluation mode.
        stack: the stack that its head reads.
        streams: what enters the first block, with the calls of all blocks; left as it is.
        seed: of the labels.
        residual: find ``LossWeights.residual`` too, at a product of E x E entries a token and block.
        weights: brings blocks to the device; None: they are all in main memory.
        share: of the sequences that are swept, see ``optima.calibration.swept``.
        told: now and then, how much of the work is done, 0 to 1.
        coupled: find ``LossWeights.coupling`` too, see ``calibration.coupling.couples``.

    Raises:
        NotDifferentiableError: if there are no gradients, or they are not finite; of several processes, in all.
    """
    found, problem, swept = None, "", swept_batches(streams, share)
    ends: list[Tensor] = []
    parts = at_a_time(streams, len(stack.blocks), swept)
    try:
        tally = _Tally(model, stack, sum(math.prod(streams.sizes[batch]) for batch in swept), told)
        # Where tokens are counted before sequences, halves of these cannot be told.
        numbers = sweep_numbers(streams, share) if coupled and not streams.probe.sequence_first else None
        most = max((math.prod(streams.sizes[batch]) for batch in swept), default=0)
        place, told_of_place = head_device(model, stack, streams.device, most)
        sweep = _Sweep(model, stack, streams, weights or Resident(model), tally, place, residual, numbers)
        found, ends = sweep.run(parts, seed)
    except NotDifferentiableError as error:
        problem = str(error)
    if problem := next(filter(None, streams.ranks.gather(problem)), ""):
        raise NotDifferentiableError(problem)
    assert found is not None
    found.told = told_of_place
    fill_in(found.tokens, streams, swept)
    fill_in_routed(found.routed, streams, swept)
    _reduce(found, stack, streams, swept, start_alike(streams, ends))
    give_back_freed_memory()
    return found


def _reduce(found: LossWeights, stack: Stack, streams: Streams, swept: Sequence[int], alike: bool) -> None:
    """Means over the tokens of all processes, of which each keeps the weights of its own."""
    ranks = streams.ranks
    tokens = sum(ranks.gather(sum(math.prod(streams.sizes[batch]) for batch in swept)))
    found.inputs = {linear.name: linear.shape[1] for block in stack.blocks for linear in block.linears}
    found.lengths = [length for _, length in streams.sizes] if alike else []
    own = {name: found.moments(name) for name in (*found.tokens, *found.routed)}
    shapes = _shapes(found.rows), _shapes(found.residual), _shapes(found.coupling)
    known = ranks.gather((own, list(found.routed), *shapes))
    routed = {name for _, names, *_ in known for name in names}
    for name in _union(moments for moments, *_ in known):
        every = Moments.over([moments[name] for moments, *_ in known if name in moments])
        # An expert's tokens of sequences that were not swept are to come, with the mean.
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


Named = TypeVar("Named")


def _union(parts: Iterable[Mapping[str, Named]]) -> dict[str, Named]:
    return {name: value for part in parts for name, value in part.items()}


def _shapes(sums: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in sums.items()}


class _Tally:
    """How much of a sweep is done, by products: of parameters and tokens, as often as tokens go through them."""

    def __init__(self, model: PreTrainedModel, stack: Stack, tokens: int, told: Callable[[float], None]) -> None:
        head, self._told, self._done = head_of(model), told, 0
        self._size = {block.name: count_parameters(block.module) for block in stack.blocks}
        self._head = 2 * (0 if head is None else count_parameters(head))  # logits, and their gradient
        self._total = max((4 * sum(self._size.values()) + self._head) * tokens, 1)

    def forward(self, block: Block, part: Streams) -> None:
        """All batches of ``part`` went through a block."""
        self._add(self._size[block.name] * sum(map(math.prod, part.sizes)))

    def head(self, size: tuple[int, int]) -> None:
        """A batch of (B, L) went to the head and back."""
        self._add(self._head * math.prod(size))

    def back(self, block: Block, part: Streams) -> None:
        """All batches of ``part`` went back through a block, and forward once more for that."""
        self._add(3 * self._size[block.name] * sum(map(math.prod, part.sizes)))

    def _add(self, products: int) -> None:
        if products:
            self._done += products
            self._told(self._done / self._total)


@dataclass(frozen=True)
class _Entered:
    """What entered a block: hidden states of each batch, and what was in its states, which later blocks write over."""

    hidden: list[Tensor]
    states: list[list[dict[Any, Any]]]

    def restore(self, streams: Streams, block: Block) -> None:
        """Let it enter the block again."""
        streams.hidden = self.hidden
        for batch, held in enumerate(self.states):
            for state, was in zip(streams.states(block, batch), held, strict=True):
                state.clear()
                state.update(was)


@dataclass(frozen=True)
class _Sweep:
    """There and back through the dense model, some of the sequences at a time.

    Attributes:
        model, stack, streams, weights: see ``loss_weights``.
        tally: told of what is done.
        place: where the head runs.
        residual: whether ``LossWeights.residual`` is found.
        numbers: of each batch's first sequence, if ``LossWeights.coupling`` is found; see ``Halves``.
    """

    model: PreTrainedModel
    stack: Stack
    streams: Streams
    weights: Weights
    tally: _Tally
    place: torch.device
    residual: bool
    numbers: Sequence[int] | None

    def run(self, parts: Sequence[Sequence[int]], seed: int) -> tuple[LossWeights, list[Tensor]]:
        """Sums over this process's tokens of the batches in all ``parts``, where ``loss_weights`` returns means.

        And what leaves the last block of each sequence's first token.
        """
        if any(parameter.is_inference() for parameter in self.model.parameters()):
            raise NotDifferentiableError("the model was made inside torch.inference_mode()")
        found = LossWeights(WORDS if self._has_words else "the square of the change of the last hidden states")
        ends: list[Tensor] = []
        draws = self._draws(seed)
        with torch.inference_mode(False), torch.enable_grad(), differentiable(self.model):
            for batches_now in parts:
                part = self.streams.part(batches_now)
                kept = self._there(part)
                ends += [first_tokens(self.streams, hidden) for hidden in part.hidden]
                gradients = self._at_the_head(part, batches_now, draws)
                own = None if self.numbers is None else [self.numbers[batch] for batch in batches_now]
                self._back(part, kept, gradients, found, own)
        return found, ends

    @property
    def _has_words(self) -> bool:
        return head_of(self.model) is not None

    def _draws(self, seed: int) -> Draws:
        """Of labels for all batches of this process, whichever are swept."""
        words = [math.prod(words_size(self.model, batch)) for batch in self.streams.batches] if self._has_words else []
        return Draws(words or [hidden.numel() for hidden in self.streams.hidden], self.streams.ranks, seed)

    def _there(self, part: Streams) -> list[_Entered]:
        """Through all blocks; what entered each."""
        kept = []
        for block in self.stack.blocks:
            states = [[dict(state) for state in part.states(block, batch)] for batch in range(len(part.sizes))]
            kept.append(_Entered(list(part.hidden), states))
            with self.weights.on(block, part.device):
                part.advance(block)
            self.tally.forward(block, part)
        return kept

    def _at_the_head(self, part: Streams, batches_now: Sequence[int], draws: Draws) -> list[Tensor]:
        """Gradients at the output of the last block, of each of ``batches_now``."""
        gradients = []
        give_back_freed_memory()  # logits are large
        with self.weights.outside(self.place):
            for batch, hidden in enumerate(part.hidden):
                generator = draws.of(batches_now[batch])
                if self._has_words:
                    drawn_BL = torch.rand(words_size(self.model, part.batches[batch]), generator=generator)
                    gradient = at_the_head(self.model, self.stack, part, batch, drawn_BL)
                else:
                    gradient = torch.randint(0, 2, hidden.shape, generator=generator).mul_(2).sub_(1).to(hidden)
                gradients.append(self.streams.store.keep(gradient))
                self.tally.head(part.sizes[batch])
        return gradients

    def _back(
        self,
        part: Streams,
        kept: list[_Entered],
        gradients: list[Tensor],
        found: LossWeights,
        numbers: Sequence[int] | None,
    ) -> None:
        """Through all blocks, the last first; ``numbers`` of the batches of ``part``."""
        behind = LeftBehind(), HandedOn()
        for block in reversed(self.stack.blocks):
            kept.pop().restore(part, block)
            if self.residual:
                sum_EE = second_moment(gradients, part.device, found.residual.get(block.name))
                found.residual[block.name] = self.streams.store.keep(sum_EE)
            with self.weights.on(block, part.device):
                through(block, part, gradients, found, behind, numbers)
            self.tally.back(block, part)
