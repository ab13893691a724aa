"""How far the words of a pruned model are from those of the dense one: what the last block is tuned by.

In front of other blocks the loss is known to second order, as a mean over tokens. Behind the last block there is the
head alone, so that the loss itself can be had: the divergence KL(p || q) of Hinton et al. (arXiv 1503.02531), p what
the dense model predicts and q what the pruned one does.

Shapes: B sequences, L tokens in a sequence, E hidden size, T positions that are looked at, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from optima.calibration.head import head_alone, logits_of
from optima.calibration.places import head_device, positions_at_once
from optima.calibration.probe import forward
from optima.calibration.streams import Look, Streams
from optima.data.batches import Batch, some_of, words_alone
from optima.device import differentiable, forward_replaced
from optima.models.reading import in_slices
from optima.models.stacks import Block, Stack
from optima.models.weights import Weights

# Of each sequence so many positions are looked at in an epoch, others in the next: a vocabulary is often larger than a
# block.
POSITIONS = 128
# Copies of float32 logits in a step: both models', their logarithms, what autograd keeps.
WORDS_COPIES = 6


def looked_at(model: nn.Module, length: int) -> int:
    """Positions of a sequence whose words an epoch looks at; all, if the model tells no slices of its words."""
    return min(length, POSITIONS) if in_slices(model) else length


@dataclass(frozen=True)
class Words:
    """Who has the head that reads a stack.

    Attributes:
        model: the whole model.
        stack: whose last block the head reads.
        weights: brings the weights outside the blocks.
    """

    model: PreTrainedModel
    stack: Stack
    weights: Weights

    def read(self, block: Block) -> bool:
        """Whether ``block`` is what the head reads."""
        return block is self.stack.blocks[-1]

    def given(self, streams: Streams) -> Streams:
        """The same, where all that the model is given are words: no block runs for the head."""
        return replace(streams, batches=[words_alone(self.model, batch) for batch in streams.batches])

    def place(self, streams: Streams, beside: int) -> tuple[torch.device, str]:
        """Where the head runs, and what a report must tell of it; ``beside``: bytes that tuning takes on the device."""
        tokens = max((samples * looked_at(self.model, length) for samples, length in streams.sizes), default=1)
        return head_device(self.model, self.stack, streams.device, tokens, WORDS_COPIES, beside)

    @contextmanager
    def error(self, streams: Streams, place: torch.device) -> Iterator[WordsError]:
        """The error of the last block, which is on its device, for what enters it; inside, the head is at ``place``."""
        block = self.stack.blocks[-1].module
        own = block.forward  # a block of another device would be brought there for each call
        with self.weights.outside(place), forward_replaced(block, own), differentiable(self.model):
            yield WordsError(self.model, self.stack, streams)


@dataclass(frozen=True)
class WordsError:
    """The mean divergence of the words that a pruned model predicts from those of the dense model, in nats."""

    model: PreTrainedModel
    stack: Stack
    streams: Streams

    def on(self, device: torch.device) -> WordsError:
        """See ``tuning.Cost``: the head stays where it is."""
        return self

    def gradient_scale(self, cost: float, tokens: int) -> float:
        """See ``tuning.Cost``: the gradient at a token's logits is then near one, or more, as not all are looked at."""
        return 2.0 ** round(math.log2(tokens))

    def __call__(self, found: Tensor, target: Tensor, look: Look) -> Tensor:
        """The mean over the positions that are looked at, of what the pruned and the dense block make of a piece.

        Args:
            found, target: hidden states, in the layout of ``Streams.hidden``.
            look: whose they are; another ``turn`` looks at other positions.
        """
        home, fixed = next(self.model.parameters()).device, found.detach()
        leaf, target = fixed.to(home, copy=True).requires_grad_(found.requires_grad), target.to(home)
        total, tokens, gradient = 0.0, 0, torch.zeros_like(fixed, dtype=torch.float32)
        given = some_of(self.streams.batches[look.batch], look.part, look.samples)
        for batch, options in self._slices(given, look):
            with torch.no_grad():
                dense_TV = self._log_words(target, batch, options)
            words_TV = self._log_words(leaf, batch, options)
            lost = torch.nn.functional.kl_div(words_TV, dense_TV, reduction="sum", log_target=True)
            if found.requires_grad:
                gradient += torch.autograd.grad(lost, leaf)[0].to(gradient)
            total, tokens = total + float(lost.detach()), tokens + len(words_TV)
        # A number of this gradient: the head's own graph is gone by then, slice by slice. Equal words round below 0.
        return max(total, 0.0) / tokens + ((found - fixed).float() * gradient).sum() / tokens

    def _slices(self, given: Batch, look: Look) -> Iterator[tuple[Batch, dict[str, Tensor]]]:
        """What the model is given for some positions at a time; for all, if it tells no slices of its words."""
        if not in_slices(self.model):
            yield given, {}
            return
        samples, length = look.part.stop - look.part.start, self.streams.sizes[look.batch][1]
        stride = -(-length // POSITIONS)
        every = torch.arange(look.turn % stride, length, stride)
        for at in every.split(positions_at_once(self.model, samples)):
            yield given, {"logits_to_keep": at}

    def _log_words(self, hidden: Tensor, given: Batch, options: dict[str, Tensor]) -> Tensor:
        """Logarithms of the probabilities of words behind ``hidden``, (T, V)."""
        home = hidden.device
        options = {name: at.to(home) for name, at in options.items()}
        with head_alone(self.model, self.stack, self.streams, hidden):
            logits = logits_of(forward(self.model, given, **options))
        # A bias of -inf forbids words to both models: no difference, not infinity less infinity.
        return logits.flatten(0, -2).float().log_softmax(dim=-1).clamp_min(torch.finfo(torch.float32).min)
