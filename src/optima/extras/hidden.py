"""The channels of the hidden states, which every block reads and writes, and so do the embedding, norms and the head.

Shapes: O outputs, D inputs, E hidden size.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from torch import Tensor
from transformers import PreTrainedModel

from optima.extras.channels import DOWN, OUT, Channels, Place, bias_of, outputs_dim
from optima.models.blocks import Block, Linear, Stack, linears_of
from optima.models.inspect import head_of
from optima.models.moe import FusedExperts, experts_of

# Norms inside an attention, whose channels are those of its heads even if there are as many.
OF_HEADS = re.compile(r"(.*\.)?(q|k|v|query|key|value)_?(layer)?_?norm\.(weight|bias)")


def why_not_hidden(model: PreTrainedModel, stacks: Sequence[Stack]) -> str:
    """Why the hidden channels of a model must stay where they are; empty if they may be tried elsewhere."""
    config = model.config
    if len(stacks) > 1:
        return "an encoder and a decoder share them"
    if config.get_text_config() is not config:
        return "not only words become hidden states here"
    if head_of(model) is None:
        return "without a head that predicts words they are what the model returns"
    return ""


def hidden_channels(model: PreTrainedModel, stack: Stack, size: int) -> Channels | str:
    """All ``size`` of them, or why they must stay where they are."""
    linears = [linear for block in stack.blocks for linear in linears_of(block.module, block.name)]
    places = [place for block in stack.blocks for place in _of_linears(block, size)]
    parameters = dict(model.named_parameters())
    if any(place.name not in parameters for place in places):
        return "blocks share some of their weights"
    inside = tuple(f"{block.name}." for block in stack.blocks)
    for name, buffer in model.named_buffers():
        if not name.startswith(inside) and buffer.is_floating_point() and buffer.shape[-1:] == (size,):
            return f"{name} is a table of their number, and no parameter"
    known = {id(parameter) for linear in linears for parameter in _parameters(linear)}
    for name, parameter in parameters.items():
        if id(parameter) not in known and not OF_HEADS.fullmatch(name):
            counted = [Place(name, dim) for dim, count in enumerate(parameter.shape) if count == size]
            if len(counted) > 1:
                return f"{name} has {len(counted)} dimensions of their number"
            places += counted
    readers = tuple(linear.name for linear in linears if not _writes(linear.name) and linear.shape[1] == size)
    return Channels("hidden", "hidden states", 1, size, readers, ((0,),), tuple(places))


def _parameters(linear: Linear) -> Iterable[Tensor]:
    """Weight and biases; of an expert those of all of them."""
    if linear.expert is not None:
        return linear.expert.experts.module.parameters(recurse=False)
    return linear.module.parameters(recurse=False)


def _writes(name: str) -> bool:
    """Whether a linear of this name, or an expert, hands its outputs on to the hidden states."""
    linear = re.sub(r"\.\d+$", "", name)  # of an expert
    return bool(DOWN.fullmatch(linear) or OUT.fullmatch(linear))


def _of_linears(block: Block, size: int) -> Iterator[Place]:
    for linear in linears_of(block.module, block.name):
        if linear.expert is None:
            outputs, inputs = linear.shape
            if not _writes(linear.name):
                if inputs == size:
                    yield Place(f"{linear.name}.weight", 1 - outputs_dim(linear))
            elif outputs == size:
                yield Place(f"{linear.name}.weight", outputs_dim(linear))
                if linear.module.bias is not None:
                    yield Place(f"{linear.name}.bias", 0)
    for experts in experts_of(block.module, block.name):
        yield from _of_experts(experts, size)


def _of_experts(experts: FusedExperts, size: int) -> Iterator[Place]:
    *ups, down = experts.transposed
    dims = {up: 1 if experts.transposed[up] else 2 for up in ups} | {down: 2 if experts.transposed[down] else 1}
    for name, dim in dims.items():
        if experts.parameter(name).shape[dim] == size:  # else they work on fewer, which something else makes
            yield Place(f"{experts.name}.{name}", dim)
    if (bias := bias_of(experts, down, size)) is not None:
        yield Place(bias, 1)
