"""How one global sparsity is shared out over the linears, from a survey of the dense model's layers.

Every method observes each layer once and then gives every linear its sparsity; the mean, weighted by the numbers of
weights, is the global sparsity.

Shapes: O outputs, D inputs, R sampled rows, N blocks or linears, P points of a curve.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from optima.errors import RecipeError
from optima.patterns import Unstructured
from optima.qp.auto import Auto
from optima.qp.problem import make_problem
from optima.qp.rows import rows_per_chunk
from optima.selectors.base import LinearTask
from optima.selectors.ranking import top_scores
from optima.selectors.wanda import wanda_score

ALLOCATION_NAMES = ("uniform", "owl", "error")
# No linear is left dense or empty, however far the global sparsity and the spread reach.
SPARSEST, DENSEST = 0.99, 0.01


class Allocation(Protocol):
    """Shares out a global sparsity. Sees one layer at a time: never a model or a file."""

    def observe(self, block: int, task: LinearTask) -> None:
        """Take note of a dense layer of the block number ``block``."""
        ...

    def allocate(self) -> dict[str, float]:
        """Full name and sparsity of every linear observed; their weighted mean is the global sparsity."""
        ...


def make_allocation(
    name: str, sparsity: float, spread: float | None = None, outlier_multiple: float = 5.0
) -> Allocation | None:
    """The allocation called ``name``; None for ``uniform``, which needs no survey.

    Args:
        name: ``uniform``, ``owl`` or ``error``.
        sparsity: the global sparsity.
        spread: how far a linear may depart from it, see the methods; None is the method's own default.
        outlier_multiple: OWL's M.

    Raises:
        RecipeError: if the name is unknown or a value is out of range.
    """
    if name not in ALLOCATION_NAMES:
        raise RecipeError(f"unknown allocation {name!r}: known allocations are {', '.join(ALLOCATION_NAMES)}")
    if spread is not None and not 0.0 < spread < 1.0:
        raise RecipeError(f"allocation_spread must be strictly between 0 and 1, got {spread}: for example 0.1")
    if not 0.0 < outlier_multiple < float("inf"):
        raise RecipeError(f"outlier_multiple must be positive, got {outlier_multiple}: for example 5")
    if name == "owl":
        return Owl(sparsity, outlier_multiple, Owl.spread if spread is None else spread)
    if name == "error":
        return LeastError(sparsity, LeastError.spread if spread is None else spread)
    if spread is not None:
        raise RecipeError("allocation_spread is for allocation owl or error: uniform has none")
    return None


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

    def observe(self, block: int, task: LinearTask) -> None:
        """See ``Allocation``. The layers of a block must come one after the other."""
        if block not in self._sizes:
            self._end_block()
        self._sizes.setdefault(block, {})[task.name] = task.weight_OD.numel()
        # A block's scores wait for its mean in main memory.
        self._scores.append(wanda_score(task.weight_OD, task.hessian).float().flatten().cpu())

    def allocate(self) -> dict[str, float]:
        """See ``Allocation``."""
        self._end_block()
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


@dataclass
class LeastError:
    """The allocation with the least sum of relative reconstruction errors, from measured curves.

    A linear's curve of error against sparsity is measured on a sample of its rows: Wanda's mask at each of a few
    sparsities and the exact solve of its weights. The same rows at every sparsity make a smooth curve. Between the
    points the error is taken as exponential, which it nearly is; on the lower convex hull of each curve the greedy
    choice of the cheapest weights is optimal.

    Args:
        sparsity: the global sparsity S.
        spread: each linear's sparsity is within this of S.
        rows: rows sampled of each linear.
        points: sparsities measured, evenly spaced over the range.
    """

    sparsity: float
    spread: float = 0.15
    rows: int = 32
    points: int = 5
    _sizes: dict[str, int] = field(default_factory=dict, init=False)
    _errors: dict[str, list[float]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        lowest = max(self.sparsity - self.spread, min(DENSEST, self.sparsity))
        highest = min(self.sparsity + self.spread, max(SPARSEST, self.sparsity))
        self._measured_P = torch.linspace(lowest, highest, self.points, dtype=torch.float64)

    def observe(self, block: int, task: LinearTask) -> None:
        """See ``Allocation``."""
        self._sizes[task.name] = task.weight_OD.numel()
        self._errors[task.name] = error_curve(task, self._measured_P.tolist(), self.rows)

    def allocate(self) -> dict[str, float]:
        """See ``Allocation``."""
        fine = 20 * (self.points - 1) + 1
        grid_P = torch.linspace(float(self._measured_P[0]), float(self._measured_P[-1]), fine, dtype=torch.float64)
        curve_NP = torch.stack([_exponential(errors, fine) for errors in self._errors.values()])
        sparsities = least_sum(grid_P, curve_NP, list(self._sizes.values()), self.sparsity)
        return dict(zip(self._sizes, sparsities, strict=True))


def error_curve(task: LinearTask, sparsities: Sequence[float], num_rows: int) -> list[float]:
    """Estimate of a layer's relative reconstruction error at each sparsity, from ``num_rows`` of its rows.

    Wanda's mask within each row, weights solved to a gap of 1 part in 100. Rows are drawn in proportion to the cost of
    removing their pruned weights one at a time, w_j^2 / (H^-1)_jj (optimal brain surgeon), which all rows' true errors
    follow within a factor of two: 32 rows of 14 linears of Gemma 3 270M came within 4% of all.
    """
    middle = Unstructured(sparsities[len(sparsities) // 2], "row")
    chunks = task.weight_OD.split(rows_per_chunk(task.hessian.num_inputs))
    cost_O = torch.cat([_removal_cost(weight_RD, task, middle) for weight_RD in chunks])
    dense, cost = float(task.hessian.loss(task.weight_OD).sum()), float(cost_O.sum())
    if not dense or not cost:
        return [0.0] * len(sparsities)
    # Systematic sampling: one row at the middle of each equal share of the cost.
    share_R = (torch.arange(num_rows, dtype=torch.float64, device=cost_O.device) + 0.5) / num_rows
    index_R = torch.searchsorted(cost_O.cumsum(0) / cost, share_R).clamp_max(len(cost_O) - 1)
    weight_RD = task.weight_OD[index_R]
    score_RD = wanda_score(weight_RD, task.hessian)
    solver = Auto(gap=1e-2)
    errors = []
    for sparsity in sparsities:
        keep_RD = top_scores(score_RD, Unstructured(sparsity, "row"))
        solution = solver.solve(task.hessian, make_problem(task.hessian, weight_RD, keep_RD))
        error_R = task.hessian.loss(weight_RD - solution.weight_RD)
        errors.append(float((error_R / cost_O[index_R]).mean()) * cost / dense)
    return errors


def _removal_cost(weight_RD: Tensor, task: LinearTask, pattern: Unstructured) -> Tensor:
    """Each row's cost of removing the weights that Wanda prunes, each as if it were the only one; float64."""
    gone_RD = ~top_scores(wanda_score(weight_RD, task.hessian), pattern) & ~task.hessian.dead_D
    return (weight_RD.double().square() / task.hessian.inverse_diagonal_D * gone_RD).sum(dim=1)


