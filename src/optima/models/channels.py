"""Channels of a block that may be permuted, rotated or removed: those inside an MLP, and those of an attention head.

Candidates are found by the names and shapes of linears, and tested (``difference``). Channels inside an MLP may be
permuted. The values of an attention head may be rotated by any orthogonal matrix, for attention is linear in them.

Shapes: H heads, W channels of a head (inside an MLP: H = 1), C copies of a head (queries that share values; gate and
up), D inputs, O outputs, E hidden size.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from optima.device import full_precision
from optima.models.blocks import Block, Linear, linears_of
from optima.models.forward import hidden_of, map_tensors
from optima.patterns import kind

if TYPE_CHECKING:
    from optima.calibration.activations import Activations

Kind = Literal["mlp", "heads"]

# Linears of an MLP and of an attention, after the name of the module around them.
AT = r"(?P<at>(?:[^.]+\.)*?)"
UP = re.compile(AT + r"(gate_proj|up_proj|gate_up_proj|w1|w3|fc1|fc_in|c_fc|dense_h_to_4h|lin1|wi(_[01])?|Wi|"
                r"intermediate\.dense)")  # fmt: skip
DOWN = re.compile(AT + r"(down_proj|w2|fc2|fc_out|c_proj|dense_4h_to_h|lin2|wo|Wo|output\.dense)")
VALUE = re.compile(AT + r"(self\.)?(v_proj|v_lin|value|v)")
FUSED = re.compile(AT + r"(qkv_proj|c_attn|Wqkv|qkv)")  # all queries, then all keys and values
OUT = re.compile(AT + r"(o_proj|out_proj|out_lin|c_proj|o|wo|Wo|dense|output\.dense)")

# Most that the block's change of its inputs may differ, relative to itself, a root mean square. It was at most 6e-6 in
# tiny models of 19 families, where a wrong permutation of weights that matter little made 2e-3.
TOLERANCE = 1e-4
# And in units of the rounding of the block's inputs: a large hidden state hides a small change of it.
ROUNDINGS = 4


@dataclass(frozen=True)
class Channels:
    """Channels that may be permuted or rotated: those of a head among themselves, each head in its own way.

    Attributes:
        kind: what they are.
        name: of the module around them.
        writers: by the name of each linear with these channels as outputs, where they are: (H, C, W) int64.
        reader: name of the linear with these channels as inputs.
        read_HCW: where they are among its inputs, int64.
    """

    kind: Kind
    name: str
    writers: Mapping[str, Tensor]
    reader: str
    read_HCW: Tensor

    @property
    def linears(self) -> set[str]:
        """Names of those whose weights change."""
        return {*self.writers, self.reader}


@torch.no_grad()
def move(channels: Channels, linears: Mapping[str, Linear], ways: Tensor) -> None:
    """Permute or rotate channels in place.

    Args:
        channels: of any kind; only those of heads may be rotated.
        linears: by name.
        ways: (H, W), for each place the channel that comes there; or rotations, (H, W, W), float32.
    """
    for name, index_HCW in channels.writers.items():
        _move(linears[name].read(), 0, index_HCW, ways)
        if (bias_O := _bias_of(linears[name])) is not None:
            _move(bias_O, 0, index_HCW, ways)
    _move(linears[channels.reader].read(), 1, channels.read_HCW, ways)


def _move(tensor: Tensor, dim: int, index_HCW: Tensor, ways: Tensor) -> None:
    for way, index_CW in zip(ways.to(tensor.device), index_HCW.to(tensor.device), strict=True):
        for index_W in index_CW:
            own = tensor.index_select(dim, index_W)
            if way.is_floating_point():
                dtype = torch.promote_types(way.dtype, tensor.dtype)
                moved = torch.tensordot(way.to(dtype), own.to(dtype), ([1], [dim])).movedim(0, dim).to(tensor.dtype)
            else:
                moved = own.index_select(dim, way)
            tensor.index_copy_(dim, index_W, moved)


def _bias_of(linear: Linear) -> Tensor | None:
    if (expert := linear.expert) is None:
        bias = linear.module.bias
        return bias.detach() if isinstance(bias, Tensor) else None
    fused = getattr(expert.experts.module, f"{expert.parameter}_bias", None)
    return None if fused is None else fused.detach()[expert.expert]


def find_channels(block: Block, num_heads: int | None) -> list[list[Channels]]:
    """Those inside the block's MLPs and attention, by module; the experts of a mixture are one module."""
    linears = {}
    for linear in linears_of(block.module, block.name):
        name = linear.name.removeprefix(f"{block.name}.")
        if linear.expert is not None:
            around, parameter, number = name.rsplit(".", 2)
            name = f"{around}.{number}.{parameter}"
        linears[name] = linear

    def called(pattern: re.Pattern[str]) -> dict[str, list[Linear]]:
        """By the name of the module around them."""
        found: dict[str, list[Linear]] = {}
        for name, linear in linears.items():
            if match := pattern.fullmatch(name):
                found.setdefault(f"{block.name}.{match['at']}".removesuffix("."), []).append(linear)
        return found

    downs, outs = called(DOWN), called(OUT)
    found = [_mlp(at, ups, downs[at][0]) for at, ups in called(UP).items() if at in downs]
    for pattern in (VALUE, FUSED) if num_heads else ():
        values = called(pattern)
        found += [_heads(at, values[at][0], outs[at][0], pattern, num_heads or 1) for at in values if at in outs]
    modules: dict[tuple[Kind, str], list[Channels]] = {}
    for channels in found:
        if channels is not None:
            modules.setdefault((channels.kind, kind(channels.name)), []).append(channels)
    return list(modules.values())


