"""A model with random weights that takes little more memory than one block: blocks of one structure share theirs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from optima.models.stacks import Block


def alike(blocks: Sequence[Block]) -> list[list[Block]]:
    """The blocks by structure: the classes of their modules, and the names, shapes and dtypes of their tensors."""
    found: dict[tuple[object, ...], list[Block]] = {}
    for block in blocks:
        kinds = tuple((name, type(module)) for name, module in block.module.named_modules())
        tensors = tuple((name, each.shape, each.dtype) for name, each in block.module.state_dict().items())
        chosen = tuple(linear.name.removeprefix(block.name) for linear in block.linears)
        found.setdefault((kinds, tensors, chosen), []).append(block)
    return list(found.values())


def fill(model: PreTrainedModel, structures: Sequence[Sequence[Block]], dtype: torch.dtype) -> None:
    """Give a model on the meta device weights, by the library's own initialisation.

    Args:
        model: its skeleton.
        structures: its blocks by structure; those of one share all tensors.
        dtype: of parameters that are floating-point.
    """
    others = [(blocks[0].module, block.module) for blocks in structures for block in blocks[1:]]
    shared = {inner for _, other in others for inner in other.modules()}
    made: dict[int, nn.Parameter] = {}  # tied ones stay tied
    for module in model.modules():
        module._is_hf_initialized = module in shared  # type: ignore[assignment]  # or there would be work for each
        if module not in shared:
            _fill(module, made, dtype)
    for first, other in others:
        for one, same in zip(first.modules(), other.modules(), strict=True):
            same._parameters.update(one._parameters)
            same._buffers.update(one._buffers)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model.initialize_weights()


def _fill(module: nn.Module, made: dict[int, nn.Parameter], dtype: torch.dtype) -> None:
    """Zeros on the CPU for what is on the meta device: what no initialisation knows is no garbage."""
    for name, parameter in module._parameters.items():
        if parameter is not None and parameter.is_meta:
            if id(parameter) not in made:
                kind = dtype if parameter.is_floating_point() else parameter.dtype
                made[id(parameter)] = nn.Parameter(torch.zeros(parameter.shape, dtype=kind), parameter.requires_grad)
            module._parameters[name] = made[id(parameter)]
    for name, buffer in module._buffers.items():
        if buffer is not None and buffer.is_meta:
            module._buffers[name] = torch.zeros_like(buffer, device="cpu")