def least_sum(grid_P: Tensor, curve_NP: Tensor, sizes: Sequence[int], mean: float) -> list[float]:
    """One sparsity a curve such that the curves sum to the least and the sparsities' weighted mean is ``mean``.

    Args:
        grid_P: increasing sparsities, float64, around ``mean``.
        curve_NP: each linear's errors there, float64, finite.
        sizes: weights of each linear.
        mean: the weighted mean to meet.

    Returns:
        The optimum over the curves' lower convex hulls: the segments of all hulls are taken in the order of their
        cost per weight until the mean is met, the last of them in part.
    """
    segments: list[tuple[float, int, float]] = []
    for linear, (curve_P, size) in enumerate(zip(curve_NP, sizes, strict=True)):
        corners = _lower_hull(grid_P.tolist(), curve_P.tolist())
        for (before, low), (after, high) in pairwise(corners):
            segments.append(((high - low) / (after - before) / size, linear, after - before))
    # Slopes grow along a hull, so a stable sort keeps each linear's own order.
    segments.sort(key=lambda segment: segment[0])
    sparsities = [float(grid_P[0])] * len(sizes)
    left = (mean - float(grid_P[0])) * sum(sizes)
    for _, linear, width in segments:
        step = min(width, max(left, 0.0) / sizes[linear])
        sparsities[linear] += step
        left -= step * sizes[linear]
    return sparsities


def _lower_hull(x: Sequence[float], y: Sequence[float]) -> list[tuple[float, float]]:
    """Corners of the lower convex hull of points with increasing ``x``."""
    hull: list[tuple[float, float]] = []
    for point in zip(x, y, strict=True):
        while len(hull) > 1 and _turns_down(hull[-2], hull[-1], point):
            hull.pop()
        hull.append(point)
    return hull


def _turns_down(first: tuple[float, float], second: tuple[float, float], third: tuple[float, float]) -> bool:
    return (second[1] - first[1]) * (third[0] - first[0]) >= (third[1] - first[1]) * (second[0] - first[0])


def _exponential(errors: Sequence[float], fine: int) -> Tensor:
    """Errors at evenly spaced points interpolated to ``fine`` points, piecewise exponential, never falling."""
    log_P = torch.tensor(errors, dtype=torch.float64).clamp_min(1e-30).log().cummax(0).values
    return torch.nn.functional.interpolate(log_P[None, None], fine, mode="linear", align_corners=True)[0, 0].exp()
