"""Find what can be pruned in any transformer of the library, by its structure rather than by a list of names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from optima.errors import ModelError


@dataclass(frozen=True)
class Linear:
    """A prunable linear module inside a block.

    Attributes:
        name: full name of the module in the model.
        module: ``nn.Linear``, or GPT-2's ``Conv1D``, which stores its weight transposed.
    """

    name: str
    module: nn.Module

    @property
    def weight_OD(self) -> Tensor:
        """The weight as outputs x inputs: a view of the module's parameter."""
        weight = self.parameter.detach()
        return weight.mT if self.transposed else weight

    @property
    def parameter(self) -> Tensor:
        """The weight as the module stores it."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def transposed(self) -> bool:
        """True if the module stores its weight as inputs x outputs."""
        return isinstance(self.module, Conv1D)

    @property
    def shape(self) -> tuple[int, int]:
        """(outputs, inputs)."""
        outputs, inputs = self.weight_OD.shape
        return int(outputs), int(inputs)

    @torch.no_grad()
    def write(self, weight_OD: Tensor) -> None:
        """Replace the weight, cast to the parameter's dtype and device."""
        self.weight_OD.copy_(weight_OD)


@dataclass(frozen=True)
class Block:
    """One decoder or encoder layer of the model, with its prunable linears in the order they are defined."""

    index: int
    name: str
    module: nn.Module
    linears: tuple[Linear, ...]


def find_blocks(model: nn.Module) -> list[Block]:
    """The model's stack of blocks: its largest list of same-class modules that contain linears.

    Raises:
        ModelError: if there is no such list, or the model has two stacks that feed each other (encoder-decoder).
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ModelError(
            f"{type(model).__name__} is an encoder-decoder, whose decoder depends on two stacks of blocks: "
            "prune a decoder-only or an encoder-only model"
        )
    stacks = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and _is_stack(module)
    ]
    if not stacks:
        lists = [f"{name} ({len(m)})" for name, m in model.named_modules() if isinstance(m, nn.ModuleList)]
        raise ModelError(
            f"no stack of transformer blocks in {type(model).__name__}: its module lists are {lists or 'none'}, "
            f"its children {[name for name, _ in model.named_children()]}"
        )
    name, stack = max(stacks, key=lambda item: sum(p.numel() for p in item[1].parameters()))
    blocks = []
    for index, module in enumerate(stack):
        prefix = f"{name}.{index}" if name else str(index)
        blocks.append(Block(index, prefix, module, tuple(linears_of(module, prefix))))
    return blocks


def linears_of(module: nn.Module, prefix: str) -> list[Linear]:
    """Every linear inside ``module``, whose full name is ``prefix``."""
    return [
        Linear(f"{prefix}.{name}", child)
        for name, child in module.named_modules()
        if isinstance(child, (nn.Linear, Conv1D))
    ]


def _is_stack(stack: nn.ModuleList) -> bool:
    same_class = len({type(module) for module in stack}) == 1
    return (
        same_class
        and any(isinstance(m, (nn.Linear, Conv1D)) for layer in stack for m in layer.modules())
        and (
            # A list of bare linears (experts, heads) is not a stack of blocks.
            not isinstance(stack[0], (nn.Linear, Conv1D))
        )
    )


def select_linears(blocks: Sequence[Block], targets: Sequence[str], ignore: Sequence[str]) -> list[Block]:
    """The blocks with only the linears whose full name matches a target and no ignored regex (``re.search``).

    Raises:
        ModelError: if nothing is left; the message lists what was there.
    """
    selected = [
        Block(
            block.index,
            block.name,
            block.module,
            tuple(
                linear
                for linear in block.linears
                if any(re.search(regex, linear.name) for regex in targets)
                and not any(re.search(regex, linear.name) for regex in ignore)
            ),
        )
        for block in blocks
    ]
    if not any(block.linears for block in selected):
        kinds = sorted({linear.name.replace(f"{block.name}.", "", 1) for block in blocks for linear in block.linears})
        raise ModelError(
            f"no linear matches targets {list(targets)} without matching ignore {list(ignore)}: "
            f"the linears of each block ({blocks[0].name} ...) are {', '.join(kinds) or 'none'}"
        )
    return selected


def uncovered_parameters(block: Block) -> dict[str, int]:
    """Matrices of a block that no linear module holds (fused experts, for example): full name and size."""
    covered = {id(linear.module.weight) for linear in linears_of(block.module, block.name)}
    return {
        f"{block.name}.{name}": parameter.numel()
        for name, parameter in block.module.named_parameters()
        if parameter.ndim >= 2 and id(parameter) not in covered
    }
