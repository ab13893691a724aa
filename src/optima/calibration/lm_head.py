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

from optima.calibration.activations import Activations, Look
from optima.calibration.batch_size import rows_of
from optima.calibration.probe import forward, with_hidden
from optima.data.batches import Batch, indivisible, some_of, words_alone
from optima.device import backward_explained, card_memory, describe_memory, differentiable, forward_replaced, once
from optima.errors import NotDifferentiableError
from optima.models.blocks import Block, Stack, count_outside, find_stacks
from optima.models.inspect import head_of, in_slices, is_encoder_decoder
from optima.models.offload import MAIN, Weights

# Float32 logits of a slice in memory at once, of which a softmax makes copies.
LOGITS_BYTES = 256 * 2**20
# Copies of them at a time: logits, their softmax, the gradient, the model's own dtype; and in tuning: both models',
# their logarithms, what autograd keeps.
LOGITS_COPIES, KL_COPIES = 4, 6
# Of each sequence so many positions are compared in an epoch, others in the next: a vocabulary is often larger than a
# block.
POSITIONS = 128
# Tokens whose probabilities are added up before a label is drawn among them.
CHUNK = 512


def sliceable(model: nn.Module) -> bool:
    """Whether the model can be asked for the logits of some positions, and runs no encoder for each slice."""
    return in_slices(model) and not is_encoder_decoder(model)


def logits_bytes(model: PreTrainedModel, tokens: int, copies: int = LOGITS_COPIES) -> int:
    """Most bytes of the logits at a time, and their copies, of batches of so many tokens."""
    if sliceable(model) or head_of(model) is None:
        return copies * LOGITS_BYTES
    return copies * max(4 * _vocabulary(model) * tokens, LOGITS_BYTES)