def _mlp(at: str, ups: Sequence[Linear], down: Linear) -> Channels | None:
    """Gates come in a linear of their own, or before the other outputs."""
    width = down.shape[1]
    outputs = {up.shape[0] for up in ups}
    if outputs not in ({width}, {2 * width}):
        return None
    written_HCW = torch.arange(*outputs).view(1, -1, width)
    return Channels("mlp", at, {up.name: written_HCW for up in ups}, down.name, torch.arange(width).view(1, 1, width))


def _heads(at: str, value: Linear, out: Linear, pattern: re.Pattern[str], num_heads: int) -> Channels | None:
    inputs, outputs = out.shape[1], value.shape[0]
    # Queries are as many as the inputs of the output projection, keys as many as values.
    width = inputs // num_heads
    values = outputs if pattern is VALUE else (outputs - inputs) // 2
    heads = values // max(width, 1)
    if inputs % num_heads or heads < 1 or heads * width != values or num_heads % heads:
        return None
    written_HCW = (0 if pattern is VALUE else inputs + values) + torch.arange(values).view(heads, 1, width)
    return Channels("heads", at, {value.name: written_HCW}, out.name, torch.arange(inputs).view(heads, -1, width))


@torch.no_grad()
def difference(block: Block, channels: Sequence[Channels], acts: Activations) -> float:
    """How much a random permutation, or rotation, of ``channels`` changes the block's function, in float32.

    To be compared with ``TOLERANCE``; of the worst channel of the hidden state. Infinite if it is not finite.

    Args:
        block: on the device of ``acts``; it stays as it is.
        channels: inside the block.
        acts: the block's inputs, of which the first sequence is used.
    """
    generator, found = torch.Generator().manual_seed(0), list[Tensor]()
    module = deepcopy(block.module).float()
    linears = {linear.name: linear for linear in linears_of(module, block.name)}

    def call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        (entered, *args), kwargs = map_tensors(
            (list(args), kwargs), lambda tensor: tensor.float() if tensor.is_floating_point() else tensor
        )
        expected = hidden_of(module(entered, *args, **kwargs))
        for each in channels:
            heads, _, width = each.read_HCW.shape
            move(each, linears, torch.stack([_random_way(each.kind, width, generator) for _ in range(heads)]))
        output = hidden_of(module(entered, *args, **kwargs))
        found.extend(each.flatten(0, -2).double() for each in (output - expected, expected - entered, entered))
        return expected

    with full_precision():
        acts.run(block, 0, slice(0, 1), call)
    error_E, change_E, entered_E = (each.square().mean(dim=0).sqrt() for each in found)
    error_E = error_E - ROUNDINGS * torch.finfo(torch.float32).eps * entered_E
    # Channel by channel: a few of them are much larger than all others.
    most = float(torch.where(error_E <= 0.0, 0.0, error_E / change_E).max())
    return most if math.isfinite(most) else math.inf


def _random_way(kind: Kind, width: int, generator: torch.Generator) -> Tensor:
    if kind == "mlp":
        return torch.randperm(width, generator=generator)
    rotation_WW: Tensor = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q
    return rotation_WW
