"""What runs a sparse checkpoint, and what it gains: read from ``runtimes.yaml``, which is easy to bring up to date."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import date
from functools import cache
from pathlib import Path

import yaml
from pydantic import ConfigDict, TypeAdapter

from optima.patterns import NM, Pattern, Unstructured, parse_nm

DATA = Path(__file__).parent / "runtimes.yaml"
DENSE, ANY_ZEROS = "dense", "unstructured"
ROUNDING = 1e-3  # of a share of zeros: half of an odd number of weights is none
HEADING = ["runtime", "hardware", "gain over dense", "how", "source"]


@dataclass(frozen=True)
class Runtime:
    """What one runtime makes of zeros; the fields are explained at the head of ``runtimes.yaml``."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    runtime: str
    versions: str
    patterns: tuple[str, ...]
    hardware: str
    gain: str
    source: str
    checked: date
    note: str
    sparsity: float = 0.0

    @property
    def as_dense(self) -> bool:
        """True if it runs any checkpoint, and gains nothing from zeros."""
        return DENSE in self.patterns

    def takes(self, pattern: Pattern) -> bool:
        """Whether a linear pruned by ``pattern`` is more to it than a dense one."""
        return pattern.sparsity >= self.sparsity - ROUNDING and any(_fits(pattern, name) for name in self.patterns)


@cache
def runtimes() -> tuple[Runtime, ...]:
    """All that ``runtimes.yaml`` knows, those that gain nothing first."""
    found = TypeAdapter(tuple[Runtime, ...]).validate_python(yaml.safe_load(DATA.read_text(encoding="utf-8")))
    return tuple(sorted(found, key=lambda each: not each.as_dense))


def shares(weights: Mapping[Pattern, int]) -> list[tuple[Runtime, float]]:
    """The runtimes that have something to do with a model, each with the share of the pruned linears that it takes.

    Args:
        weights: how many weights the linears of each pattern have.
    """
    total = max(sum(weights.values()), 1)
    taken = [(each, sum(size for pattern, size in weights.items() if each.takes(pattern))) for each in runtimes()]
    return [(each, 1.0 if each.as_dense else size / total) for each, size in taken if each.as_dense or size]


def table_rows(weights: Mapping[Pattern, int]) -> list[list[str]]:
    """The same as the cells of a table, under ``HEADING``."""
    return [
        [
            each.runtime,
            each.hardware,
            each.gain + ("" if share == 1 else f" (for {share:.0%} of the pruned linears' weights)"),
            each.note,
            f"{each.source} ({each.checked})",
        ]
        for each, share in shares(weights)
    ]


def in_words(weights: Mapping[Pattern, int]) -> str:
    """In a sentence or two, as Markdown."""
    found = [each for each, _ in shares(weights)]
    dense = ", ".join(each.runtime for each in found if each.as_dense)
    others = ", ".join(each.runtime.partition(",")[0] for each in found if not each.as_dense)
    gains = f" Something is gained by {others}: see [what runs it](#what-runs-it)." if others else ""
    return f"Runs wherever the dense model runs, and in {dense} **no faster**.{gains}"


def weights_of(linears: Iterable[tuple[Pattern, int]]) -> dict[Pattern, int]:
    """Weights by pattern, from the pattern and size of each linear."""
    found: dict[Pattern, int] = {}
    for pattern, size in linears:
        found[pattern] = found.get(pattern, 0) + size
    return found


def named_pattern(text: str, sparsity: float) -> Pattern:
    """The pattern that a report names, as far as a runtime cares: n:m, or so many zeros anywhere."""
    return parse_nm(text) or Unstructured(min(max(sparsity, 1e-6), 1 - 1e-6))


def _fits(pattern: Pattern, name: str) -> bool:
    """Whether what has ``pattern`` has the pattern called ``name``, too: n:m has zeros, and 1:4 and 1:2 are 2:4."""
    if name == ANY_ZEROS:
        return True
    named = parse_nm(name)
    if named is None or not isinstance(pattern, NM):
        return False
    if named.m % pattern.m == 0:
        return pattern.n * (named.m // pattern.m) <= named.n
    return pattern.m % named.m == 0 and pattern.n <= named.n
