"""The order of channels in which N:M, which keeps n of every m consecutive channels of a row, loses least.

Weights that all matter should not be in one group. Channels are dealt to groups by their total saliency. Then, again
and again, each group gives up one of its channels, and these are assigned anew at the least total loss. That such a
step is an assignment problem is from gyro-permutation (Yu et al., arXiv 2407.20496); exchanges of two channels for N:M
are older (Pool & Yu, NeurIPS 2021).

Shapes: R rows, C channels, G groups of M channels, P of them.
"""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from optima.patterns import NM

# Rounds over all places of a group. Four times as many lose half a percent less.
ROUNDS = 10
# Groups that exchange channels in one assignment, whose time grows with their third power.
TOGETHER = 256
# Entries (rows x groups x groups) that are made at once: they stay in a cache.
ENTRIES = 2**20


def lost(saliency_RC: Tensor, pattern: NM) -> float:
    """The saliency that ``pattern`` prunes: in each row the m - n smallest of every m, summed."""
    group_RGM = saliency_RC.unflatten(1, (-1, pattern.m))
    return float(group_RGM.sort(dim=-1).values[..., : pattern.m - pattern.n].sum(dtype=torch.float64))


def best_order(saliency_RC: Tensor, pattern: NM, generator: torch.Generator) -> Tensor:
    """The best order found, (C,) on the CPU; the present one if none is better.

    Args:
        saliency_RC: float32, of weights or sums of some, C a multiple of m.
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
