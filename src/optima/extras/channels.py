"""Orders of channels, and rotations of value heads, of which N:M prunes least.

Shapes: H heads, W channels of a head, C channels of an MLP or copies of a head, R rows, G groups of M channels, P of
them, D inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from optima.core.hessian import SMALLEST_DAMPING, Hessian
from optima.core.shifted import scaled_weight
from optima.models.channels import Channels
from optima.patterns import NM
from optima.selectors.ranking import kth_lowest

Saliency = Callable[[Tensor], Tensor]  # from rotations, (H, W, W), to the saliencies after them, (..., W) or (..., D)

# Rounds of the assignment over all places of a group. Four times as many lose half a percent less.
ROUNDS = 10
TOGETHER = 256  # groups that exchange channels in one assignment, whose time grows with their third power
ENTRIES = 2**20  # rows x groups x groups that are made at once: they stay in a cache
# Of Adam; the rate falls to zero, and is divided by the root of W, or by 10 if that is more.
STEPS, RATE = 200, 0.3
BEGIN = 0.01  # distance of the first rotation from the identity


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
    """The saliency of the linear that writes the values of heads, (H, W, D).

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
    """The saliency of the linear that reads the values, (H, C, O, W); see ``writer_saliency``."""
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
    group_GM = saliency(rotation_HWW).reshape(-1, pattern.m)
    threshold_G1 = kth_lowest(group_GM.detach(), pattern.m - pattern.n)
    pruned: Tensor = torch.where(group_GM <= threshold_G1, group_GM, 0.0)
    return pruned.sum()
