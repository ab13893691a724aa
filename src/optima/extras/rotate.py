"""Rotations of value heads after which N:M prunes less saliency.

Attention is linear in its values, so the values of a head may be rotated by any orthogonal matrix if the output
projection is rotated back. Adam searches over skew-symmetric matrices, of which the rotation is the Cayley transform,
for the least pruned saliency of the linear that writes the values and of the one that reads them. That rotations merged
into a checkpoint help pruning is from DenoiseRotator (Gu et al., arXiv 2505.23049), which concentrates the scores of
weights by their entropy.

Shapes: H heads of values, W channels of a head, C queries that share a head, D inputs of the writer, O outputs of the
reader.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from optima.core.hessian import SMALLEST_DAMPING, Hessian
from optima.core.shifted import scaled_weight
from optima.extras.channels import Channels, Site
from optima.patterns import NM

# Of Adam; the rate falls to zero, and is divided by the root of W, or by 10 if that is more.
STEPS, RATE = 200, 0.3
BEGIN = 0.01  # distance of the first rotation from the identity


@dataclass(frozen=True)
class Writer:
    """The weights that write the values, in units in which squares are saliencies of OBS."""

    value_HWD: Tensor
    pattern: NM

    def saliency(self, turn_HWW: Tensor) -> Tensor:
        """Of each weight after a rotation, (H, W, D)."""
        return (turn_HWW @ self.value_HWD).square()


@dataclass(frozen=True)
class Reader:
    """The weights that read the values, and Cholesky factors of the inverse Hessian between the inputs of a head."""

    out_HCOW: Tensor
    root_HCWW: Tensor
    pattern: NM

    def saliency(self, turn_HWW: Tensor) -> Tensor:
        """Of each weight after a rotation, (H, C, O, W)."""
        left_HCW = (turn_HWW[:, None] @ self.root_HCWW).square().sum(dim=-1)
        return (self.out_HCOW @ turn_HWW.mT[:, None]).square() / left_HCW[:, :, None]


Part = Writer | Reader


def part_of(
    channels: Channels, name: str, weight_OD: Tensor, hessian: Hessian, row_O: Tensor | None, pattern: NM
) -> Part:
    """The writer or the reader of ``channels``.

    Args:
        channels: of heads.
        name: of the linear.
        weight_OD: its weight, float32, on the device of ``hessian``.
        hessian: of its inputs.
        row_O: weights of its outputs, or None. Rotated values are mixtures of those of a head, which share the mean.
        pattern: of the linear.
    """
    if name == channels.reader.linear.name:
        index_HCW = _index(channels.reader, channels.width, weight_OD.device)
        out_OD = weight_OD * (1.0 if row_O is None else row_O.to(weight_OD).sqrt()[:, None])
        left_HCWW = hessian.inverse_DD[index_HCW[..., :, None], index_HCW[..., None, :]]
        # Dead inputs, which a rotation mixes with others, have no more than the ridge.
        ridge = max(hessian.damping, SMALLEST_DAMPING) * hessian.mean_diagonal
        left_HCWW.diagonal(dim1=-2, dim2=-1)[hessian.dead_D[index_HCW]] = 1.0 / ridge
        return Reader(out_OD[:, index_HCW].permute(1, 2, 0, 3), torch.linalg.cholesky(left_HCWW).float(), pattern)
    index_HW = _index(channels.writers[0], channels.width, weight_OD.device)[:, 0]
    value_HWD = scaled_weight(weight_OD, hessian, hessian.inverse_diagonal_D.rsqrt())[index_HW]
    if row_O is not None:
        value_HWD = value_HWD * row_O.to(value_HWD)[index_HW].mean(dim=1).sqrt()[:, None, None]
    return Writer(value_HWD, pattern)


def _index(site: Site, width: int, device: torch.device) -> Tensor:
    """The channels of each head in each place where they occur, (H, C, W)."""
    return torch.tensor(site.starts, device=device)[..., None] + torch.arange(width, device=device)


@torch.enable_grad()
def best_turn(parts: Sequence[Part], begin_HWW: Tensor) -> tuple[Tensor, float]:
    """The best rotations found, (H, W, W), and the saliency that is pruned then, relative to before.

    Args:
        parts: at least one; of several the mean of their ratios counts.
        begin_HWW: random matrices, near a small multiple of which the search begins.

    Returns:
        the identity, and 1, if nothing better was found.
    """
    identity_HWW = torch.eye(begin_HWW.shape[-1], device=begin_HWW.device).expand_as(begin_HWW)
    before = [(part, was) for part in parts if float(was := _pruned(part, identity_HWW)) > 0.0]
    if not before:
        return identity_HWW, 1.0

    def share(turn_HWW: Tensor) -> Tensor:
        return torch.stack([_pruned(part, turn_HWW) / was for part, was in before]).mean()

    skew_HWW = (BEGIN * begin_HWW).requires_grad_()
    optimizer = torch.optim.Adam([skew_HWW])
    rate = RATE / max(begin_HWW.shape[-1] ** 0.5, 10.0)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = rate * (1.0 - step / STEPS)
        share(_orthogonal(skew_HWW)).backward()
        optimizer.step()
        optimizer.zero_grad()
    turn_HWW = _orthogonal(skew_HWW.detach())
    found = float(share(turn_HWW))
    return (turn_HWW, found) if found < 1.0 else (identity_HWW, 1.0)


def _orthogonal(skew_HWW: Tensor) -> Tensor:
    """Cayley's transform of the skew-symmetric part: about I + S - S^T for a small S."""
    half_HWW = 0.5 * (skew_HWW - skew_HWW.mT)
    identity_WW = torch.eye(half_HWW.shape[-1], device=half_HWW.device)
    turn_HWW: Tensor = torch.linalg.solve(identity_WW - half_HWW, identity_WW + half_HWW)
    return turn_HWW


def _pruned(part: Part, turn_HWW: Tensor) -> Tensor:
    """The saliency that its pattern prunes after a rotation."""
    group = part.saliency(turn_HWW).unflatten(-1, (-1, part.pattern.m))
    threshold = _kth_lowest(group.detach(), part.pattern.m - part.pattern.n)
    pruned: Tensor = torch.where(group <= threshold, group, 0.0)
    return pruned.sum()


def _kth_lowest(group: Tensor, k: int) -> Tensor:
    """Of the last dimension, which is kept; groups are too small for a sort to be worth it."""
    rest: list[Tensor] = list(group.movedim(-1, 0).contiguous())
    for _ in range(k):
        lowest = rest.pop()
        for place, other in enumerate(rest):
            rest[place], lowest = torch.maximum(other, lowest), torch.minimum(other, lowest)
    return lowest[..., None]
