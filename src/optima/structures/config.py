"""How the configuration says a smaller model. It is tested: it must build blocks of just these shapes and settings."""

from __future__ import annotations

import re
from collections.abc import Collection
from copy import deepcopy
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from optima.errors import ModelError
from optima.models.blocks import Stack
from optima.structures.neurons import find_neurons, smaller_tensors

# What configurations call the number of neurons.
WIDTHS = ("intermediate_size", "ffn_dim", "n_inner", "d_ff", "d_inner", "hidden_dim", "ffn_hidden_size")
PER_LAYER = re.compile(r"layer|block|pattern")  # names of lists with an entry for each block
NUMBERED = ("layer_idx", "layer_id", "layer_index", "training")  # settings that a place in the stack decides


def smaller_config(
    model: PreTrainedModel, stack: Stack, dropped: Collection[int] = (), width: int | None = None
) -> PretrainedConfig:
    """A copy of the configuration without the blocks ``dropped``, with ``width`` neurons in the others.

    Raises:
        ModelError: if it cannot say that.
    """
    config, names = deepcopy(model.config), renamed(stack, dropped)
    text, total = config.get_text_config(), len(stack.blocks)
    if dropped:
        for name, value in vars(text).items():
            if isinstance(value, list) and len(value) == total and PER_LAYER.search(name):
                setattr(text, name, [each for index, each in enumerate(value) if index not in dropped])
        text.num_hidden_layers = len(names)
        modules = dict(skeleton_of(model, config).named_modules())
        for block in stack.blocks:
            own, place = _settings(block.module), names.get(block.name, "")
            other = _settings(modules.get(place)) if place else own
            if differs := sorted(key for key in own.keys() | other.keys() if own.get(key) != other.get(key)):
                raise ModelError(
                    f"the configuration of {type(model).__name__} cannot say which of its blocks stay: {differs[0]} of "
                    f"{block.name} would change in its new place"
                )
    if width is not None:
        for name in _width_names(model, stack):
            setattr(text, name, width)
    expected = _shapes(model, stack, names, width)
    found = {key: tuple(tensor.shape) for key, tensor in skeleton_of(model, config).state_dict().items()}
    for key in sorted(found.keys() | expected.keys()):
        if found.get(key) != expected.get(key):
            raise ModelError(
                f"the configuration of {type(model).__name__} cannot say the smaller model: {key} would be of shape "
                f"{expected.get(key)}, and the configuration makes it {found.get(key)}"
            )
    return config


def renamed(stack: Stack, dropped: Collection[int]) -> dict[str, str]:
    """The new name of each block that stays, by its name in the dense model."""
    kept = [block for block in stack.blocks if block.index not in dropped]
    return {block.name: place.name for block, place in zip(kept, stack.blocks, strict=False)}


def skeleton_of(model: PreTrainedModel, config: PretrainedConfig) -> PreTrainedModel:
    """A model of the same class on the meta device."""
    try:
        with torch.device("meta"):
            small: PreTrainedModel = type(model)(deepcopy(config))
    except ValueError as error:
        name = type(model).__name__
        raise ModelError(f"the configuration of {name} cannot say the smaller model: {error}") from error
    return small


def _settings(module: nn.Module | None) -> dict[str, Any]:
    return {
        f"{name}.{key}": value
        for name, child in (() if module is None else module.named_modules())
        for key, value in vars(child).items()
        if isinstance(value, bool | int | float | str | None) and key not in NUMBERED and not key.startswith("_")
    }


def _width_names(model: PreTrainedModel, stack: Stack) -> list[str]:
    widths = {find_neurons(block).read_HCW.shape[-1] for block in stack.blocks}
    text: Any = model.config.get_text_config()
    values = {name: getattr(text, name) for name in WIDTHS if hasattr(text, name)}
    found = [name for name, value in values.items() if {value} == widths]
    if "n_inner" in values and values["n_inner"] is None:  # four times the hidden size
        found.append("n_inner")
    if not found:
        raise ModelError(
            f"the configuration of {type(model).__name__} does not say the number of neurons ({sorted(widths)}) of all "
            "blocks by one setting"
        )
    return found


def _shapes(
    model: PreTrainedModel, stack: Stack, names: dict[str, str], width: int | None
) -> dict[str, tuple[int, ...]]:
    sizes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    for block in stack.blocks if width is not None else ():
        neurons = find_neurons(block)
        keep_W = torch.arange(neurons.read_HCW.shape[-1]) < (width or 0)
        found = smaller_tensors(block, neurons, keep_W)
        sizes |= {f"{block.name}.{key}": tuple(tensor.shape) for key, tensor in found.items()}
    blocks = [block.name for block in stack.blocks]
    owners = {key: next((name for name in blocks if key.startswith(f"{name}.")), "") for key in sizes}
    return {
        key if not owner else names[owner] + key.removeprefix(owner): sizes[key]
        for key, owner in owners.items()
        if not owner or owner in names
    }
