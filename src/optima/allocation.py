"""How one global sparsity is shared out over the linears, from a survey of the dense model.

Every method observes each linear once and then gives it its sparsity. The mean of an unstructured one, weighted by the
numbers of weights, is the global sparsity.

Shapes: O outputs, D inputs, N blocks, or weights of a linear, L linears, Q quantiles.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from optima.linalg.statistics import sampling_step
from optima.patterns import NM, Pattern
from optima.selectors.base import LinearTask
from optima.selectors.wanda import wanda_score

# No linear is left dense or empty, however far the global sparsity and the spread reach.
SPARSEST, DENSEST = 0.99, 0.01
# Of a linear's saliencies.
QUANTILES = 1001
# Saliencies of a linear that they are taken of.
SAMPLE = 2**18


class Allocation(Protocol):
    """Shares out a global sparsity. Sees one linear at a time: never a model or a file."""

    def measure(self, task: LinearTask, pattern: Pattern) -> Tensor:
        """All that counts of a dense linear with this pattern, in main memory. Another process may do it."""
        ...

    def note(self, block: int, name: str, size: int, measured: Tensor) -> None:
        """Take note of a dense linear of ``size`` weights in the block number ``block``."""
        ...

    def allocate(self) -> dict[str, float]:
        """Full name and sparsity of every linear noted; 0 keeps it dense."""
        ...


@dataclass
class Owl:
    """Outlier-weighed layerwise sparsity (Yin et al., ICML 2024): blocks with many outliers are pruned less.

    A weight is an outlier if |W_ij| ||X_j|| exceeds M times the mean over its block (eq. 2). The outlier ratios of the
    blocks, scaled to a range of 2 lambda and centred, are taken off the global sparsity, as in the published code;
    linears of one block share their sparsity.

    Args:
        sparsity: the global sparsity S.
        outlier_multiple: M.
        spread: lambda.
    """

    sparsity: float
    outlier_multiple: float = 5.0
    spread: float = 0.08
    _sizes: dict[int, dict[str, int]] = field(default_factory=dict, init=False)
    _ratios: list[float] = field(default_factory=list, init=False)
    _scores: list[Tensor] = field(default_factory=list, init=False)

    def measure(self, task: LinearTask, pattern: Pattern) -> Tensor:
        """See ``Allocation``: the score of every weight."""
        return wanda_score(task.weight_OD, task.hessian).float().flatten().cpu()

    def note(self, block: int, name: str, size: int, measured: Tensor) -> None:
        """See ``Allocation``. The linears of a block must come one after the other."""
        if block not in self._sizes:
            self._end_block()
        self._sizes.setdefault(block, {})[name] = size
        self._scores.append(measured)  # a block's scores wait for its mean

    def allocate(self) -> dict[str, float]:
        """See ``Allocation``."""
        self._end_block()
        if not self._sizes:  # no linear was called
            return {}
        ratio_N = torch.tensor(self._ratios, dtype=torch.float64)
        size_N = torch.tensor([sum(sizes.values()) for sizes in self._sizes.values()], dtype=torch.float64)
        lowest, highest = ratio_N.aminmax()
        scaled_N = (ratio_N - lowest) / (highest - lowest).clamp_min(1e-300) * (2.0 * self.spread)
        sparsity_N = with_mean(self.sparsity - scaled_N, size_N, self.sparsity)
        return {
            name: float(sparsity)
            for sizes, sparsity in zip(self._sizes.values(), sparsity_N, strict=True)
            for name in sizes
        }

    def _end_block(self) -> None:
        if not self._scores:
            return
        size = sum(score.numel() for score in self._scores)
        limit = self.outlier_multiple * sum(float(score.sum(dtype=torch.float64)) for score in self._scores) / size
        outliers = sum(int((score > limit).sum()) for score in self._scores)
        self._ratios.append(outliers / size)
        self._scores.clear()


@dataclass
class ByLoss:
    """One threshold for the whole model: weights compete by what its loss feels of their removal.

    The saliency of a weight is r_o w_oi^2 / K_ii, K = H^-1: that of the optimal brain surgeon (Hassibi & Stork, 1993)
    in units of the loss, see ``optima.calibration.fisher``. What a threshold takes of each linear is cut at
    a distance from S, because the second-order loss of one linear knows nothing of what the others lose; then all move
    by one constant, which brings the mean back to S.

    Args:
        sparsity: the global sparsity S.
        spread: the distance.
    """

    sparsity: float
    spread: float = 0.1
    _saliencies: dict[str, Tensor] = field(default_factory=dict, init=False)
    _sizes: dict[str, int] = field(default_factory=dict, init=False)

    def measure(self, task: LinearTask, pattern: Pattern) -> Tensor:
        """See ``Allocation``: quantiles of the saliencies, or of a sample of them."""
        saliency_N = saliency_by_loss(task).flatten()
        sorted_N = saliency_N[:: sampling_step(max(len(saliency_N), 1), SAMPLE)].sort().values
        return sorted_N[quantile_places(len(sorted_N)).to(sorted_N.device)].cpu()

    def note(self, block: int, name: str, size: int, measured: Tensor) -> None:
        """See ``Allocation``."""
        self._saliencies[name], self._sizes[name] = measured, size

    def allocate(self) -> dict[str, float]:
        """See ``Allocation``."""
        if not self._saliencies:  # no linear was called
            return {}
        value_LQ = torch.stack(list(self._saliencies.values()))
        size_L = torch.tensor(list(self._sizes.values()), dtype=torch.float64)
        # The quantiles of all linears, each for as many weights as lie between two.
        order = value_LQ.flatten().argsort()
        weight = size_L.repeat_interleave(QUANTILES)[order].cumsum(0)
        last = int(torch.searchsorted(weight, self.sparsity * float(weight[-1])).clamp_max(len(weight) - 1))
        below_L = (value_LQ <= value_LQ.flatten()[order[last]]).double().mean(dim=1)
        bounded_L = below_L.clamp(self.sparsity - self.spread, self.sparsity + self.spread)
        found_L = with_mean(bounded_L, size_L, self.sparsity)
        return dict(zip(self._saliencies, found_L.tolist(), strict=True))


@dataclass
class KeepDense:
    """Linears that stay dense where the others have a pattern n:m, which leaves no sparsity to share out.

    A linear loses the saliencies (those of ``ByLoss``) of the weights that its pattern would take, were they the least
    of each group. Linears stay dense in the order of that loss per weight, while their share of all weights is not
    more than asked for.

    Args:
        share: of the weights that may stay dense.
    """

    share: float
    _loss: dict[str, float] = field(default_factory=dict, init=False)
    _sparsity: dict[str, float] = field(default_factory=dict, init=False)
    _sizes: dict[str, int] = field(default_factory=dict, init=False)

    def measure(self, task: LinearTask, pattern: Pattern) -> Tensor:
        """See ``Allocation``: the loss, and the pattern's sparsity."""
        assert isinstance(pattern, NM), "a recipe checks it"
        group_NM = saliency_by_loss(task).reshape(-1, pattern.m)
        lost = group_NM.sort(dim=1).values[:, : pattern.m - pattern.n].sum()
        return torch.stack([lost.cpu(), torch.tensor(pattern.sparsity, dtype=torch.float64)])

    def note(self, block: int, name: str, size: int, measured: Tensor) -> None:
        """See ``Allocation``."""
        self._loss[name], self._sparsity[name] = measured.tolist()
        self._sizes[name] = size

    def allocate(self) -> dict[str, float]:
        """See ``Allocation``."""
        left = self.share * sum(self._sizes.values())
        for name in sorted(self._loss, key=lambda name: self._loss[name] / self._sizes[name], reverse=True):
            if self._sizes[name] <= left:
                left -= self._sizes[name]
                self._sparsity[name] = 0.0
        return self._sparsity


