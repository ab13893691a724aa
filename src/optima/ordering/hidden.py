"""The channels of the hidden states, which every block reads and writes, and so do the embedding, norms and the head.

Shapes: O outputs, D inputs, E hidden size.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from optima.models.experts import experts_of
from optima.models.stacks import Block, Stack
from optima.ordering.channels import DOWN, OUT, Channels, Place

# Norms inside an attention, whose channels are those of its heads even if there are as many.
OF_HEADS = re.compile(r"(.*\.)?(q|k|v|query|key|value)_?(layer)?_?norm\.(weight|bias)")


def why_not_hidden(model: PreTrainedModel, stacks: list[Stack]) -> str:
    """Why the hidden channels of a model must stay where they are; empty if they may be tried elsewhere."""
    config = model.config
    if len(stacks) > 1:
        return "an encoder and a decoder share them"
    if config.get_text_config() is not config:
        return "not only words become hidden states here"
    if model.get_output_embeddings() is None:
        return "without a head that predicts words they are what the model returns"
    return ""


def hidden_channels(model: PreTrainedModel, stack: Stack, size: int) -> Channels | str:
    """All ``size`` of them, or why they must stay where they are."""
    places: list[Place] = []
    readers: list[str] = []
    inside: set[str] = set()
    for block in stack.blocks:
        names = {f"{block.name}.{name}" for name, _ in block.module.named_parameters()}
        inside |= names
        for name in sorted(names - set(_linear_parameters(block))):
            if OF_HEADS.fullmatch(name):
                continue
            counted = _counted(name, model.get_parameter(name), size)
            if len(counted) > 1:
                return f"{name} has {len(counted)} dimensions of their number"
            places += counted
        places += _of_linears(block, size)
        readers += [
            linear.name
            for linear in (*block.linears, *block.left)
            if not _writes(linear.name.removeprefix(f"{block.name}.")) and linear.shape[1] == size
        ]
    for name, parameter in model.named_parameters():
        if name not in inside:
            counted = _counted(name, parameter, size)
            if len(counted) > 1:
                return f"{name} has {len(counted)} dimensions of their number"
            places += counted
    return Channels("hidden", "hidden states", 1, size, tuple(readers), ((0,),), tuple(places))


def _counted(name: str, parameter: Tensor, size: int) -> list[Place]:
    """Wherever as many are counted."""
    return [Place(name, dim) for dim, count in enumerate(parameter.shape) if count == size]


def _writes(name: str) -> bool:
    """Whether a linear of this name inside a block, or an expert, hands its outputs on to the hidden states."""
    within = re.sub(r"\.\d+$", "", name)  # of an expert
    return bool(DOWN.fullmatch(within) or OUT.fullmatch(within))


def _linear_parameters(block: Block) -> Iterator[str]:
    """Full names of all parameters of linears."""
    for name, module in block.module.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)):
            yield from (f"{block.name}.{name}.{own}" for own, _ in module.named_parameters(recurse=False))
    for experts in experts_of(block.module, block.name):
        yield from (f"{experts.name}.{own}" for own, _ in experts.module.named_parameters(recurse=False))


def _of_linears(block: Block, size: int) -> Iterator[Place]:
    for name, module in block.module.named_modules():
        if not isinstance(module, (nn.Linear, Conv1D)):
            continue
        full, transposed = f"{block.name}.{name}", isinstance(module, Conv1D)
        outputs, inputs = reversed(module.weight.shape) if transposed else module.weight.shape
        if _writes(name):
            if outputs == size:
                yield Place(f"{full}.weight", int(transposed))
                if module.bias is not None:
                    yield Place(f"{full}.bias", 0)
        elif inputs == size:
            yield Place(f"{full}.weight", 1 - int(transposed))
    for experts in experts_of(block.module, block.name):
        *ups, down = experts.transposed
        for up in ups:
            yield Place(f"{experts.name}.{up}", 1 if experts.transposed[up] else 2)
        yield Place(f"{experts.name}.{down}", 2 if experts.transposed[down] else 1)
        known = dict(experts.module.named_parameters(recurse=False))
        if (bias := f"{down}_bias") in known and known[bias].shape[1:] == (size,):
            yield Place(f"{experts.name}.{bias}", 1)
