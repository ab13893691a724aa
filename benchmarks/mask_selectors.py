"""Which mask leaves the least error once the weights are re-solved, and what it costs to find: every selector.

    optima prune MODEL --output-dir OUT --dump-layer .
    python benchmarks/mask_selectors.py --dump-dir OUT/layers --threads 2

Every mask is followed by the same certified solve. Prints, for each pattern, the geometric mean over the linears of the
relative reconstruction error, its ratio to that of ALPS, and the seconds of selection (and refinement, after a "+").
With --held-out-dir, layers dumped from other text, it also prints the error there of the weights that were fitted here.
What every row solver needs of a Hessian anyway, its factor and inverse, is made before the clock starts; what a method
needs beyond that is made once for all linears that share their inputs, as in a run, and is in its seconds.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from harness.cases import Case, load_cases
from harness.timing import use_threads
from torch import Tensor

from optima.patterns import Pattern, parse_table
from optima.pipeline import RelativeError
from optima.qp import Auto, Hessian, make_problem, solve_rows
from optima.selectors.base import Layer, Selector, make_selector
from optima.selectors.swaps import SwapRefinement

METHODS = [
    "magnitude", "wanda", "ria", "sparsegpt", "thanos", "admm", "alps", "optima", "wanda+swaps", "alps+swaps",
    "optima+swaps",
]  # fmt: skip
PEER = "alps"


@dataclass(frozen=True)
class Entry:
    """One method on one linear."""

    method: str
    pattern: str
    linear: str
    error: float
    seconds: float
    error_held_out: float | None = None
    swaps: int = 0
    rows: int = 0
    rows_swap_optimal: int = 0


def main(arguments: list[str] | None = None) -> list[Entry]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dump-dir", type=Path, required=True, help="layers that optima prune --dump-layer wrote")
    parser.add_argument("--held-out-dir", type=Path, help="the same layers, dumped from other text")
    parser.add_argument("--match", default="", help="regular expression that chooses layers by name")
    parser.add_argument("--patterns", nargs="+", default=["0.5", "0.6", "0.7", "2:4"], help="sparsities, n:m patterns")
    parser.add_argument("--scope", choices=["row", "layer"], help="of all methods (default: each one's own)")
    parser.add_argument("--methods", nargs="+", default=METHODS, help="selectors, with +swaps for a refined mask")
    parser.add_argument("--candidates", type=int, default=64, help="of a row in a round of swaps; 0 to prove every row")
    parser.add_argument("--rounds", type=int, default=8, help="most rounds of swaps at exact prices")
    parser.add_argument("--damping", type=float, default=0.01)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, help="write the results as JSON, after every group of linears")
    options = parser.parse_args(arguments)
    use_threads(options.threads)
    swaps = SwapRefinement(options.rounds, options.candidates or 64, options.candidates or None)
    entries: list[Entry] = []
    cpu = torch.device("cpu")
    other = load_cases(options.held_out_dir, options.match, cpu) if options.held_out_dir else []
    held_out = {case.name: Hessian(case.hessian_DD, options.damping) for case in other}
    for group in sharing(load_cases(options.dump_dir, options.match, cpu)):
        for text in options.patterns:
            for method in options.methods:
                name, _, refined = method.partition("+")
                selector = make_selector(name)
                pattern = parse_table([text], options.scope or selector.published_scope).default
                assert pattern is not None
                hessian = Hessian(group[0].hessian_DD, options.damping)
                assert hessian.inverse_DD is not None
                for case in group:
                    layer = Layer(case.name, case.weight_OD, hessian)
                    entry, weight_OD = measure(method, text, layer, selector, pattern, swaps if refined else None)
                    if case.name in held_out:
                        error = RelativeError(held_out[case.name], case.weight_OD)(weight_OD)
                        entry = replace(entry, error_held_out=error)
                    entries.append(entry)
        print(f"{', '.join(case.name for case in group)}: done", flush=True)
        if options.output:
            options.output.write_text(json.dumps([asdict(entry) for entry in entries], indent=1) + "\n")
    print_table("error (of ALPS's) / seconds", entries, options)
    if held_out:
        there = [replace(entry, error=entry.error_held_out) for entry in entries if entry.error_held_out is not None]
        print_table("held-out error (of ALPS's) / seconds", there, options)
    return entries


def sharing(cases: Sequence[Case]) -> Iterator[list[Case]]:
    """The linears in groups that have the same Hessian."""
    left = list(cases)
    while left:
        group = [case for case in left if torch.equal(case.hessian_DD, left[0].hessian_DD)]
        yield group
        left = [case for case in left if all(case is not other for other in group)]


def measure(
    method: str, text: str, layer: Layer, selector: Selector, pattern: Pattern, swaps: SwapRefinement | None
) -> tuple[Entry, Tensor]:
    """Select, refine, solve; also returns the weights."""
    started = time.perf_counter()
    keep_OD = selector.select(layer, pattern).keep_OD
    refined = None if swaps is None else swaps.refine(layer.hessian, layer.weight_OD, keep_OD, pattern)
    seconds = time.perf_counter() - started
    keep_OD = keep_OD if refined is None else refined.keep_OD
    solution = solve_rows(Auto(), layer.hessian, make_problem(layer.hessian, layer.weight_OD, keep_OD))
    error = RelativeError(layer.hessian, layer.weight_OD)(solution.weight_RD)
    rows = len(keep_OD)
    if refined is None:
        return Entry(method, text, layer.name, error, seconds, rows=rows), solution.weight_RD
    swaps_made, proven = int(refined.swaps_O.sum()), int(refined.optimal_O.sum())
    entry = Entry(method, text, layer.name, error, seconds, None, swaps_made, rows, proven)
    return entry, solution.weight_RD


def print_table(title: str, entries: Sequence[Entry], options: argparse.Namespace) -> None:
    print(f"\n| {title} | " + " | ".join(options.patterns) + " |")
    print("| --- |" + " ---: |" * len(options.patterns))
    for method in options.methods:
        cells = []
        for pattern in options.patterns:
            mean, seconds = summary(entries, method, pattern)
            peer = summary(entries, PEER, pattern)[0]
            ratio = f" ({mean / peer:.3f})" if peer else ""
            cells.append(f"{mean:.5f}{ratio} / {seconds:.0f} s")
        print(f"| {method} | " + " | ".join(cells) + " |")


def summary(entries: Sequence[Entry], method: str, pattern: str) -> tuple[float, float]:
    """Geometric mean of the errors, and the sum of the seconds; zeros where nothing was measured."""
    mine = [entry for entry in entries if entry.method == method and entry.pattern == pattern]
    logs = [math.log(max(entry.error, 1e-30)) for entry in mine]
    return (math.exp(sum(logs) / len(logs)) if logs else 0.0), sum(entry.seconds for entry in mine)


if __name__ == "__main__":
    main()
