"""The LM head: where it runs, its logits in slices of positions, and the KL divergence of two models' logits.

Vocabularies have up to 262k tokens, so logits are computed for some positions at a time: for the gradient pass
(``at_the_head``), for tuning the last block by logit distillation (``LogitsError``: KL(p || q), p of the dense model
and q of the pruned one; Hinton et al., arXiv 1503.02531), and for evaluation (``sliced_logits``).

Shapes: B sequences in a batch, L tokens in a sequence, T tokens, V vocabulary, E hidden size, C positions of a slice or
tokens of a chunk, K chunks.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from optima.calibration.activations import Activations, Microbatch, with_hidden
from optima.device import backward_explained, card_memory, differentiable, forward_replaced, once
from optima.errors import NotDifferentiableError
from optima.models.blocks import Stack, count_outside, find_stacks
from optima.models.inputs import forward, rows_of
from optima.models.inspect import is_encoder_decoder
from optima.models.offload import MAIN, Weights

LOGITS_BYTES = 256 * 2**20  # float32 logits of a slice in memory at once, of which a softmax makes copies
# Positions of each sequence that an epoch compares, the next one others: a vocabulary is often larger than a block.
POSITIONS = 128
CHUNK = 512  # tokens whose probabilities are added up before a label is drawn among them


def sliceable(model: nn.Module) -> bool:
    """Whether the model can be asked for the logits of some positions, and runs no encoder for each slice."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters and not is_encoder_decoder(model)