def positions_of_slices(model: nn.Module, at_L: Tensor, samples: int) -> Sequence[Tensor]:
    """Positions of ``samples`` sequences, split so that float32 logits of a slice take ``LOGITS_BYTES`` at most."""
    slices: Sequence[Tensor] = at_L.split(max(LOGITS_BYTES // (4 * _vocabulary(model) * samples), 1))
    return slices


def _vocabulary(model: Any) -> int:
    return int(model.config.get_text_config().vocab_size)


def looked_at(model: nn.Module, length: int) -> int:
    """Positions of a sequence whose logits an epoch compares; all, if the model cannot slice its logits."""
    return min(length, POSITIONS) if sliceable(model) else length


def head_device(
    model: PreTrainedModel,
    stack: Stack,
    device: torch.device,
    tokens: int,
    copies: int = LOGITS_COPIES,
    others: int = 0,
) -> tuple[torch.device, str]:
    """Where the head runs, if blocks run on ``device``, and a note for the report; see ``Weights.outside``.

    ``tokens``: in the largest batch. ``copies``: of their logits. ``others``: bytes of what else will be on the device.
    """
    there = device.type in ("cpu", next(model.parameters()).device.type)  # a model in memory may live on the device
    if there or head_of(model) is None:
        return MAIN, ""
    if stack.part == "encoder":
        return MAIN, "the encoder's gradients ran through its decoder on the CPU, with all its weights in memory"
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = torch.cuda.mem_get_info(device)[0] + unused
    if _outside_bytes(model) + logits_bytes(model, tokens, copies) + others <= free:
        return device, ""
    return MAIN, f"the head ran on the CPU: {describe_memory(device)} had no room for the weights outside the blocks"


def embedding_device(model: PreTrainedModel, device: torch.device, batches: Sequence[Batch]) -> torch.device:
    """Where the model runs while the inputs of its blocks are captured, if these run on ``device``.

    There, for kernels of some models run nowhere else. But in main memory if the weights outside the blocks are more
    than half of a card, or batches are not of token ids alone: the probe holds the inputs of all linears.
    It is the same on all ranks, and for a run that is resumed.
    """
    first = next(model.parameters())
    inside = {id(each) for stack in find_stacks(model) for block in stack.blocks for each in block.module.parameters()}
    if device.type in ("cpu", first.device.type) or id(first) in inside:  # inputs go to where the first parameter is
        return MAIN
    if not all(isinstance(batch, Tensor) for batch in batches):
        return MAIN
    fits = 2 * _outside_bytes(model) <= card_memory(device)
    return device if fits else MAIN


def _outside_bytes(model: PreTrainedModel) -> int:
    blocks = [block for each in find_stacks(model) for block in each.blocks]
    return count_outside(model, blocks) * model.dtype.itemsize


@contextmanager
def head_alone(model: PreTrainedModel, stack: Stack, acts: Activations, leaf: Tensor) -> Iterator[None]:
    """No block runs inside, and the last one returns ``leaf``."""
    with ExitStack() as replaced:
        for block in stack.blocks:
            returned = leaf if block is stack.blocks[-1] else None
            passed_on = partial(_pass_on, returned, acts.probe.outputs[block.index])
            replaced.enter_context(forward_replaced(block.module, passed_on))
        yield


def _pass_on(returned: Tensor | None, like: Any, *args: Any, **kwargs: Any) -> Any:
    """A block's forward that returns ``returned``, or its input, in the form of ``like``."""
    if returned is None:
        returned = args[0] if args else kwargs["hidden_states"]
    return with_hidden(like, returned)


def logits_of(returned: Any) -> Tensor:
    """A model for pretraining returns those of another head, too."""
    for name in ("logits", "prediction_logits"):
        if isinstance(found := getattr(returned, name, None), Tensor):
            return found
    raise NotDifferentiableError("it returns no logits")


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
    if stack.part == "whole":  # no vision tower runs, nor are labels compared to a slice
        inputs = words_alone(model, inputs)
    whole = indivisible(inputs, samples) or acts.indivisible(stack.blocks[-1], batch)
    most = 1 if stack.part == "encoder" and not whole else samples  # autograd keeps a whole decoder of each sample

    def back(part: slice) -> Tensor:
        rows = some_of(inputs, part, samples)
        leaf = rows_of(acts.hidden[batch], part, samples).to(home, copy=True).requires_grad_(True)
        every_L = torch.arange(length)
        with head_alone(model, stack, acts, leaf):
            for at_C in positions_of_slices(model, every_L, most) if sliceable(model) else (every_L,):
                options = {"logits_to_keep": at_C.to(home)} if sliceable(model) else {}
                logits_TV = logits_of(forward(model, rows, **options)).flatten(0, -2)
                if not logits_TV.requires_grad:
                    raise NotDifferentiableError("its logits do not depend on its last block by a gradient")
                gradient_TV = label_gradient(logits_TV.detach(), drawn_BL[part][:, at_C].flatten().to(home))
                with backward_explained("its head"):
                    logits_TV.backward(gradient_TV)
        assert leaf.grad is not None
        return leaf.grad.cpu()

    parts = acts.batch_size.map(samples, back, whole, most)
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

    def read(self, block: Block) -> bool:
        """Whether ``block`` is what the head reads."""
        return block is self.stack.blocks[-1]

    def tuning_cost(self, length: int) -> float:
        """Cost of tuning the last block relative to another block, by the weights that ``length`` tokens meet."""
        module = head_of(self.model)
        head = 0 if module is None else sum(each.numel() for each in module.parameters())
        block = sum(each.numel() for each in self.stack.blocks[-1].module.parameters())
        return 1.0 + head * looked_at(self.model, length) / (max(block, 1) * length)

    def place(self, acts: Activations, others: int) -> tuple[torch.device, str]:
        """Where the head runs, and a note for the report; ``others``: bytes that tuning takes on the device."""
        tokens = max((samples * looked_at(self.model, length) for samples, length in acts.sizes), default=1)
        return head_device(self.model, self.stack, acts.device, tokens, KL_COPIES, others)

    @contextmanager
    def error(self, acts: Activations, place: torch.device) -> Iterator[LogitsError]:
        """The KL error of the last block, which is on its device; inside, the head is at ``place``."""
        block = self.stack.blocks[-1].module
        own = block.forward  # a block of another device would be brought there for each call
        with self.weights.outside(place), forward_replaced(block, own), differentiable(self.model):
            yield LogitsError(self.model, self.stack, acts)


@dataclass(frozen=True)
class LogitsError:
    """The mean KL divergence of a pruned model's logits from those of the dense model, in nats a token."""

    model: PreTrainedModel
    stack: Stack
    acts: Activations

    def on(self, device: torch.device) -> LogitsError:
        """See ``tune.Cost``: the head stays where it is."""
        return self

    def gradient_scale(self, cost: float, tokens: int) -> float:
        """See ``tune.Cost``: the gradient at a token's logits is then near one, or more, as not all are compared."""
        return 2.0 ** round(math.log2(tokens))

    def __call__(self, found: Tensor, target: Tensor, look: Look) -> Tensor:
        """The mean over the positions of this epoch.

        Args:
            found, target: outputs of the pruned and the dense block, in the layout of ``Activations.hidden``.
            look: whose they are; another ``turn`` compares other positions.
        """
        home, fixed = next(self.model.parameters()).device, found.detach()
        leaf, target = fixed.to(home, copy=True).requires_grad_(found.requires_grad), target.to(home)
        total, tokens, gradient = 0.0, 0, torch.zeros_like(fixed, dtype=torch.float32)
        rows = some_of(words_alone(self.model, self.acts.batches[look.batch]), look.part, look.samples)
        for options in self._slices(look, home):
            with torch.no_grad():
                log_p_TV = self._log_probabilities(target, rows, options)
            log_q_TV = self._log_probabilities(leaf, rows, options)
            lost = nn.functional.kl_div(log_q_TV, log_p_TV, reduction="sum", log_target=True)
            if found.requires_grad:
                gradient += torch.autograd.grad(lost, leaf)[0].to(gradient)
            total, tokens = total + float(lost.detach()), tokens + len(log_q_TV)
        # A number of this gradient: the head's own graph is gone by then, slice by slice. Equal logits round below 0.
        return max(total, 0.0) / tokens + ((found - fixed).float() * gradient).sum() / tokens

    def _slices(self, look: Look, home: torch.device) -> list[dict[str, Tensor]]:
        """Options of the model for some positions at a time; for all, if it cannot slice its logits."""
        if not sliceable(self.model):
            return [{}]
        samples, length = look.part.stop - look.part.start, self.acts.sizes[look.batch][1]
        stride = -(-length // POSITIONS)
        every = torch.arange(look.turn % stride, length, stride, device=home)
        return [{"logits_to_keep": at} for at in positions_of_slices(self.model, every, samples)]

    def _log_probabilities(self, hidden: Tensor, rows: Batch, options: dict[str, Tensor]) -> Tensor:
        """Log-probabilities of the logits of ``hidden``, (T, V)."""
        with head_alone(self.model, self.stack, self.acts, hidden):
            logits = logits_of(forward(self.model, rows, **options))
        # A bias of -inf forbids tokens to both models: no difference, not infinity less infinity.
        return logits.flatten(0, -2).float().log_softmax(dim=-1).clamp_min(torch.finfo(torch.float32).min)


@contextmanager
def sliced_logits(model: PreTrainedModel, tokens_BL: Tensor) -> Iterator[Callable[[Tensor], Tensor]]:
    """A function inside the context: positions (C,) -> logits_BCV of a causal model.

    The model's own forward runs for every slice, so that scaling and softcapping of logits are its own. Its decoder
    runs in the first of these passes, and the others reuse its output. A model without ``logits_to_keep`` computes all
    logits at once.
    """
    decoder: Any = model.get_decoder()
    if not sliceable(model) or decoder is model:
        logits_BLV: Tensor = plain_forward(model, tokens_BL).logits
        yield lambda at_C: logits_BLV[:, at_C]
        return
    with forward_replaced(decoder, once(decoder.forward)):
        yield lambda at_C: plain_forward(model, tokens_BL, logits_to_keep=at_C).logits


def plain_forward(model: PreTrainedModel, tokens_BL: Tensor, **options: Any) -> Any:
    """The model's outputs, without a cache of keys and values."""
    if "use_cache" in inspect.signature(model.forward).parameters:
        options["use_cache"] = False
    return model(tokens_BL, **options)
