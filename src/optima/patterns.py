"""Sparsity patterns, and the table that gives each linear its own. No torch: recipes are checked before it loads."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from optima.errors import RecipeError

Scope = Literal["row", "layer", "group"]
SCOPES = get_args(Scope)
GROUP_SIZE = 128


@dataclass(frozen=True)
class Unstructured:
    """Prune a fraction of the weights, ranked within rows, groups of columns or the whole linear, or in between.

    A linear of ``size`` weights loses ``round(sparsity * size)`` of them in every scope. Where rows or groups cannot
    all lose the same whole number, their counts are differences of cumulative counts, so they differ by at most one.

    Attributes:
        sparsity: fraction of weights to prune, strictly between 0 and 1.
        scope: ``row`` meets it in every output row (Wanda), ``group`` in every ``group_size`` consecutive inputs over
            all rows (SparseGPT), ``layer`` ranks all weights together.
        group_size: inputs in a group; the last group may be smaller. Unused in the other scopes.
    """

    sparsity: float
    scope: Scope = "row"
    group_size: int = GROUP_SIZE

    def __post_init__(self) -> None:
        if not 0.0 < self.sparsity < 1.0:
            raise RecipeError(f"sparsity must be strictly between 0 and 1, got {self.sparsity}: for example 0.5")
        if self.scope not in SCOPES:
            raise RecipeError(f"unknown scope {self.scope!r}: known scopes are {', '.join(SCOPES)}")

    def __str__(self) -> str:
        return f"{self.sparsity:g} per {self.scope}" + (f" of {self.group_size}" if self.scope == "group" else "")

    def pruned_count(self, size: int) -> int:
        """Number of weights to prune out of ``size``."""
        return round(self.sparsity * size)

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


@dataclass(frozen=True)
class MaskPattern(Unstructured):
    """The sparsity of an external mask that follows no pattern."""

    def __post_init__(self) -> None:
        """A mask may prune everything."""

    def __str__(self) -> str:
        return "external"


Pattern = Unstructured | NM


@dataclass(frozen=True)
class PatternTable:
    """Which pattern each linear takes: that of the first entry whose regex matches its full name, else the default.

    Attributes:
        entries: regex (``re.search``) and pattern, in the order in which they are tried.
    """

    entries: tuple[tuple[str, Pattern], ...] = ()
    default: Pattern | None = None

    @property
    def patterns(self) -> list[Pattern]:
        """Every pattern in the table."""
        return [pattern for _, pattern in self.entries] + ([] if self.default is None else [self.default])

    def assign(self, linears: Mapping[str, int]) -> dict[str, Pattern]:
        """The pattern of each linear, of which ``linears`` has the full name and the number of inputs.

        Raises:
            RecipeError: if a linear has no pattern or one that does not fit it, or an entry is never used.
        """
        assigned, used = {}, set[int]()
        for name, num_inputs in linears.items():
            matching = (number for number, (regex, _) in enumerate(self.entries) if re.search(regex, name))
            number = next(matching, -1)
            pattern = self.default if number < 0 else self.entries[number][1]
            ignore = f"--ignore '{re.escape(name)}'"
            if pattern is None:
                raise RecipeError(
                    f"no entry of pattern matches {name}: add one without a regex, such as 0.5, or {ignore}"
                )
            if isinstance(pattern, NM) and num_inputs % pattern.m:
                raise RecipeError(
                    f"pattern {pattern} needs a number of inputs divisible by {pattern.m}, but {name} has "
                    f"{num_inputs}: choose another pattern or {ignore}"
                )
            assigned[name] = pattern
            used.add(number)
        for number, (regex, _) in enumerate(self.entries):
            if number not in used:
                raise RecipeError(
                    f"pattern entry {regex!r} decides nothing: it matches none of the linears to prune (the first is "
                    f"{next(iter(linears))}), or earlier entries match them all; optima plan lists the linears"
                )
        return assigned


def parse_table(texts: Sequence[str], scope: Scope) -> PatternTable:
    """Read entries of the form ``n:m``, ``0.6``, ``REGEX=n:m`` or ``REGEX=0.6``; one at most has no regex.

    Raises:
        RecipeError: if an entry cannot be read; the message names it.
    """
    entries: list[tuple[str, Pattern]] = []
    defaults: list[Pattern] = []
    for text in texts:
        regex, separator, value = text.rpartition("=")  # a regex may contain "=", a pattern cannot
        pattern = _parse_pattern(value.strip(), text, scope)
        if not separator:
            defaults.append(pattern)
            continue
        if not regex:
            raise RecipeError(f"pattern {text!r} has no regex before '=': leave out the '=' to mean all linears")
        try:
            re.compile(regex)
        except re.error as error:
            raise RecipeError(f"pattern {text!r}: {regex!r} is not a regular expression: {error}") from error
        entries.append((regex, pattern))
    if len(defaults) > 1:
        raise RecipeError(f"pattern has two entries for all linears, {defaults[0]} and {defaults[1]}: keep one of them")
    return PatternTable(tuple(entries), *defaults)


def pattern_texts(value: Any) -> Any:
    """The entries of a recipe's file, where a sparsity may be a number, and null is no entry."""
    items = [] if value is None else value if isinstance(value, list | tuple) else [value]
    if any(isinstance(item, int) for item in items):  # 2:4 unquoted is a base-60 integer in YAML 1.1
        raise RecipeError('quote the pattern, as in pattern: "2:4" (YAML reads it as a number)')
    return [str(item) if isinstance(item, float | NM) else item for item in items]


def parse_nm(text: str) -> NM | None:
    """The pattern n:m that ``text`` is, if it is one."""
    match = re.fullmatch(r"(\d+)\s*:\s*(\d+)", text)
    return NM(int(match[1]), int(match[2])) if match else None


def _parse_pattern(value: str, entry: str, scope: Scope) -> Pattern:
    if nm := parse_nm(value):
        return nm
    try:
        sparsity = float(value)
    except ValueError as error:
        raise RecipeError(
            f"pattern {entry!r} is not of the form n:m (2:4), a sparsity (0.6), or REGEX= and one of these (mlp=2:4)"
        ) from error
    return Unstructured(sparsity, scope)


NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


def kind(name: str) -> str:
    """The name with its numbers as ``*``: what linears at the same place of all blocks (and experts) share."""
    return NUMBER.sub("*", name)