def positions_of_slices(model: nn.Module, at_L: Tensor, samples: int) -> Sequence[Tensor]:
    """Positions of ``samples`` sequences, split so that float32 logits of a slice take ``LOGITS_BYTES`` at most."""
    config: Any = model.config
    vocabulary = config.get_text_config().vocab_size
    slices: Sequence[Tensor] = at_L.split(max(LOGITS_BYTES // (4 * vocabulary * samples), 1))
    return slices


def outside_device(model: PreTrainedModel, device: torch.device) -> torch.device:
    """Where what is outside the blocks runs, if these run on ``device``; see ``Weights.outside``.

    There, unless it would take more than half of the card. It is the same on all ranks, and for a run that is resumed.
    """
    first = next(model.parameters())  # where inputs go
    blocks = [block for stack in find_stacks(model) for block in stack.blocks]
    inside = any(first is parameter for block in blocks for parameter in block.module.parameters())
    if device.type in ("cpu", first.device.type) or inside:
        return MAIN
    outside = count_outside(model, blocks) * model.dtype.itemsize
    return device if 2 * outside <= card_memory(device) else MAIN


def _sliced_head(
    model: PreTrainedModel, stack: Stack, acts: Activations, hidden: Tensor, batch: Tensor, at_L: Tensor, samples: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Positions (C,), and the logits (T, V) there of ``hidden``, a slice at a time; no block runs.

    All positions at once, if the model cannot slice its logits. ``samples``: of the largest microbatch.
    """
    slices = positions_of_slices(model, at_L, samples) if sliceable(model) else [None]
    for at_C in slices:
        with ExitStack() as replaced:
            for block in stack.blocks:
                output = with_hidden(acts.probe.outputs[block.index], hidden)
                replaced.enter_context(forward_replaced(block.module, lambda *args, output=output, **kwargs: output))
            options = {} if at_C is None else {"logits_to_keep": at_C.to(hidden.device)}
            logits = getattr(forward(model, batch, **options), "logits", None)
        if not isinstance(logits, Tensor):
            raise NotDifferentiableError("it returns no logits")
        yield at_L if at_C is None else at_C, logits.flatten(0, -2)


def at_the_head(model: PreTrainedModel, stack: Stack, acts: Activations, batch: int, drawn_BL: Tensor) -> Tensor:
    """The gradient of -log p(label) at the last block's output, labels drawn from p by uniform numbers.

    Args:
        model: runs where its embedding is; of its own blocks none is called.
        stack: the one that its head reads.
        acts: outputs of its last block.
        batch: number of the batch.
        drawn_BL: uniform in [0, 1), see ``label_gradient``.

    Returns:
        In the layout of ``acts.hidden``, on the CPU.

    Raises:
        NotDifferentiableError: if its logits do not depend on what leaves that block.
    """
    home, inputs = next(model.parameters()).device, acts.batches[batch]
    samples, length = drawn_BL.shape
    # Of an encoder, autograd keeps a whole decoder of each sample.
    most = 1 if stack.part == "encoder" else samples

    def backward(rows: slice) -> Tensor:
        leaf = rows_of(acts.hidden[batch], rows, samples).to(home, copy=True).requires_grad_(True)
        for at_C, logits_TV in _sliced_head(model, stack, acts, leaf, inputs[rows], torch.arange(length), most):
            if not logits_TV.requires_grad:
                raise NotDifferentiableError("its logits do not depend on its last block by a gradient")
            gradient_TV = label_gradient(logits_TV.detach(), drawn_BL[rows][:, at_C].flatten().to(home))
            with backward_explained("its head"):
                logits_TV.backward(gradient_TV)
        assert leaf.grad is not None
        return leaf.grad.cpu()

    parts = acts.batch_size.map(samples, backward, most)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def label_gradient(logits_TV: Tensor, drawn_T: Tensor) -> Tensor:
    """The gradient of -log p(label) at the logits, p less one at a label that is drawn from p.

    Args:
        logits_TV: any float dtype, which the result has too.
        drawn_T: uniform in [0, 1), see ``sampled_tokens``.
    """
    weight_TV = exponentials(logits_TV)
    label_T1, total_T1 = sampled_tokens(weight_TV, drawn_T)
    weight_TV /= total_T1
    weight_TV.scatter_add_(1, label_T1, torch.full_like(label_T1, -1.0, dtype=weight_TV.dtype))
    return weight_TV.to(logits_TV.dtype)


def exponentials(logits_TV: Tensor) -> Tensor:
    """In float32, proportional to the probabilities, the largest 1."""
    weight_TV = logits_TV.float()
    return (weight_TV - weight_TV.amax(dim=1, keepdim=True)).exp_()


def sampled_tokens(weight_TV: Tensor, drawn_T: Tensor) -> tuple[Tensor, Tensor]:
    """Of each position a token, (T, 1), sampled in proportion to the weights, and their sum.

    Args:
        weight_TV: not negative.
        drawn_T: uniform in [0, 1): where in their cumulative sum the token lies. Sums go by chunks, for one over all
            tokens is slow, and in float32 not exact.
    """
    chunk_TKC = nn.functional.pad(weight_TV, (0, -weight_TV.shape[1] % CHUNK)).unflatten(1, (-1, CHUNK))
    chunk_TK = chunk_TKC.sum(dim=2)
    above_TK = chunk_TK.cumsum(dim=1)
    wanted_T1 = drawn_T[:, None] * above_TK[:, -1:]
    chunk_T1 = torch.searchsorted(above_TK, wanted_T1, right=True).clamp_max(above_TK.shape[1] - 1)
    wanted_T1 = wanted_T1 - (above_TK - chunk_TK).gather(1, chunk_T1)
    inner_TC = chunk_TKC.gather(1, chunk_T1[:, :, None].expand(-1, 1, CHUNK))[:, 0].cumsum(dim=1)
    inner_T1 = torch.searchsorted(inner_TC, wanted_T1, right=True).clamp_max(CHUNK - 1)
    return (chunk_T1 * CHUNK + inner_T1).clamp_max(weight_TV.shape[1] - 1), above_TK[:, -1:]


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
            microbatch: whose they are.
            epoch: of the tuning.
        """
        home, fixed, (batch, rows, _) = next(self.model.parameters()).device, found.detach(), microbatch
        leaf, target = fixed.to(home, copy=True).requires_grad_(found.requires_grad), target.to(home)
        total, tokens = torch.zeros((), dtype=torch.float64, device=home), 0
        gradient = torch.zeros_like(fixed, dtype=torch.float32)
        stride = -(-self.acts.length // POSITIONS)
        at_L = torch.arange(epoch % stride, self.acts.length, stride)
        logits = partial(_sliced_head, self.model, self.stack, self.acts)
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


@contextmanager
def sliced_logits(model: PreTrainedModel, tokens_BL: Tensor) -> Iterator[Callable[[Tensor], Tensor]]:
    """A function inside the context: positions (C,) -> logits_BCV of a causal model.

    The model's own forward runs for every slice, so that scaling and softcapping of logits are its own. Its decoder
    runs in the first of these passes, and the others reuse its output. A model without ``logits_to_keep`` computes all
    logits at once.
    """
    decoder: Any = model.get_decoder()
    if not sliceable(model) or decoder is model:
        logits_BLV: Tensor = forward(model, tokens_BL).logits
        yield lambda at_C: logits_BLV[:, at_C]
        return
    with forward_replaced(decoder, once(decoder.forward)):
        yield lambda at_C: forward(model, tokens_BL, logits_to_keep=at_C).logits
