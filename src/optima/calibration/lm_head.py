"""The cost of the last block: the KL divergence of two models' logits, by which it is tuned.

Logit distillation (Hinton et al., arXiv 1503.02531): KL(p || q), p of the dense model and q of the pruned one.

Shapes: L tokens in a sequence, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from optima.calibration.activations import Activations, Microbatch
from optima.models.blocks import Stack
from optima.models.forward import differentiable, forward_replaced
from optima.models.logits import sliced_head
from optima.models.offload import Weights, outside_device

# Positions of each sequence that an epoch compares, the next one others: a vocabulary is often larger than a block.
POSITIONS = 128


@dataclass(frozen=True)
class LmHead:
    """The LM head that reads a stack.

    Attributes:
        model: the whole model.
        stack: whose last block the head reads.
        weights: brings the weights outside the blocks.
    """

    model: PreTrainedModel
    stack: Stack
    weights: Weights

    @contextmanager
    def error(self, acts: Activations) -> Iterator[LogitsError]:
        """The KL error of the last block, which is on its device."""
        block = self.stack.blocks[-1].module
        own = block.forward  # a block of another device would be brought there for each call
        place = outside_device(self.model, acts.device)
        with self.weights.outside(place), forward_replaced(block, own), differentiable(self.model):
            yield LogitsError(self.model, self.stack, acts)


@dataclass(frozen=True)
class LogitsError:
    """The mean KL divergence of a pruned model's logits from those of the dense model, in nats a token."""

    model: PreTrainedModel
    stack: Stack
    acts: Activations

    def gradient_scale(self, cost: float, tokens: int) -> float:
        """What brings the gradient at a token's logits near one, or more, as not all are compared: a power of two."""
        return 2.0 ** round(math.log2(tokens))

    def __call__(self, found: Tensor, target: Tensor, microbatch: Microbatch, epoch: int = 0) -> Tensor:
        """The mean over some positions of each sequence; another ``epoch`` compares others.

        Args:
            found, target: outputs of the pruned and the dense block, in the layout of ``Activations.hidden``.
            microbatch: the sequences of ``found`` and ``target``.
            epoch: of the tuning.
        """
        home, fixed, (batch, rows, _) = next(self.model.parameters()).device, found.detach(), microbatch
        leaf, target = fixed.to(home, copy=True).requires_grad_(found.requires_grad), target.to(home)
        total, tokens = torch.zeros((), dtype=torch.float64, device=home), 0
        gradient = torch.zeros_like(fixed, dtype=torch.float32)
        stride = -(-self.acts.length // POSITIONS)
        at_L = torch.arange(epoch % stride, self.acts.length, stride)
        logits = partial(sliced_head, self.model, self.stack, self.acts.probe.outputs)
        slices = (self.acts.batches[batch][rows], at_L, rows.stop - rows.start)
        for (_, p_TV), (_, q_TV) in zip(logits(target, *slices), logits(leaf, *slices), strict=True):
            log_p_TV, log_q_TV = _log_probabilities(p_TV), _log_probabilities(q_TV)
            lost = nn.functional.kl_div(log_q_TV, log_p_TV, reduction="sum", log_target=True)
            if found.requires_grad:
                gradient += torch.autograd.grad(lost, leaf)[0].to(gradient)
            total += lost.detach()
            tokens += len(log_q_TV)
        # A number of this gradient: the head's own graph is gone by then, slice by slice. Equal logits round below 0.
        mean = (total.clamp_min(0.0) / tokens).to(fixed.device, torch.float32)
        return mean + ((found - fixed).float() * gradient).sum() / tokens


def _log_probabilities(logits_TV: Tensor) -> Tensor:
    # A bias of -inf forbids tokens to both models: no difference, not infinity less infinity.
    return logits_TV.float().log_softmax(dim=-1).clamp_min(torch.finfo(torch.float32).min)
