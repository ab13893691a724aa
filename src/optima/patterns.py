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
class Given(Unstructured):
    """The sparsity that an external mask happens to have: any, and of no pattern that is known."""

    def __post_init__(self) -> None:
        """Nothing is asked, so nothing can be wrong."""

    def __str__(self) -> str:
        return "external"


Pattern = Unstructured | NM


@dataclass(frozen=True)
class PatternTable:
    """Which pattern each linear takes: that of the first entry whose regex matches its full name, else the default.

    Attributes:
        entries: regex (``re.search``) and pattern, in the order in which they are tried.
        default: the pattern of linears that no entry matches; None if there is none.
    """

    entries: tuple[tuple[str, Pattern], ...] = ()
    default: Pattern | None = None

    @property
    def patterns(self) -> list[Pattern]:
        """Every pattern in the table."""
        return [pattern for _, pattern in self.entries] + ([] if self.default is None else [self.default])

    def assign(self, linears: Mapping[str, int]) -> dict[str, Pattern]:
        """The pattern of every linear, checked against its number of inputs.

        Args:
            linears: full name and number of inputs of each linear to prune.

        Raises:
            RecipeError: if a linear has no pattern or one that does not fit it, or an entry decides nothing.
        """
        assigned, deciding = {}, set[int]()
        default = (len(self.entries), ("", self.default))
        for name, num_inputs in linears.items():
            matching = (each for each in enumerate(self.entries) if re.search(each[1][0], name))
            number, (_, pattern) = next(matching, default)
            ignore = f"leave it out with --ignore '{re.escape(name)}'"
            if pattern is None:
                raise RecipeError(
                    f"no entry of pattern matches {name}: add one without a regex, such as 0.5, for all other linears, "
                    f"or {ignore}"
                )
            if isinstance(pattern, NM) and num_inputs % pattern.m:
                raise RecipeError(
                    f"pattern {pattern} needs a number of inputs divisible by {pattern.m}, but {name} has "
                    f"{num_inputs}: choose another pattern or {ignore}"
                )
            assigned[name] = pattern
            deciding.add(number)
        for number, (regex, _) in enumerate(self.entries):
            if number not in deciding:
                raise RecipeError(
                    f"pattern entry {regex!r} decides nothing: it matches none of the linears to prune, or earlier "
                    f"entries took them all; list them with optima plan, the first is {next(iter(linears))}"
                )
        return assigned


def parse_table(texts: Sequence[str], scope: Scope) -> PatternTable:
    """Read entries of the form ``n:m``, ``0.6``, ``REGEX=n:m`` or ``REGEX=0.6``.

    Args:
        texts: the entries; those without a regex are the default, of which there may be one.
        scope: of the unstructured entries.

    Raises:
        RecipeError: naming the entry that cannot be read, its regex or its value.
    """
    entries: list[tuple[str, Pattern]] = []
    default: Pattern | None = None
    for text in texts:
        # A regex may contain "=", a pattern cannot.
        regex, separator, value = text.rpartition("=")
        pattern = _parse_pattern(value.strip(), text, scope)
        if not separator:
            if default is not None:
                raise RecipeError(f"pattern has two entries for all linears, {default} and {pattern}: keep one of them")
            default = pattern
            continue
        if not regex:
            raise RecipeError(f"pattern {text!r} has no regex before '=': leave out the '=' to mean all linears")
        try:
            re.compile(regex)
        except re.error as error:
            raise RecipeError(f"pattern {text!r}: {regex!r} is not a regular expression: {error}") from error
        entries.append((regex, pattern))
    return PatternTable(tuple(entries), default)


def pattern_texts(value: Any) -> Any:
    """Of a recipe's file, where a sparsity may be written as a number, and null means that there is none."""
    items = [] if value is None else value if isinstance(value, list | tuple) else [value]
    # 2:4 unquoted is a base-60 integer in YAML 1.1.
    if any(isinstance(item, int) for item in items):
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


def group_width(pattern: Pattern, num_inputs: int) -> int:
    """Inputs within which a pattern's counts are exact: weights may be exchanged inside a group of so many."""
    if isinstance(pattern, NM):
        return pattern.m
    return pattern.group_size if pattern.scope == "group" else max(num_inputs, 1)
