"""Channels of a block that may be permuted or rotated without a change of its function.

Channels inside an MLP may be permuted, if all linears that write and read them agree on their order. The values of an
attention head may be rotated by any orthogonal matrix, for attention is linear in them. Candidates are found by the
names and shapes of linears, and tested on the block (``difference``).

Shapes: H heads, W channels of a head (channels without heads: H = 1), E hidden size.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from optima.calibration.activations import Activations, hidden_of, map_tensors
from optima.device import full_precision
from optima.models.blocks import Block, Linear, linears_of

Kind = Literal["mlp", "heads"]
KINDS: tuple[Kind, ...] = ("mlp", "heads")

# Linears of an MLP and of an attention, after the name of the module around them.
AT = r"(?P<at>(?:[^.]+\.)*?)"
UP = re.compile(AT + r"(gate_proj|up_proj|gate_up_proj|w1|w3|fc1|fc_in|c_fc|dense_h_to_4h|lin1|wi(_[01])?|Wi|"
                r"intermediate\.dense)")  # fmt: skip
DOWN = re.compile(AT + r"(down_proj|w2|fc2|fc_out|c_proj|dense_4h_to_h|lin2|wo|Wo|output\.dense)")
VALUE = re.compile(AT + r"(self\.)?(v_proj|v_lin|value|v)")
# All queries, then all keys and values; or a group of queries, their key and their value, then the next group.
FUSED = re.compile(AT + r"(qkv_proj|c_attn|Wqkv|qkv)")
GROUPED = re.compile(AT + r"(query_key_value)")
OUT = re.compile(AT + r"(o_proj|out_proj|out_lin|c_proj|o|wo|Wo|dense|output\.dense)")

# Most that the block's change of its inputs may differ, relative to itself, a root mean square. It was at most 6e-6 in
# tiny models of 19 families, where a wrong order of weights that matter little made 2e-3.
TOLERANCE = 1e-4
# And in units of the rounding of the block's inputs: a large hidden state hides a small change of it.
ROUNDINGS = 4


@dataclass(frozen=True)
class Site:
    """Where channels are among the outputs, or the inputs, of a linear.

    Attributes:
        linear: the linear.
        starts: of each head, the first channel: as often as the channels occur.
        step: from a channel to the next.
    """

    linear: Linear
    starts: tuple[tuple[int, ...], ...] = ((0,),)
    step: int = 1


@dataclass(frozen=True)
class Channels:
    """Channels that may be permuted or rotated: those of a head among themselves, each head in its own way.

    Attributes:
        kind: what they are.
        name: of the module around them.
        width: W.
        writers: linears with these channels as outputs.
        reader: the linear with these channels as inputs.
    """

    kind: Kind
    name: str
    width: int
    writers: tuple[Site, ...]
    reader: Site

    @property
    def heads(self) -> int:
        """H."""
        return len(self.reader.starts)

    @property
    def linears(self) -> list[Linear]:
        """Those whose weights change."""
        return [site.linear for site in (*self.writers, self.reader)]


@torch.no_grad()
def move(channels: Channels, ways: Tensor) -> None:
    """Permute or rotate channels in place.

    Args:
        channels: of any kind; only those of heads may be rotated.
        ways: (H, W), for each place the channel that comes there; or rotations, (H, W, W), float32.
    """
    for site in channels.writers:
        bias_O = _bias_of(site.linear)
        for tensor in [site.linear.read()] if bias_O is None else [site.linear.read(), bias_O]:
            _move(tensor, 0, site, channels.width, ways)
    _move(channels.reader.linear.read(), 1, channels.reader, channels.width, ways)


def _move(tensor: Tensor, dim: int, site: Site, width: int, ways: Tensor) -> None:
    for way, starts in zip(ways.to(tensor.device), site.starts, strict=True):
        for start in starts:
            index_W = start + site.step * torch.arange(width, device=tensor.device)
            own = tensor.index_select(dim, index_W)
            if way.is_floating_point():
                dtype = torch.promote_types(way.dtype, tensor.dtype)
                moved = torch.tensordot(way.to(dtype), own.to(dtype), ([1], [dim])).movedim(0, dim).to(tensor.dtype)
            else:
                moved = own.index_select(dim, way)
            tensor.index_copy_(dim, index_W, moved)


def _bias_of(linear: Linear) -> Tensor | None:
    """A view of its biases, (O,), if it has some."""
    if (expert := linear.expert) is None:
        bias = linear.module.bias
        return bias.detach() if isinstance(bias, Tensor) else None
    fused = getattr(expert.experts.module, f"{expert.parameter}_bias", None)
    return None if fused is None else fused.detach()[expert.expert]


def find_channels(block: Block, num_heads: int | None) -> list[list[Channels]]:
    """Those inside the block's MLPs, experts and attention, each in the layouts that its shapes allow."""
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
    for pattern in (VALUE, FUSED, GROUPED) if num_heads is not None else ():
        found += [
            _heads(at, values[0], outs[at][0], pattern, num_heads or 1)
            for at, values in called(pattern).items()
            if at in outs
        ]
    return [layouts for layouts in found if layouts]


