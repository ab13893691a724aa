"""Which channels of a model may change places, and where they are counted.

Those inside an MLP may, if all that writes and reads them agrees on their order. Those of a value head may be rotated
by any orthogonal matrix. What a model does with them in between is not known here: candidates are found by names and
sizes, and tried (``optima.extras.trial``).

Shapes: O outputs, D inputs, E hidden size, H heads, W channels of a head (of channels without heads: H = 1).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from optima.models.blocks import Block, FusedExperts, Linear, experts_of, linears_of

Kind = Literal["mlp", "heads"]
KINDS: tuple[Kind, ...] = ("mlp", "heads")

# Linears of an MLP and of an attention, behind the module that they have in common.
AT = r"(?P<at>(?:[^.]+\.)*?)"
UP = re.compile(AT + r"(gate_proj|up_proj|gate_up_proj|w1|w3|fc1|fc_in|c_fc|dense_h_to_4h|lin1|wi(_[01])?|Wi|"
                r"intermediate\.dense)")  # fmt: skip
DOWN = re.compile(AT + r"(down_proj|w2|fc2|fc_out|c_proj|dense_4h_to_h|lin2|wo|Wo|output\.dense)")
VALUE = re.compile(AT + r"(self\.)?(v_proj|v_lin|value|v)")
# All queries, then all keys and values; or a group of queries, their key and their value, then the next group.
FUSED = re.compile(AT + r"(qkv_proj|c_attn|Wqkv|qkv)")
GROUPED = re.compile(AT + r"(query_key_value)")
OUT = re.compile(AT + r"(o_proj|out_proj|out_lin|c_proj|o|wo|Wo|dense|output\.dense)")


Starts = tuple[tuple[int, ...], ...]  # see ``Place``
Read = tuple[str, Starts]  # a linear, and where channels are among its inputs


@dataclass(frozen=True)
class Place:
    """Where channels are counted in a parameter.

    Attributes:
        name: full name of the parameter.
        dim: of it, or of the expert's part of it.
        starts: of each head, where its channels begin: in as many places as they are counted.
        step: from a channel to the next.
        expert: whose part; None for a parameter without experts.
    """

    name: str
    dim: int
    starts: Starts = ((0,),)
    step: int = 1
    expert: int | None = None


@dataclass(frozen=True)
class Channels:
    """Channels that may change places or be turned: those of a head among themselves, each head in its own way.

    Attributes:
        kind: what they are.
        name: of the module that they are inside of.
        heads, width: H and W.
        readers: full names of the linears that have them as inputs.
        read: where those of each head begin among these inputs, see ``Place``.
        places: where they are counted; the first is the weight of a linear that has them as outputs.
    """

    kind: Kind
    name: str
    heads: int
    width: int
    readers: tuple[str, ...]
    read: Starts
    places: tuple[Place, ...]

    @property
    def writer(self) -> str:
        """Full name of the linear whose outputs they are; of several, what the first place is called."""
        return self.places[0].name.removesuffix(".weight")


@torch.no_grad()
def reorder(channels: Channels, ways: Tensor, parameters: Mapping[str, Tensor]) -> None:
    """Give the channels of each head another order in place, or turn them.

    Args:
        channels: of which kind ever; only those of heads may be turned.
        ways: (H, W), for each place the channel that comes there; or matrices that turn, (H, W, W), float32.
        parameters: those of ``channels.places``, by name.
    """
    for place in channels.places:
        whole = parameters[place.name]
        with torch.inference_mode(whole.is_inference()), torch.no_grad():  # what is made there changes there alone
            tensor = whole if place.expert is None else whole[place.expert]
            for way, starts in zip(ways.to(tensor.device), place.starts, strict=True):
                for start in starts:
                    index_W = start + place.step * torch.arange(channels.width, device=tensor.device)
                    own = tensor.index_select(place.dim, index_W)
                    tensor.index_copy_(place.dim, index_W, _moved(own, way, place.dim))


def _moved(tensor: Tensor, way: Tensor, dim: int) -> Tensor:
    if not way.is_floating_point():
        return tensor.index_select(dim, way)
    dtype = torch.promote_types(way.dtype, tensor.dtype)
    turned: Tensor = torch.tensordot(way.to(dtype), tensor.to(dtype), ([1], [dim])).movedim(0, dim)
    return turned.to(tensor.dtype)


def inner_channels(block: Block, config: Any) -> list[list[Channels]]:
    """Those inside the block's MLPs and value heads, each in the ways in which they may be counted."""
    found = list(_Named(block, getattr(config, "num_attention_heads", None)).channels())
    for experts in experts_of(block.module, block.name):
        found.extend(_of_experts(experts))
    return found


def _halves(outputs: int, width: int) -> list[tuple[tuple[int, ...], int]]:
    """Where the channels of an MLP may be among the outputs of a linear: starts, and the step; gates count as well."""
    return [((0,), 1)] if outputs == width else [((0, width), 1), ((0, 1), 2)]


def outputs_dim(linear: Linear) -> int:
    """Of its weight as it is stored."""
    return int(isinstance(linear.module, Conv1D))


def bias_of(experts: FusedExperts, name: str, outputs: int) -> str | None:
    """Full name of the biases of a fused parameter, (experts, O); None if it has none."""
    bias = dict(experts.module.named_parameters(recurse=False)).get(f"{name}_bias")
    return f"{experts.name}.{name}_bias" if bias is not None and bias.shape[1:] == (outputs,) else None


class _Named:
    """The linears of a block that are modules, found by what they are called there."""

    def __init__(self, block: Block, heads: object) -> None:
        self.block, self.heads = block, heads
        self.linears = {
            linear.name.removeprefix(f"{block.name}."): linear
            for linear in linears_of(block.module, block.name)
            if linear.expert is None
        }

    def channels(self) -> Iterator[list[Channels]]:
        """Those inside MLPs and value heads."""
        downs, outs = self._called(DOWN), self._called(OUT)
        for at, ups in self._called(UP).items():
            if at in downs:
                yield from self._mlp(at, ups, downs[at][0])
        for pattern in (VALUE, FUSED, GROUPED):
            for at, values in self._called(pattern).items():
                if at in outs:
                    yield from self._heads(at, values[0], outs[at][0], pattern)

    def _called(self, pattern: re.Pattern[str]) -> dict[str, list[str]]:
        """Names by the module that they have in common."""
        found: dict[str, list[str]] = {}
        for name in self.linears:
            if match := pattern.fullmatch(name):
                found.setdefault(match["at"], []).append(name)
        return found

    def _mlp(self, at: str, ups: list[str], down: str) -> Iterator[list[Channels]]:
        width = self.linears[down].shape[1]
        outputs = {up: self.linears[up].shape[0] for up in ups}
        if set(outputs.values()) <= {width, 2 * width}:
            yield [
                self._made("mlp", at, width, [(up, (starts,), step) for up in ups], (down, ((0,),)))
                for starts, step in _halves(max(outputs.values()), width)
            ]

    def _heads(self, at: str, value: str, out: str, pattern: re.Pattern[str]) -> Iterator[list[Channels]]:
        inputs, outputs = self.linears[out].shape[1], self.linears[value].shape[0]
        if not isinstance(self.heads, int) or inputs % self.heads:
            return
        # Queries are as many as the inputs of what comes behind, keys as many as values.
        width = inputs // self.heads
        values = outputs if pattern is VALUE else (outputs - inputs) // 2
        heads = values // width
        if heads < 1 or heads * width != values or self.heads % heads:
            return
        copies = self.heads // heads
        first, every = {
            VALUE: (0, width),
            FUSED: (inputs + values, width),
            GROUPED: ((copies + 1) * width, (copies + 2) * width),
        }[pattern]
        written = tuple((first + head * every,) for head in range(heads))
        read = tuple(tuple((head * copies + copy) * width for copy in range(copies)) for head in range(heads))
        yield [self._made("heads", at, width, [(value, written, 1)], (out, read))]

    def _made(
        self, kind: Kind, at: str, width: int, writers: Sequence[tuple[str, Starts, int]], read: Read
    ) -> Channels:
        """``writers``: names, and where channels are among their outputs; ``read``: the same of a linear's inputs."""
        places = []
        for name, starts, step in writers:
            writer = self.linears[name]
            places.append(Place(f"{writer.name}.weight", outputs_dim(writer), starts, step))
            if writer.module.bias is not None:
                places.append(Place(f"{writer.name}.bias", 0, starts, step))
        reader, starts = self.linears[read[0]], read[1]
        places.append(Place(f"{reader.name}.weight", 1 - outputs_dim(reader), starts))
        inside = f"{self.block.name}.{at}".removesuffix(".")
        return Channels(kind, inside, len(starts), width, (reader.name,), starts, tuple(places))


def _of_experts(experts: FusedExperts) -> Iterator[list[Channels]]:
    *ups, down = experts.transposed
    for expert in range(experts.count):
        width = experts.orient(down, expert, experts.parameter(down)).shape[1]
        outputs = {up: experts.orient(up, expert, experts.parameter(up)).shape[0] for up in ups}
        if not set(outputs.values()) <= {width, 2 * width}:
            return
        ways = []
        for starts, step in _halves(max(outputs.values()), width):
            places = [Place(f"{experts.name}.{down}", 1 - int(experts.transposed[down]), ((0,),), 1, expert)]
            for up in ups:
                places.append(Place(f"{experts.name}.{up}", int(experts.transposed[up]), (starts,), step, expert))
                if (bias := bias_of(experts, up, outputs[up])) is not None:
                    places.append(Place(bias, 0, (starts,), step, expert))
            reader = f"{experts.name}.{down}.{expert}"
            ways.append(Channels("mlp", f"{experts.name}.{expert}", 1, width, (reader,), ((0,),), tuple(places)))
        yield ways
