"""How much the model's loss feels each token and each output of a linear: one backward pass over the dense model.

To second order the loss grows by 1/2 sum_o sum_t g_to^2 (x_t . (v_o - w_o))^2, g the gradient at output o of a linear
on token t, with labels drawn from the model itself (the true Fisher: Martens, JMLR 2020, section 5). The rank-one fit
g_to^2 ~ r_o s_t puts token weights s_t into the hessian, which rows go on sharing; r_o lets rows compete in units of
the loss (docs/mathematics.md). Gradients are heavy-tailed, so both are used at a root.

The sweep goes from the last block to the first, the dense inputs of every block kept, one block on the device.

Shapes: B sequences in a batch, L tokens in a sequence, T = B L, O outputs, C positions of a slice, V vocabulary,
E hidden size.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from optima.calibration.probe import hidden_of
from optima.calibration.streams import Streams
from optima.device import forward_replaced
from optima.errors import ModelError
from optima.models.stacks import Block, Stack
from optima.models.weights import Resident

# Float32 logits of a slice in memory at once, of which a softmax makes copies.
LOGITS_BYTES = 64 * 2**20
# Token weights are s^POWER, row weights r^POWER: the square is the second-order loss, too heavy-tailed to be trusted.
POWER = 0.5


@dataclass
class LossWeights:
    """Mean squares of gradients at the outputs of linears, untempered.

    Attributes:
        tokens: by the name of a group's first linear: one (B, L) tensor a batch, summed over the outputs of the group.
        rows: by the name of a linear: the mean over tokens of g_to^2, (O,).
    """

    tokens: dict[str, list[Tensor]] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)

    def of_tokens(self, name: str, batch: int) -> Tensor | None:
        """Tempered weights of a batch's tokens, (T,), for the group whose first linear is ``name``; their mean is 1."""
        if name not in self.tokens:
            return None
        mean = sum(float(own.pow(POWER).sum()) for own in self.tokens[name])
        count = sum(own.numel() for own in self.tokens[name])
        return self.tokens[name][batch].pow(POWER).flatten() * (count / mean) if mean else None

    def of_rows(self, name: str) -> Tensor | None:
        """Tempered weights of a linear's rows, (O,), of mean 1."""
        if name not in self.rows:
            return None
        weight_O = self.rows[name].pow(POWER)
        mean = float(weight_O.mean())
        return weight_O / mean if mean else None


def loss_weights(
    model: PreTrainedModel, stack: Stack, streams: Streams, batches: Sequence[Tensor], device: torch.device, seed: int
) -> LossWeights:
    """Sweep the dense model.

    Args:
        model: a causal language model.
        stack: all of whose blocks are needed.
        streams: what enters the first block; used up.
        batches: the tokens, (B, L) int64 each.
        device: where blocks run.
        seed: of the labels.

    Raises:
        ModelError: if the model gives no logits, or blocks behind the last one with linears would be needed.
    """
    if stack.needed < len(stack.blocks):
        raise ModelError("objective loss needs every block of the model: let targets match linears of the last one")
    weights, kept = Resident(), []
    with torch.no_grad():
        for block in stack.blocks:
            kept.append(list(streams.hidden))
            with weights.on(block, device):
                streams.advance(block, device)
    generator = torch.Generator(device="cpu").manual_seed(seed)
    gradients = [
        _at_the_end(model, stack, tokens_BL, hidden, generator)
        for tokens_BL, hidden in zip(batches, streams.hidden, strict=True)
    ]
    found = LossWeights()
    for block in reversed(stack.blocks):
        streams.hidden = kept.pop()
        with weights.on(block, device):
            _through(block, streams, gradients, device, found)
    return found


def _at_the_end(
    model: PreTrainedModel, stack: Stack, tokens_BL: Tensor, hidden: Tensor, generator: torch.Generator
) -> Tensor:
    """The gradient of -log p(label) at the last block's output, labels drawn from p, sequence by sequence."""
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        raise ModelError(f"objective loss needs a causal language model of the library, not {type(model).__name__}")
    home = next(model.parameters()).device
    result = torch.zeros_like(hidden)
    vocabulary = int(model.config.get_text_config().vocab_size)
    step = max(LOGITS_BYTES // (4 * vocabulary), 1)
    for sequence, tokens_L in enumerate(tokens_BL):
        leaf = hidden[sequence : sequence + 1].to(home).requires_grad_(True)
        with torch.enable_grad(), ExitStack() as replaced:
            for block in stack.blocks:
                replaced.enter_context(forward_replaced(block.module, _returning(leaf, stack, block)))
            for start in range(0, len(tokens_L), step):
                positions = torch.arange(start, min(start + step, len(tokens_L)), device=home)
                output = model(input_ids=tokens_L[None].to(home), use_cache=False, logits_to_keep=positions)
                log_CV = output.logits[0].float().log_softmax(dim=-1)
                noise_CV = torch.empty(log_CV.shape).exponential_(generator=generator).to(home)
                label_C1 = (log_CV.detach() - noise_CV.log()).argmax(dim=-1, keepdim=True)  # Gumbel's way to draw
                (-log_CV.gather(1, label_C1).sum()).backward()
        assert leaf.grad is not None
        result[sequence] = leaf.grad[0].cpu()
    return result


def _returning(leaf: Tensor, stack: Stack, block: Block) -> Callable[..., Any]:
    """A block's forward that hands on what it is given; the last returns ``leaf``."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        return leaf if block is stack.blocks[-1] else (args[0] if args else kwargs["hidden_states"])

    return forward


def _through(block: Block, streams: Streams, gradients: list[Tensor], device: torch.device, found: LossWeights) -> None:
    """Carry ``gradients`` from the block's outputs to its inputs, and note them at its linears."""
    total = sum(samples * length for samples, length in streams.sizes)
    leaders = {linear.name: group[0].name for group in streams.groups(block) for linear in group}
    required = [(parameter, parameter.requires_grad) for parameter in block.module.parameters()]
    block.module.requires_grad_(False)

    def note(name: str, batch: int) -> Callable[[Tensor], None]:
        def see(gradient: Tensor) -> None:
            square = gradient.detach().float().square()
            rows = square.flatten(0, -2).sum(dim=0) / total
            found.rows[name] = found.rows[name] + rows if name in found.rows else rows
            if gradient.shape[:-1] == streams.sizes[batch]:
                own = found.tokens.setdefault(leaders[name], [torch.zeros(size) for size in streams.sizes])
                own[batch] += square.sum(dim=-1).cpu()

        return see

    for batch, gradient in enumerate(gradients):
        streams.hidden[batch] = streams.hidden[batch].to(device).requires_grad_(True)
        with torch.enable_grad(), ExitStack() as hooks:
            for linear in block.linears:
                hooks.callback(linear.watch(note(linear.name, batch)).remove)
            output = hidden_of(streams.run(block, batch, device))
            output.backward(gradient.to(device))
        grad = streams.hidden[batch].grad
        assert grad is not None
        gradients[batch] = grad.cpu()
        streams.hidden[batch] = streams.hidden[batch].detach()
    for parameter, before in required:
        parameter.requires_grad_(before)
