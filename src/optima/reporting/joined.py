"""Experts of one place as one record, for what shows each linear: a page of 30,000 rows would be of use to nobody."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from optima.names import kind
from optima.reporting.record import LinearRecord, geometric_mean, largest, name_in_block, weighted_mean

# Linears that a page shows one by one.
MOST_SHOWN = 2000
JOINED = "this {} shows the experts of a block as one linear a kind: report.json has each"
ADDED = ("rows", "rows_not_converged", "swaps", "rows_swap_optimal", "seconds")
LARGEST = (
    "gap_max",
    "gap_written_max",
    "gap_median",
    "gap_written_median",
    "loss_written",
    "damping",
    "iterations_max",
)
LIKE_ERRORS = ("error", "error_mask", "error_selector", "error_plain")


def joined(linears: Sequence[LinearRecord], most: int = MOST_SHOWN) -> tuple[LinearRecord, ...]:
    """``linears``, or, if they are more than ``most``, with those of one block that differ in a number alone joined.

    Errors are geometric means, gaps and medians of them the largest, rows and seconds sums; tokens the fewest.
    """
    if len(linears) <= most:
        return tuple(linears)
    alike: dict[tuple[int, str], list[LinearRecord]] = {}
    for linear in linears:
        alike.setdefault((linear.block, kind(name_in_block(linear))), []).append(linear)
    return tuple(members[0] if len(members) == 1 else _one(members) for members in alike.values())


def _one(members: Sequence[LinearRecord]) -> LinearRecord:
    first, own = members[0], name_in_block(members[0])
    effective = [linear.tokens_effective for linear in members if linear.tokens_effective is not None]
    patterns = {linear.pattern for linear in members}
    values: dict[str, Any] = {
        **{name: sum(getattr(linear, name) or 0 for linear in members) for name in ADDED},
        **{name: largest(getattr(linear, name) for linear in members) for name in LARGEST},
        **{name: geometric_mean(getattr(linear, name) for linear in members) for name in LIKE_ERRORS},
        "iterations_mean": _mean_iterations(members),
        "pattern": first.pattern if len(patterns) == 1 else f"{len(patterns)} patterns",
        "sparsity": weighted_mean(members, "sparsity"),
        "sparsity_asked": weighted_mean(members, "sparsity_asked"),
        "tokens": min(linear.tokens for linear in members),
        "tokens_effective": min(effective, default=None),
        "solver": "+".join(dict.fromkeys(name for linear in members for name in linear.solver.split("+"))),
        "name": first.name.removesuffix(own) + kind(own),
        "shape": (sum(linear.shape[0] for linear in members), first.shape[1]),
    }
    told = (name for name in values if any(getattr(linear, name) is not None for linear in members))
    return replace(first, **{name: values[name] for name in told})


def _mean_iterations(members: Sequence[LinearRecord]) -> float:
    """Over the rows that a solver worked on."""
    worked = [linear for linear in members if linear.gap_max is not None]
    rows = sum(linear.rows for linear in worked)
    return sum(linear.iterations_mean * linear.rows for linear in worked) / rows if rows else 0.0
