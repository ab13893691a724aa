"""Whether a block computes the same with its channels in another order, or turned: at random, in float32.

Shapes: B sequences, L tokens, E hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from optima.calibration.activations import Activations, hidden_of, map_tensors
from optima.device import full_precision
from optima.extras.channels import Channels, reorder
from optima.models.blocks import Block

# Most that the change which a block makes of its inputs may differ, relative to itself, a root mean square. It was at
# most 6e-6 in tiny models of 19 families, where a wrong order of weights that matter little made 2e-3.
TOLERANCE = 1e-4
# And in units of the rounding of what enters, by which a large hidden state hides a small change of it.
ROUNDINGS = 4


@torch.no_grad()
def difference(block: Block, channels: Sequence[Channels], acts: Activations) -> float:
    """How far the block is from doing with all ``channels`` in a random order, or turned, what it does.

    To be compared with ``TOLERANCE``; of the hidden state that tells most. Infinite if it is not finite.

    Args:
        block: on the device of ``acts``; it stays as it is.
        channels: inside the block.
        acts: what enters the block; its first sequence is tried.
    """
    state = {**dict(block.module.named_parameters()), **dict(block.module.named_buffers())}
    dense = {name: _in_float32(tensor) for name, tensor in state.items()}
    moved = {place.name for each in channels for place in each.places}
    other = {name: tensor.clone() if f"{block.name}.{name}" in moved else tensor for name, tensor in dense.items()}
    parameters = {f"{block.name}.{name}": tensor for name, tensor in other.items()}
    generator = torch.Generator().manual_seed(0)
    for each in channels:
        ways = torch.stack([_any_way(each, generator) for _ in range(each.heads)])
        reorder(each, ways, parameters)
    found: list[Tensor] = []

    def call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        (entered, *args), kwargs = map_tensors((list(args), kwargs), _in_float32)
        expected = hidden_of(functional_call(block.module, dense, (entered, *args), kwargs))
        output = hidden_of(functional_call(block.module, other, (entered, *args), kwargs))
        found.extend(each.flatten(0, -2).double() for each in (output - expected, expected - entered, entered))
        return expected

    rows = slice(0, 1) if acts.probe.divisible else None
    with full_precision():
        acts.run(block, 0, rows, call)
    error_E, change_E, entered_E = (each.square().mean(dim=0).sqrt() for each in found)
    error_E = error_E - ROUNDINGS * torch.finfo(torch.float32).eps * entered_E
    # Channel by channel: a few of them are much larger than all others.
    most = float(torch.where(error_E <= 0.0, 0.0, error_E / change_E).max())
    return most if math.isfinite(most) else math.inf


def _any_way(channels: Channels, generator: torch.Generator) -> Tensor:
    """Of one head: a random turn of its values, or a random order of other channels."""
    if channels.kind == "heads":
        turn_WW: Tensor = torch.linalg.qr(torch.randn(channels.width, channels.width, generator=generator)).Q
        return turn_WW
    return torch.randperm(channels.width, generator=generator)


def _in_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor
