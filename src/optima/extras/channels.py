"""Channels of a block that may be permuted or rotated without a change of its function, and how N:M prunes least.

Channels inside an MLP may be permuted. The values of an attention head may be rotated by any orthogonal matrix, for
attention is linear in them. Candidates are found by the names and shapes of linears, and tested (``difference``).

Shapes: H heads, W channels of a head (inside an MLP: H = 1), C copies of a head (queries that share values; gate and
up), R rows, G groups of M channels, P of them, D inputs, O outputs, E hidden size.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from optima.calibration.activations import Activations, hidden_of, map_tensors
from optima.core.hessian import SMALLEST_DAMPING, Hessian
from optima.core.shifted import scaled_weight
from optima.device import full_precision
from optima.models.blocks import Block, Linear, linears_of
from optima.names import kind
from optima.patterns import NM
from optima.selectors.ranking import kth_lowest

Kind = Literal["mlp", "heads"]
Saliency = Callable[[Tensor], Tensor]  # from rotations, (H, W, W), to the saliencies after them, (..., W) or (..., D)

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
# Rounds of the assignment over all places of a group. Four times as many lose half a percent less.
ROUNDS = 10
TOGETHER = 256  # groups that exchange channels in one assignment, whose time grows with their third power
ENTRIES = 2**20  # rows x groups x groups that are made at once: they stay in a cache
# Of Adam; the rate falls to zero, and is divided by the root of W, or by 10 if that is more.
STEPS, RATE = 200, 0.3
BEGIN = 0.01  # distance of the first rotation from the identity


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
    """A view of its biases, (O,), if it has some."""
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


def lost(saliency_RC: Tensor, pattern: NM) -> float:
    """The saliency that ``pattern`` prunes: in each row the m - n smallest of every m, summed."""
    group_RGM = saliency_RC.unflatten(1, (-1, pattern.m))
    return float(group_RGM.sort(dim=-1).values[..., : pattern.m - pattern.n].sum(dtype=torch.float64))


def best_order(saliency_RC: Tensor, pattern: NM, generator: torch.Generator) -> Tensor:
    """The best order found, (C,) on the CPU; the present one if none is better.

    Channels are dealt to groups by their total saliency. Then, again and again, each group gives up one channel, and
    these are assigned anew at the least total loss. That such a step is an assignment problem is from gyro-permutation
    (Yu et al., arXiv 2407.20496); exchanges of two channels for N:M are older (Pool & Yu, NeurIPS 2021).

    Args:
        saliency_RC: float32, of R rows and C channels, C a multiple of m.
        pattern: n:m.
        generator: on the CPU.
    """
    count = saliency_RC.shape[1]
    # The first of C / m channels go one to each group, then the next.
    channel_GM = saliency_RC.sum(dim=0).argsort(descending=True, stable=True).cpu().reshape(pattern.m, -1).mT
    for _ in range(ROUNDS * pattern.m):
        # Another place of every group comes first, and is given up.
        shift_G1 = torch.randint(0, pattern.m, (len(channel_GM), 1), generator=generator)
        channel_GM = channel_GM.gather(1, (shift_G1 + torch.arange(pattern.m)) % pattern.m)
        for some_P in torch.randperm(len(channel_GM), generator=generator).chunk(-(-len(channel_GM) // TOGETHER)):
            cost_PP = _costs(saliency_RC, channel_GM[some_P], pattern)
            taken_P = torch.from_numpy(linear_sum_assignment(cost_PP.numpy())[1])
            channel_GM[some_P, 0] = channel_GM[some_P[taken_P], 0]
    order_C = channel_GM.flatten()
    better = lost(saliency_RC[:, order_C.to(saliency_RC.device)], pattern) < lost(saliency_RC, pattern)
    return order_C if better else torch.arange(count)


def _costs(saliency_RC: Tensor, channel_GM: Tensor, pattern: NM) -> Tensor:
    """The loss of each group with the first channel of each, (G groups, G channels), on the CPU.

    With a channel x and others in ascending order s, the k smallest sum to s_1 + .. + s_(k-1) + min(x, s_k).
    """
    pruned, channel_GM = pattern.m - pattern.n, channel_GM.to(saliency_RC.device)
    other_RGM = saliency_RC[:, channel_GM[:, 1:]].sort(dim=-1).values
    sure_G = other_RGM[..., : pruned - 1].sum(dim=(0, 2))
    last_RG, first_RG = other_RGM[..., pruned - 1], saliency_RC[:, channel_GM[:, 0]]
    cost_GG = sure_G.double()[:, None].repeat(1, len(channel_GM))
    step = max(ENTRIES // cost_GG.numel(), 1)
    for last, first in zip(last_RG.split(step), first_RG.split(step), strict=True):
        cost_GG += torch.minimum(last[:, :, None], first[:, None, :]).sum(dim=0)
    return cost_GG.cpu()


def writer_saliency(channels: Channels, weight_OD: Tensor, hessian: Hessian, row_O: Tensor | None) -> Saliency:
    """Of the linear that writes the values of heads, (H, W, D).

    Args:
        channels: of heads.
        weight_OD: the weight, float32, on the device of ``hessian``.
        hessian: of its inputs.
        row_O: weights of its outputs, or None. Rotated values are mixtures of those of a head, which share the mean.
    """
    (index_HCW,) = channels.writers.values()
    index_HW = index_HCW[:, 0].to(weight_OD.device)
    value_HWD = scaled_weight(weight_OD, hessian, hessian.inverse_diagonal_D.rsqrt())[index_HW]
    if row_O is not None:
        value_HWD = value_HWD * row_O.to(value_HWD)[index_HW].mean(dim=1).sqrt()[:, None, None]

    def saliency(rotation_HWW: Tensor) -> Tensor:
        return (rotation_HWW @ value_HWD).square()

    return saliency


def reader_saliency(channels: Channels, weight_OD: Tensor, hessian: Hessian, row_O: Tensor | None) -> Saliency:
    """Of the linear that reads the values, (H, C, O, W); arguments as of ``writer_saliency``."""
    index_HCW = channels.read_HCW.to(weight_OD.device)
    out_OD = weight_OD * (1.0 if row_O is None else row_O.to(weight_OD).sqrt()[:, None])
    out_HCOW = out_OD[:, index_HCW].permute(1, 2, 0, 3)
    left_HCWW = hessian.inverse_DD[index_HCW[..., :, None], index_HCW[..., None, :]]
    # Dead inputs, which a rotation mixes with others, have no more than the ridge.
    ridge = max(hessian.damping, SMALLEST_DAMPING) * hessian.mean_diagonal
    left_HCWW.diagonal(dim1=-2, dim2=-1)[hessian.dead_D[index_HCW]] = 1.0 / ridge
    root_HCWW = torch.linalg.cholesky(left_HCWW).float()

    def saliency(rotation_HWW: Tensor) -> Tensor:
        left_HCW = (rotation_HWW[:, None] @ root_HCWW).square().sum(dim=-1)
        found: Tensor = (out_HCOW @ rotation_HWW.mT[:, None]).square() / left_HCW[:, :, None]
        return found

    return saliency


@torch.enable_grad()
def best_rotation(parts: Sequence[tuple[Saliency, NM]], begin_HWW: Tensor) -> tuple[Tensor, float]:
    """The best rotations found, (H, W, W), and the saliency that is pruned then, relative to before.

    Adam searches over skew-symmetric matrices, of which the rotation is the Cayley transform. That rotations merged
    into a checkpoint help pruning is from DenoiseRotator (Gu et al., arXiv 2505.23049), which concentrates the scores
    of weights by their entropy.

    Args:
        parts: at least one; of several the mean of their ratios counts.
        begin_HWW: random matrices, near a small multiple of which the search begins.

    Returns:
        the identity, and 1, if nothing better was found.
    """
    identity_HWW = torch.eye(begin_HWW.shape[-1], device=begin_HWW.device).expand_as(begin_HWW)
    before = [(part, was) for part in parts if float(was := _pruned(*part, identity_HWW)) > 0.0]
    if not before:
        return identity_HWW, 1.0

    def share(rotation_HWW: Tensor) -> Tensor:
        return torch.stack([_pruned(*part, rotation_HWW) / was for part, was in before]).mean()

    skew_HWW = (BEGIN * begin_HWW).requires_grad_()
    optimizer = torch.optim.Adam([skew_HWW])
    rate = RATE / max(begin_HWW.shape[-1] ** 0.5, 10.0)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = rate * (1.0 - step / STEPS)
        share(_orthogonal(skew_HWW)).backward()
        optimizer.step()
        optimizer.zero_grad()
    rotation_HWW = _orthogonal(skew_HWW.detach())
    found = float(share(rotation_HWW))
    return (rotation_HWW, found) if found < 1.0 else (identity_HWW, 1.0)


def _orthogonal(skew_HWW: Tensor) -> Tensor:
    """Cayley's transform of the skew-symmetric part: about I + S - S^T for a small S."""
    half_HWW = 0.5 * (skew_HWW - skew_HWW.mT)
    identity_WW = torch.eye(half_HWW.shape[-1], device=half_HWW.device)
    rotation_HWW: Tensor = torch.linalg.solve(identity_WW - half_HWW, identity_WW + half_HWW)
    return rotation_HWW


def _pruned(saliency: Saliency, pattern: NM, rotation_HWW: Tensor) -> Tensor:
    """The saliency that the pattern prunes after a rotation."""
    group_GM = saliency(rotation_HWW).reshape(-1, pattern.m)
    threshold_G1 = kth_lowest(group_GM.detach(), pattern.m - pattern.n)
    pruned: Tensor = torch.where(group_GM <= threshold_G1, group_GM, 0.0)
    return pruned.sum()
