"""Which mask leaves the least error once the weights are re-solved, and what it costs to find: every selector.

    optima prune MODEL --output-dir OUT --dump-layer .
    python benchmarks/mask_selectors.py --dump-dir OUT/layers --threads 2

Every mask is followed by the same certified solve. Prints, for each pattern, the geometric mean over the linears of the
relative reconstruction error, its ratio to that of ALPS, and the seconds of selection (and refinement, after a "+");
then the ratio of errors with and without refinement.
With --held-out-dir, layers dumped from other text, it also prints the error there of the weights that were fitted here.
What every row solver needs of a Hessian anyway, its factor and inverse, is made before the clock starts; what a method
needs beyond that is made once for all linears that share their inputs, as in a run, and is in its seconds.
Swaps are slow: --rows chooses the mask of the whole linear, then refines, solves and measures some of its rows only.
--resume FILE keeps what --output wrote under the same options, however it ended, and goes on from there; --known-only
prints it for the linears that --match names, and needs no layers.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from harness.cases import Case, load_cases
from harness.timing import use_threads
from torch import Tensor

from optima.errors import OptimaError, RecipeError
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


# Options that decide an entry: files of other ones cannot be resumed.
DECIDING = ("scope", "rows", "candidates", "rounds", "damping")


def main(arguments: list[str] | None = None) -> list[Entry]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dump-dir", type=Path, help="layers that optima prune --dump-layer wrote")
    parser.add_argument("--held-out-dir", type=Path, help="the same layers, dumped from other text")
    parser.add_argument("--match", default="", help="regular expression that chooses layers by name")
    parser.add_argument("--patterns", nargs="+", default=["0.5", "0.6", "0.7", "2:4"], help="sparsities, n:m patterns")
    parser.add_argument("--scope", choices=["row", "layer"], help="of all methods (default: each one's own)")
    parser.add_argument("--methods", nargs="+", default=METHODS, help="selectors, with +swaps for a refined mask")
    parser.add_argument("--rows", type=int, help="evenly spaced rows of a linear to refine, solve and measure")
    parser.add_argument("--candidates", type=int, default=256, help="of a row in a round of swaps; 0: prove all rows")
    parser.add_argument("--rounds", type=int, default=8, help="most rounds of swaps at exact prices")
    parser.add_argument("--damping", type=float, default=0.01)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, help="write the results as JSON, after every group of linears")
    parser.add_argument("--resume", nargs="+", type=Path, default=[], metavar="FILE", help="keep the results of these")
    parser.add_argument("--known-only", action="store_true", help="run nothing; print what --resume finds")
    options = parser.parse_args(arguments)
    use_threads(options.threads)
    try:
        entries = known_entries(options)
    except OptimaError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    if not options.known_only:
        if options.dump_dir is None:
            parser.error("--dump-dir is needed, but with --known-only")
        run(entries, options)
    tables = [entry for entry in entries if re.search(options.match, entry.linear)]
    print(f"\n{len({entry.linear for entry in tables})} linears")
    print_table("error (of ALPS's) / seconds", tables, options)
    print_refinement(tables, options)
    there = [replace(entry, error=entry.error_held_out) for entry in tables if entry.error_held_out is not None]
    if there:
        print_table("held-out error (of ALPS's) / seconds", there, options)
    return entries


def run(entries: list[Entry], options: argparse.Namespace) -> None:
    """Add what is missing to ``entries``, and write them after every group of linears."""
    swaps = SwapRefinement(options.rounds, options.candidates or 64, options.candidates or None)
    known = {(entry.method, entry.pattern, entry.linear) for entry in entries}
    cpu = torch.device("cpu")
    other = load_cases(options.held_out_dir, options.match, cpu) if options.held_out_dir else []
    held_out = {case.name: Hessian(case.hessian_DD, options.damping) for case in other}
    for group in sharing(load_cases(options.dump_dir, options.match, cpu)):
        for text, method in itertools.product(options.patterns, options.methods):
            cases = [case for case in group if (method, text, case.name) not in known]
            name, _, refined = method.partition("+")
            selector = make_selector(name)
            pattern = parse_table([text], options.scope or selector.published_scope).default
            assert pattern is not None
            hessian = Hessian(group[0].hessian_DD, options.damping)
            if cases:
                assert hessian.inverse_DD is not None, "made before the clock starts"
            for case in cases:
                layer = Layer(case.name, case.weight_OD, hessian)
                refinement = swaps if refined else None
                entry, weight_RD, rows_R = measure(method, text, layer, selector, pattern, refinement, options.rows)
                if case.name in held_out:
                    error = RelativeError(held_out[case.name], case.weight_OD[rows_R])(weight_RD)
                    entry = replace(entry, error_held_out=error)
                entries.append(entry)
        print(f"{', '.join(case.name for case in group)}: done", flush=True)
        if options.output:
            save(entries, options)


def known_entries(options: argparse.Namespace) -> list[Entry]:
    """What earlier runs found.

    Raises:
        RecipeError: if one of them had other options.
    """
    entries: list[Entry] = []
    for file in options.resume:
        found = json.loads(file.read_text())
        for name in DECIDING:
            if found["options"][name] != getattr(options, name):
                here = getattr(options, name)
                raise RecipeError(f"{file} was made with --{name} {found['options'][name]}, not {here}: give the same")
        entries += [Entry(**entry) for entry in found["entries"]]
    return entries


def save(entries: Sequence[Entry], options: argparse.Namespace) -> None:
    """Whole or not at all: a run that is cut off while it writes must not lose what the earlier ones found."""
    found = {
        "options": {name: getattr(options, name) for name in DECIDING},
        "entries": [asdict(entry) for entry in entries],
    }
    unfinished = options.output.with_name(f".{options.output.name}.unfinished")
    unfinished.write_text(json.dumps(found, indent=1) + "\n")
    unfinished.replace(options.output)


def sharing(cases: Sequence[Case]) -> Iterator[list[Case]]:
    """The linears in groups that have the same Hessian."""
    left = list(cases)
    while left:
        group = [case for case in left if torch.equal(case.hessian_DD, left[0].hessian_DD)]
        yield group
        left = [case for case in left if all(case is not other for other in group)]


def measure(
    method: str,
    text: str,
    layer: Layer,
    selector: Selector,
    pattern: Pattern,
    swaps: SwapRefinement | None,
    most_rows: int | None,
) -> tuple[Entry, Tensor, Tensor]:
    """Select, refine, solve; also returns the weights, and which rows they are."""
    started = time.perf_counter()
    keep_OD = selector.select(layer, pattern).keep_OD
    rows_R = torch.linspace(0, len(keep_OD) - 1, min(most_rows or len(keep_OD), len(keep_OD))).round().long()
    keep_RD, dense_RD = keep_OD[rows_R], layer.weight_OD[rows_R]
    refined = None if swaps is None else swaps.refine(layer.hessian, dense_RD, keep_RD, pattern)
    seconds = time.perf_counter() - started
    keep_RD = keep_RD if refined is None else refined.keep_OD
    solution = solve_rows(Auto(), layer.hessian, make_problem(layer.hessian, dense_RD, keep_RD))
    error = RelativeError(layer.hessian, dense_RD)(solution.weight_RD)
    entry = Entry(method, text, layer.name, error, seconds, rows=len(rows_R))
    if refined is not None:
        swaps_made, proven = int(refined.swaps_O.sum()), int(refined.optimal_O.sum())
        entry = replace(entry, swaps=swaps_made, rows_swap_optimal=proven)
    return entry, solution.weight_RD, rows_R


def print_table(title: str, entries: Sequence[Entry], options: argparse.Namespace) -> None:
    print(f"\n| {title} | " + " | ".join(options.patterns) + " |")
    print("| --- |" + " ---: |" * len(options.patterns))
    for method in options.methods:
        cells = []
        for pattern in options.patterns:
            mean, seconds = summary(entries, method, pattern)
            ratio = ratio_of(entries, method, PEER, pattern)
            of_peer = "" if ratio is None else f" ({ratio:.3f})"
            cells.append(f"{mean:.5f}{of_peer} / {seconds:.0f} s" if mean else "")
        print(f"| {method} | " + " | ".join(cells) + " |")


def print_refinement(entries: Sequence[Entry], options: argparse.Namespace) -> None:
    """Errors of refined masks over those of the same masks without."""
    refined = [method for method in options.methods if "+" in method]
    if not refined:
        return
    print("\n| error with swaps / without | " + " | ".join(options.patterns) + " |")
    print("| --- |" + " ---: |" * len(options.patterns))
    for method in refined:
        ratios = [ratio_of(entries, method, method.partition("+")[0], pattern) for pattern in options.patterns]
        print(f"| {method} | " + " | ".join("" if ratio is None else f"{ratio:.3f}" for ratio in ratios) + " |")


def errors_of(entries: Sequence[Entry], method: str, pattern: str) -> dict[str, float]:
    """Error of every linear that was measured."""
    mine = [entry for entry in entries if entry.method == method and entry.pattern == pattern]
    return {entry.linear: max(entry.error, 1e-30) for entry in mine}


def ratio_of(entries: Sequence[Entry], method: str, other: str, pattern: str) -> float | None:
    """Geometric mean of one method's errors over another's, on the linears that both were measured on."""
    mine, peer = errors_of(entries, method, pattern), errors_of(entries, other, pattern)
    logs = [math.log(mine[linear] / peer[linear]) for linear in mine.keys() & peer.keys()]
    return math.exp(math.fsum(logs) / len(logs)) if logs else None


def summary(entries: Sequence[Entry], method: str, pattern: str) -> tuple[float, float]:
    """Geometric mean of the errors, and the sum of the seconds; zeros where nothing was measured."""
    logs = [math.log(error) for error in errors_of(entries, method, pattern).values()]
    seconds = [entry.seconds for entry in entries if entry.method == method and entry.pattern == pattern]
    return (math.exp(math.fsum(logs) / len(logs)) if logs else 0.0), math.fsum(seconds)


if __name__ == "__main__":
    main()
