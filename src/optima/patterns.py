"""Sparsity patterns, and the top-k that applies them to a score with exact counts.

Shapes: O outputs (rows), D inputs, G groups of m consecutive inputs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from optima.errors import RecipeError

Scope = Literal["row", "layer"]


@dataclass(frozen=True)
class Unstructured:
    """Prune a fraction of the weights, ranked within each row or over the whole linear.

    Attributes:
        sparsity: fraction of weights to prune, strictly between 0 and 1.
        scope: ``row`` prunes the same number in every output row (Wanda), ``layer`` ranks all weights together.
    """

    sparsity: float
    scope: Scope = "row"

    def __post_init__(self) -> None:
        if not 0.0 < self.sparsity < 1.0:
            raise RecipeError(f"sparsity must be strictly between 0 and 1, got {self.sparsity}: for example 0.5")
        if self.scope not in ("row", "layer"):
            raise RecipeError(f"unknown scope {self.scope!r}: known scopes are row, layer")

    def __str__(self) -> str:
        return f"{self.sparsity:g} per {self.scope}"

    def pruned_count(self, size: int) -> int:
        """Number of weights to prune out of ``size``."""
        return round(self.sparsity * size)


@dataclass(frozen=True)
class NM:
    """Keep ``n`` of every ``m`` consecutive inputs of each row ("2:4")."""

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 0 < self.n < self.m:
            raise RecipeError(f"pattern {self.n}:{self.m} keeps n of m weights and needs 0 < n < m: for example 2:4")

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def sparsity(self) -> float:
        """Fraction of weights pruned."""
        return 1.0 - self.n / self.m


Pattern = Unstructured | NM


def parse_nm(text: str) -> NM:
    """Read ``"2:4"`` as ``NM(2, 4)``.

    Raises:
        RecipeError: if the text is not of the form ``n:m``.
    """
    match = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", text)
    if match is None:
        raise RecipeError(f"pattern {text!r} is not of the form n:m (n kept of m inputs): for example 2:4")
    return NM(int(match[1]), int(match[2]))


def check_pattern(pattern: Pattern, num_inputs: int, name: str) -> None:
    """Raise ``RecipeError`` naming the linear if ``pattern`` cannot be applied to ``num_inputs`` inputs."""
    if isinstance(pattern, NM) and num_inputs % pattern.m:
        raise RecipeError(
            f"pattern {pattern} needs a number of inputs divisible by {pattern.m}, but {name} has {num_inputs}: "
            f"choose another pattern or leave it out with --ignore '{re.escape(name)}'"
        )


def top_scores(score_OD: Tensor, pattern: Pattern) -> Tensor:
    """Keep the highest scores that ``pattern`` allows.

    Counts are exact and ties are broken by position (the first of equals is pruned first), so the result is
    the same on every device.

    Args:
        score_OD: importance of each weight, any float dtype; higher is kept.
        pattern: what to keep.

    Returns:
        keep_OD: boolean, True = the weight survives.
    """
    num_outputs, num_inputs = score_OD.shape
    if isinstance(pattern, NM):
        grouped = score_OD.reshape(-1, pattern.m)
        return keep_all_but_lowest(grouped, pattern.m - pattern.n).reshape(num_outputs, num_inputs)
    if pattern.scope == "layer":
        flat = score_OD.reshape(1, -1)
        return keep_all_but_lowest(flat, pattern.pruned_count(flat.numel())).reshape(num_outputs, num_inputs)
    return keep_all_but_lowest(score_OD, pattern.pruned_count(num_inputs))


def keep_all_but_lowest(score_RN: Tensor, count: int) -> Tensor:
    """True everywhere but at the ``count`` lowest scores of each row."""
    lowest = score_RN.argsort(dim=1, stable=True)[:, :count]
    keep_RN = torch.ones_like(score_RN, dtype=torch.bool)
    return keep_RN.scatter_(1, lowest, False)
