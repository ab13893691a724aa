"""What of a model stays dense, so that nothing is left out silently."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from torch import nn

from optima.models.blocks import Block, Stack
from optima.models.inspect import head_of
from optima.names import kind


def uncovered(blocks: Sequence[Block]) -> dict[str, tuple[int, int]]:
    """Matrices of the blocks that no linear holds (fused experts, convolutions): (how many, weights) by kind."""
    found: dict[str, tuple[int, int]] = {}
    for block in blocks:
        covered = {id(linear.parameter) for linear in (*block.linears, *block.left)}
        for name, parameter in block.module.named_parameters():
            if _is_matrix(name, parameter) and id(parameter) not in covered:
                count, weights = found.get(key := kind(f"{block.name}.{name}"), (0, 0))
                found[key] = (count + 1, weights + parameter.numel())
    return found


def _is_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Of weights: experts have a bias each (gpt-oss)."""
    return parameter.ndim >= 2 and not name.endswith("bias")


def dense_notes(stacks: Sequence[Stack]) -> list[str]:
    """What stays dense in stacks that ``select_linears`` gave, a line a kind, so that nothing is left out silently."""
    blocks = [block for stack in stacks for block in stack.blocks]
    notes = [
        f"{name} ({weights:,} weights in {_times(count)}) is no plain linear and stays dense"
        for name, (count, weights) in uncovered(blocks).items()
    ]
    left, routers, pruned = Counter[str](), Counter[str](), Counter[str]()
    for block in blocks:
        for linear in block.left:
            (routers if linear.name in block.routers else left)[kind(linear.name)] += 1
        pruned.update(kind(linear.name) for linear in block.linears if linear.name in block.routers)
    notes += [f"{name} ({_times(count)}) routes tokens and stays dense" for name, count in routers.items()]
    notes += [f"{name} ({_times(count)}) routes tokens, and is pruned as targets ask" for name, count in pruned.items()]
    if left:
        names = ", ".join(f"{name} ({_times(count)})" for name, count in left.items())
        notes.append(f"left dense by targets and ignore: {names}")
    return notes


def outside_notes(model: nn.Module, stacks: Sequence[Stack]) -> list[str]:
    """The matrices outside the blocks, which stay dense; embeddings and the head go without saying."""
    head = head_of(model)
    known = {id(parameter) for stack in stacks for block in stack.blocks for parameter in block.module.parameters()}
    named = (module for module in model.modules() if isinstance(module, nn.Embedding) or module is head)
    known |= {id(parameter) for module in named for parameter in module.parameters()}
    matrices = [(name, p) for name, p in model.named_parameters() if _is_matrix(name, p) and id(p) not in known]
    names = Counter(kind(name.removesuffix(".weight")) for name, _ in matrices)
    listed = ", ".join(f"{name} ({_times(count)})" for name, count in names.items())
    return [f"outside the blocks, and dense: {listed}"] if listed else []


def _times(count: int) -> str:
    return "one place" if count == 1 else f"{count} places"