def quantile_places(count: int) -> Tensor:
    """Where the quantiles of ``count`` sorted numbers are; float32 knows no odd number beyond 2^24."""
    return torch.linspace(0, count - 1, QUANTILES, dtype=torch.float64).round().long()


def saliency_by_loss(task: LinearTask) -> Tensor:
    """r_o w_oi^2 / K_ii, what the loss feels when a weight goes and the others of its row make up for it; float64."""
    saliency_OD = task.weight_OD.double().square() / task.hessian.inverse_diagonal_D
    if task.row_weight_O is not None:
        saliency_OD = saliency_OD * task.row_weight_O.to(saliency_OD)[:, None]
    return saliency_OD.masked_fill(task.hessian.dead_D, 0.0)


def with_mean(value_N: Tensor, size_N: Tensor, mean: float) -> Tensor:
    """``value_N`` shifted by one constant and cut to [DENSEST, SPARSEST] so that its weighted mean is ``mean``.

    The cut reaches as far as ``mean`` where that is outside. float64, shape (N,).
    """
    lowest, highest = min(DENSEST, mean), max(SPARSEST, mean)

    def excess(shift: float) -> float:
        return float(((value_N + shift).clamp(lowest, highest) - mean) @ size_N)

    # The excess grows with the shift: bisect between where all are cut at one end or at the other.
    below, above = lowest - float(value_N.max()), highest - float(value_N.min())
    for _ in range(200):
        middle = 0.5 * (below + above)
        below, above = (middle, above) if excess(middle) < 0.0 else (below, middle)
    return (value_N + above).clamp(lowest, highest)
