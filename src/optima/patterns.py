"""Sparsity patterns, and the top-k that applies them to a score with exact counts.

Shapes: O outputs (rows), D inputs, G groups of m consecutive inputs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from optima.errors import RecipeError

Scope = Literal["row", "layer", "group", "balanced"]
SCOPES = get_args(Scope)
GROUP_SIZE = 128
# Scope ``balanced`` divides a row's scores by its threshold to this power: 0 would be scope layer, 1 nearly scope row.
BALANCE = 0.7
# Thresholds below this part of the largest count as this part of it: a row may have more zeros than it loses weights.
SMALLEST_THRESHOLD = 1e-6
# Up to this many columns, comparing all pairs is the fastest way to rank them.
SMALLEST_SELECTED = 16


@dataclass(frozen=True)
class Unstructured:
    """Prune a fraction of the weights, ranked within rows, groups of columns or the whole linear, or in between.

    A linear of ``size`` weights loses ``round(sparsity * size)`` of them in every scope. Where rows or groups cannot
    all lose the same whole number, their counts are differences of cumulative counts, so they differ by at most one.

    Attributes:
        sparsity: fraction of weights to prune, strictly between 0 and 1.
        scope: ``row`` meets it in every output row (Wanda), ``group`` in every ``group_size`` consecutive inputs over
            all rows (SparseGPT, Thanos), ``layer`` ranks all weights together, ``balanced`` does so once the scores of
            each row are divided by the row's threshold in scope ``row`` to the power 0.7: rows differ, but less.
        group_size: inputs in a group; the last group holds what is left. No matter in the other scopes.
    """

    sparsity: float
    scope: Scope = "row"
    group_size: int = GROUP_SIZE

    def __post_init__(self) -> None:
        if not 0.0 < self.sparsity < 1.0:
            raise RecipeError(f"sparsity must be strictly between 0 and 1, got {self.sparsity}: for example 0.5")
        if self.scope not in SCOPES:
            raise RecipeError(f"unknown scope {self.scope!r}: known scopes are {', '.join(SCOPES)}")
        if self.group_size < 1:
            raise RecipeError(f"group_size must be at least 1, got {self.group_size}: for example {GROUP_SIZE}")

    def __str__(self) -> str:
        if self.scope == "balanced":
            return f"{self.sparsity:g} balanced"
        return f"{self.sparsity:g} per {self.scope}" + (f" of {self.group_size}" if self.scope == "group" else "")

    def pruned_count(self, size: int) -> int:
        """Number of weights to prune out of ``size``."""
        return round(self.sparsity * size)

    def pruned_in_rows(self, num_rows: int, num_inputs: int) -> Tensor:
        """Number of weights to prune in each row, int64 of shape (num_rows,), which sum to that of the linear."""
        sizes = torch.arange(num_rows + 1, dtype=torch.float64) * num_inputs
        return (self.sparsity * sizes).round().long().diff()

    def pruned_in_columns(self, num_rows: int, begin: int, end: int) -> int:
        """Number of weights to prune in columns ``begin`` to ``end`` of all rows; consecutive ranges add up."""
        return self.pruned_count(num_rows * end) - self.pruned_count(num_rows * begin)


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


@dataclass(frozen=True)
class PatternTable:
    """Which pattern each linear takes: that of the first entry whose regex matches its full name, else the default.

    Attributes:
        entries: regex (``re.search``) and pattern, in the order in which they are tried.
        default: the pattern of linears that no entry matches; None if there is none.
        shares: sparsity of each linear by its full name, instead of its unstructured pattern's.
    """

    entries: tuple[tuple[str, Pattern], ...] = ()
    default: Pattern | None = None
    shares: Mapping[str, float] = field(default_factory=dict)

    @property
    def patterns(self) -> list[Pattern]:
        """Every pattern in the table."""
        return [pattern for _, pattern in self.entries] + ([] if self.default is None else [self.default])

    def of(self, name: str) -> Pattern:
        """The pattern of the linear ``name``.

        Raises:
            RecipeError: if no entry matches and there is no default.
        """
        pattern = next((pattern for regex, pattern in self.entries if re.search(regex, name)), self.default)
        if pattern is None:
            raise RecipeError(
                f"no entry of pattern matches {name}: add one without a regex, such as 0.5, for all other linears, "
                f"or leave it out with --ignore '{re.escape(name)}'"
            )
        if isinstance(pattern, Unstructured) and name in self.shares:
            return replace(pattern, sparsity=self.shares[name])
        return pattern

    def share(self, shares: Mapping[str, float]) -> PatternTable:
        """The table with the sparsity that an allocation gave to each linear."""
        return replace(self, shares=shares)

    def assign(self, linears: Mapping[str, int]) -> dict[str, Pattern]:
        """The pattern of every linear, checked against its number of inputs.

        Args:
            linears: full name and number of inputs of each linear to prune.

        Raises:
            RecipeError: if a linear has no pattern or one that does not fit it, or an entry decides nothing.
        """
        assigned = {name: self.of(name) for name in linears}
        for name, pattern in assigned.items():
            check_pattern(pattern, linears[name], name)
        waiting = list(linears)
        for regex, _ in self.entries:
            left = [name for name in waiting if not re.search(regex, name)]
            if len(left) == len(waiting):
                raise RecipeError(
                    f"pattern entry {regex!r} decides nothing: it matches none of the linears to prune, or earlier "
                    f"entries took them all; list them with optima plan, the first is {next(iter(linears))}"
                )
            waiting = left
        return assigned


def parse_table(texts: Sequence[str], scope: Scope, group_size: int = GROUP_SIZE) -> PatternTable:
    """Read entries of the form ``n:m``, ``0.6``, ``REGEX=n:m`` or ``REGEX=0.6``.

    Args:
        texts: the entries; those without a regex are the default, of which there may be one.
        scope: of the unstructured entries.
        group_size: of the unstructured entries, for scope ``group``.

    Raises:
        RecipeError: naming the entry that cannot be read, its regex or its value.
    """
    entries: list[tuple[str, Pattern]] = []
    default: Pattern | None = None
    for text in texts:
        # A regex may contain "=", a pattern cannot.
        regex, separator, value = text.rpartition("=")
        pattern = _parse_pattern(value.strip(), text, scope, group_size)
        if separator:
            _check_regex(regex, text)
            entries.append((regex, pattern))
        elif default is not None:
            raise RecipeError(f"pattern has two entries for all linears, {default} and {pattern}: keep one of them")
        else:
            default = pattern
    return PatternTable(tuple(entries), default)


def _parse_pattern(value: str, entry: str, scope: Scope, group_size: int) -> Pattern:
    if ":" in value:
        return parse_nm(value)
    try:
        sparsity = float(value)
    except ValueError as error:
        raise RecipeError(
            f"pattern {entry!r} is not of the form n:m (2:4), a sparsity (0.6), or REGEX= and one of these (mlp=2:4)"
        ) from error
    return Unstructured(sparsity, scope, group_size)


def _check_regex(regex: str, entry: str) -> None:
    if not regex:
        raise RecipeError(f"pattern {entry!r} has no regex before '=': leave out the '=' to mean all linears")
    try:
        re.compile(regex)
    except re.error as error:
        raise RecipeError(f"pattern {entry!r}: {regex!r} is not a regular expression: {error}") from error


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
    if pattern.scope == "row":
        return keep_all_but_lowest(score_OD, pattern.pruned_in_rows(num_outputs, num_inputs))
    score_OD = across_rows(score_OD, pattern)
    width = pattern.group_size if pattern.scope == "group" else num_inputs
    keep_OD = torch.empty_like(score_OD, dtype=torch.bool)
    for begin in range(0, num_inputs, width or 1):
        end = min(begin + width, num_inputs)
        group = score_OD[:, begin:end]
        count = pattern.pruned_in_columns(num_outputs, begin, end)
        keep_OD[:, begin:end] = keep_all_but_lowest(group.reshape(1, -1), count).reshape(group.shape)
    return keep_OD


def across_rows(score_OD: Tensor, pattern: Unstructured) -> Tensor:
    """The scores as those of different rows are compared: in units of their rows if the scope is ``balanced``."""
    return score_OD / row_units(score_OD, pattern) if pattern.scope == "balanced" else score_OD


def row_units(score_OD: Tensor, pattern: Unstructured) -> Tensor:
    """What scope ``balanced`` divides the scores of each row by, positive, float32 or wider, of shape (O, 1)."""
    if not score_OD.numel():
        return torch.ones_like(score_OD[:, :1])
    score_OD = score_OD.to(torch.promote_types(score_OD.dtype, torch.float32))
    threshold_O1 = _kth_lowest(score_OD, max(pattern.pruned_count(score_OD.shape[1]), 1))
    finite = torch.finfo(score_OD.dtype)
    least = (threshold_O1.max() * SMALLEST_THRESHOLD).clamp(finite.tiny, finite.max)
    return threshold_O1.clamp(least, torch.full_like(least, finite.max)).pow_(BALANCE)


def keep_all_but_lowest(score_RN: Tensor, count: int | Tensor) -> Tensor:
    """True everywhere but at the ``count`` lowest scores of each row; a tensor gives each row its own count."""
    if isinstance(count, int):
        few = score_RN.shape[1] <= SMALLEST_SELECTED
        return _keep_by_rank(score_RN, count) if few else _keep_by_threshold(score_RN, count, count)
    count_R1 = count.to(score_RN.device, torch.int64)[:, None]
    least, most = map(int, count.aminmax()) if count.numel() else (0, 0)
    if most - least <= 1:
        return _keep_by_threshold(score_RN, count_R1, most)
    order_RN = score_RN.argsort(dim=1, stable=True)
    rank_N = torch.arange(score_RN.shape[1], device=score_RN.device)
    return torch.empty_like(score_RN, dtype=torch.bool).scatter_(1, order_RN, rank_N >= count_R1)


def _keep_by_rank(score_RN: Tensor, count: int) -> Tensor:
    """For a few columns: each element's rank is the number of comparisons that it wins, the later of equals winning."""
    columns = [column.contiguous() for column in score_RN.unbind(1)]
    ranks = [torch.zeros_like(column, dtype=torch.uint8) for column in columns]
    for later, ours in enumerate(columns):
        for earlier, theirs in enumerate(columns[:later]):
            wins = theirs <= ours
            ranks[later] += wins
            ranks[earlier] += ~wins
    return torch.stack([rank >= count for rank in ranks], dim=1) if ranks else torch.empty_like(score_RN).bool()


def _keep_by_threshold(score_RN: Tensor, count: int | Tensor, most: int) -> Tensor:
    """A selection is linear in the number of scores where a sort is not; ``count`` is ``most`` or one less."""
    num_rows, size = score_RN.shape
    if not most or not num_rows:
        return torch.ones_like(score_RN, dtype=torch.bool)
    threshold_R1 = _kth_lowest(score_RN, most)
    keep_RN = score_RN > threshold_R1
    spare_R1 = size - count - keep_RN.sum(dim=1, keepdim=True)
    tied = (spare_R1[:, 0] > 0).nonzero()[:, 0]
    if len(tied):
        equal = score_RN[tied] == threshold_R1[tied]
        from_the_end = equal.flip(1).cumsum(dim=1).flip(1)
        keep_RN[tied] |= equal & (from_the_end <= spare_R1[tied])
    return keep_RN


def _kth_lowest(score_RN: Tensor, k: int) -> Tensor:
    if score_RN.device.type == "cpu":
        return score_RN.kthvalue(k, dim=1, keepdim=True).values
    return score_RN.sort(dim=1).values[:, k - 1 : k]  # kthvalue gives a row to one block of threads