def _mlp(at: str, ups: Sequence[Linear], down: Linear) -> list[Channels]:
    """Gates come in a linear of their own, before the other outputs, or in turns with them."""
    width = down.shape[1]
    outputs = {up.shape[0] for up in ups}
    if not outputs <= {width, 2 * width}:
        return []
    layouts = [((0,), 1)] if max(outputs) == width else [((0, width), 1), ((0, 1), 2)]
    return [
        Channels("mlp", at, width, tuple(Site(up, (starts,), step) for up in ups), Site(down))
        for starts, step in layouts
    ]


def _heads(at: str, value: Linear, out: Linear, pattern: re.Pattern[str], num_heads: int) -> list[Channels]:
    inputs, outputs = out.shape[1], value.shape[0]
    # Queries are as many as the inputs of the output projection, keys as many as values.
    width = inputs // num_heads
    values = outputs if pattern is VALUE else (outputs - inputs) // 2
    heads = values // max(width, 1)
    if inputs % num_heads or heads < 1 or heads * width != values or num_heads % heads:
        return []
    copies = num_heads // heads
    first, stride = {
        VALUE: (0, width),
        FUSED: (inputs + values, width),
        GROUPED: ((copies + 1) * width, (copies + 2) * width),
    }[pattern]
    written = tuple((first + head * stride,) for head in range(heads))
    read = tuple(tuple((head * copies + copy) * width for copy in range(copies)) for head in range(heads))
    return [Channels("heads", at, width, (Site(value, written),), Site(out, read))]


@torch.no_grad()
def difference(block: Block, channels: Sequence[Channels], acts: Activations) -> float:
    """How much another order, or rotation, of ``channels`` changes the block's function, in float32, at random.

    To be compared with ``TOLERANCE``; of the worst channel of the hidden state. Infinite if it is not finite.

    Args:
        block: on the device of ``acts``; it is left as it is.
        channels: inside the block.
        acts: the block's inputs, of which the first sequence is used.
    """
    generator, found = torch.Generator().manual_seed(0), list[Tensor]()

    def call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        (entered, *args), kwargs = map_tensors((list(args), kwargs), _in_float32)
        expected = hidden_of(block.module(entered, *args, **kwargs))
        for each in channels:
            move(each, torch.stack([_random_way(each, generator) for _ in range(each.heads)]))
        output = hidden_of(block.module(entered, *args, **kwargs))
        found.extend(each.flatten(0, -2).double() for each in (output - expected, expected - entered, entered))
        return expected

    with full_precision(), _float32_copy(block.module):
        acts.run(block, 0, slice(0, 1) if acts.probe.divisible else None, call)
    error_E, change_E, entered_E = (each.square().mean(dim=0).sqrt() for each in found)
    error_E = error_E - ROUNDINGS * torch.finfo(torch.float32).eps * entered_E
    # Channel by channel: a few of them are much larger than all others.
    most = float(torch.where(error_E <= 0.0, 0.0, error_E / change_E).max())
    return most if math.isfinite(most) else math.inf


@contextmanager
def _float32_copy(module: nn.Module) -> Iterator[None]:
    """Parameters and buffers are float32 copies inside."""
    tensors = [each for each in (*module.parameters(), *module.buffers()) if each.is_floating_point()]
    own = [each.data for each in tensors]
    for each in tensors:
        each.data = each.data.to(torch.float32, copy=True)
    try:
        yield
    finally:
        for each, data in zip(tensors, own, strict=True):
            each.data = data


def _random_way(channels: Channels, generator: torch.Generator) -> Tensor:
    if channels.kind == "heads":
        rotation_WW: Tensor = torch.linalg.qr(torch.randn(channels.width, channels.width, generator=generator)).Q
        return rotation_WW
    return torch.randperm(channels.width, generator=generator)


def _in_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor
