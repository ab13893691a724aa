"""Which mask leaves the least error once the weights are re-solved, and what it costs to find: every selector.

    optima prune MODEL --output-dir OUT --dump-layer . --objective plain --dataset TEXT
    python benchmarks/mask_selectors.py --dump-dir OUT/layers --threads 2

Every mask is followed by the same certified solve. Prints, for each pattern, the geometric mean over the linears of the
relative reconstruction error, its ratio to that of ALPS, and the seconds of selection (and swaps, after a "+");
then the ratio of errors with and without swaps.
With --held-out-dir, layers dumped from other text, it also prints the error there of the weights that were fitted here.
What every row solver needs of a Hessian anyway, its factor and inverse, is made before the clock starts; what a method
needs beyond that is made once for all linears that share their inputs, as in a run, and is in its seconds.
Swaps are slow: --rows chooses the mask of the whole linear, then swaps, solves and measures some of its rows only,
and prints no seconds. A cell of fewer linears than the others says of how many, in [].
--resume FILE keeps what --output wrote under the same options, however it ended, and goes on from there; --known-only
prints it for the linears that --match names, and needs no layers.

Shapes: O outputs, R measured rows, D inputs.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import re
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from harness.cases import Case, load_cases
from harness.timing import use_threads
from torch import Tensor

from optima.build import PROOF_ROUNDS
from optima.device import Stopwatch
from optima.errors import OptimaError, RecipeError
from optima.linalg.statistics import Statistics
from optima.linear import Methods, prune_linear
from optima.patterns import NM, SCOPES, Given, Pattern, parse_table
from optima.qp import Auto, Hessian
from optima.selectors.base import LinearTask, Selection, Selector, make_selector
from optima.swaps.search import SwapSearch

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
    data: str = ""  # see ``fingerprint``


# By method, pattern and linear.
Entries = dict[tuple[str, str, str], Entry]

# Options that decide an entry: files of other ones cannot be resumed.
DECIDING = ("scope", "rows", "candidates", "rounds", "damping")


def main(arguments: list[str] | None = None) -> list[Entry]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dump-dir", type=Path, help="layers that optima prune --dump-layer wrote")
    parser.add_argument("--held-out-dir", type=Path, help="the same layers, dumped from other text")
    parser.add_argument("--match", default="", help="regular expression that chooses layers by name")
    parser.add_argument("--patterns", nargs="+", default=["0.5", "0.6", "0.7", "2:4"], help="sparsities, n:m patterns")
    parser.add_argument("--scope", choices=SCOPES, help="of all methods (default: each one's own)")
    parser.add_argument("--methods", nargs="+", default=METHODS, help="selectors, with +swaps for swaps behind")
    parser.add_argument("--rows", type=int, help="evenly spaced rows of a linear to swap, solve and measure")
    parser.add_argument("--candidates", type=int, default=256, help="of a row in a round of swaps; 0: prove all rows")
    parser.add_argument("--rounds", type=int, help="most rounds of swaps at exact prices (default: the recipe's)")
    parser.add_argument("--damping", type=float, default=0.01)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, help="write the results as JSON, after every group of linears")
    parser.add_argument("--resume", nargs="+", type=Path, default=[], metavar="FILE", help="keep the results of these")
    parser.add_argument("--known-only", action="store_true", help="run nothing; print what --resume finds")
    options = parser.parse_args(arguments)
    if options.rounds is None:
        options.rounds = SwapSearch().rounds if options.candidates else PROOF_ROUNDS
    use_threads(options.threads)
    if not options.known_only and options.dump_dir is None:
        parser.error("--dump-dir is needed, but with --known-only")
    if options.output and options.output.exists() and options.output not in options.resume:
        parser.error(f"{options.output} exists: go on from it with --resume {options.output}, or name another file")
    try:
        entries = known_entries(options)
        if not options.known_only:
            run(entries, options)
    except OptimaError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    asked = [
        entry
        for entry in entries.values()
        if entry.method in options.methods
        and entry.pattern in options.patterns
        and re.search(options.match, entry.linear)
    ]
    print(f"\n{len({entry.linear for entry in asked})} linears")
    print_table("error (of ALPS's)", asked, options)
    print_swaps(asked, options)
    there = [replace(entry, error=entry.error_held_out) for entry in asked if entry.error_held_out is not None]
    if there:
        print_table("held-out error (of ALPS's)", there, options)
    return list(entries.values())


def run(entries: Entries, options: argparse.Namespace) -> None:
    """Add what is missing to ``entries``, and write them after every group of linears."""
    swaps = SwapSearch(options.rounds, options.candidates or 64, options.candidates or None)
    cpu = torch.device("cpu")
    other = load_cases(options.held_out_dir, options.match, cpu) if options.held_out_dir else []
    held_out = {case.name: case for case in other}
    for group in sharing(load_cases(options.dump_dir, options.match, cpu)):
        data = {case.name: fingerprint(case, held_out.get(case.name)) for case in group}
        for text, method in itertools.product(options.patterns, options.methods):
            cases = [case for case in group if is_missing(entries.get((method, text, case.name)), data[case.name])]
            if not cases:
                continue
            name, _, swapped = method.partition("+")
            selector = make_selector(name)
            pattern = parse_table([text], options.scope or selector.published_scope).default
            assert pattern is not None
            hessian = Hessian(group[0].hessian_DD, options.damping)
            assert hessian.inverse_DD is not None, "made before the clock starts"
            for case in cases:
                task = LinearTask(case.name, case.weight_OD, Statistics(hessian))
                chosen = swaps if swapped else None
                entry, weight_RD, rows_R = measure(method, text, task, selector, pattern, chosen, options.rows)
                if case.name in held_out:
                    elsewhere = Hessian(held_out[case.name].hessian_DD, options.damping)
                    error = relative_loss(elsewhere, case.weight_OD[rows_R], weight_RD)
                    entry = replace(entry, error_held_out=error)
                entries[method, text, case.name] = replace(entry, data=data[case.name])
        print(f"{', '.join(case.name for case in group)}: done", flush=True)
        if options.output:
            save(entries, options)


def fingerprint(case: Case, held_out: Case | None) -> str:
    """Of the numbers that an entry is measured on."""
    tensors = [case.hessian_DD, case.weight_OD, *([] if held_out is None else [held_out.hessian_DD])]
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()[:16]


def is_missing(entry: Entry | None, data: str) -> bool:
    """Whether a linear is still to be measured.

    Raises:
        RecipeError: if it was measured, but on other numbers.
    """
    if entry is not None and entry.data != data:
        raise RecipeError(f"{entry.linear} was measured on another model or other text: leave its file out of --resume")
    return entry is None


def known_entries(options: argparse.Namespace) -> Entries:
    """What earlier runs found.

    Raises:
        RecipeError: if one of them had other options.
    """
    entries: Entries = {}
    for file in options.resume:
        if not file.exists():
            raise RecipeError(f"{file} does not exist: leave it out of --resume")
        found = json.loads(file.read_text())
        for name in DECIDING:
            if found["options"][name] != getattr(options, name):
                here = getattr(options, name)
                raise RecipeError(f"{file} was made with --{name} {found['options'][name]}, not {here}: give the same")
        for values in found["entries"]:
            entry = Entry(**values)
            entries[entry.method, entry.pattern, entry.linear] = entry
    return entries


def save(entries: Entries, options: argparse.Namespace) -> None:
    """Whole or not at all: a run that is cut off while it writes must not lose what the earlier ones found."""
    found = {
        "options": {name: getattr(options, name) for name in DECIDING},
        "entries": [asdict(entry) for entry in entries.values()],
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


@dataclass(frozen=True)
class Chosen:
    """A mask that has been selected already."""

    keep_OD: Tensor
    published_scope = "row"

    def select(self, task: LinearTask, pattern: Pattern) -> Selection:
        return Selection(self.keep_OD)


def measure(
    method: str,
    text: str,
    task: LinearTask,
    selector: Selector,
    pattern: Pattern,
    swaps: SwapSearch | None,
    most_rows: int | None,
) -> tuple[Entry, Tensor, Tensor]:
    """Select for all rows, swap and solve some; also returns the weights, and which rows they are."""
    started = time.perf_counter()
    keep_OD = selector.select(task, pattern).keep_OD
    seconds = time.perf_counter() - started
    rows_R = torch.linspace(0, len(keep_OD) - 1, min(most_rows or len(keep_OD), len(keep_OD))).round().long()
    clock = Stopwatch(keep_OD.device)
    some = replace(task, weight_OD=task.weight_OD[rows_R])
    # A layer's count does not hold for some of its rows.
    own = pattern if isinstance(pattern, NM) else Given(pattern.sparsity, pattern.scope, pattern.group_size)
    methods = Methods(Chosen(keep_OD[rows_R]), swaps, Auto())
    result = prune_linear(some, own, methods, clock=clock)
    record = result.record
    seconds += clock.seconds["select"]
    entry = Entry(method, text, task.name, record.error, seconds, rows=len(rows_R))
    if swaps is not None:
        entry = replace(entry, swaps=record.swaps, rows_swap_optimal=record.rows_swap_optimal)
    return entry, result.weight_OD, rows_R


def relative_loss(hessian: Hessian, dense_OD: Tensor, weight_OD: Tensor) -> float:
    """||X (V - W)^T||_F^2 / ||X W^T||_F^2."""
    return float(hessian.loss(weight_OD - dense_OD).sum() / hessian.loss(dense_OD).sum())


def print_table(title: str, entries: Sequence[Entry], options: argparse.Namespace) -> None:
    every = len({entry.linear for entry in entries})
    print(f"\n| {title}{'' if options.rows else ' / seconds'} | " + " | ".join(options.patterns) + " |")
    print("| --- |" + " ---: |" * len(options.patterns))
    for method in options.methods:
        cells = []
        for pattern in options.patterns:
            errors = errors_of(entries, method, pattern)
            ratio = ratio_of(entries, method, PEER, pattern)
            cell = f"{geometric_mean(errors.values()):.5f}" if errors else ""
            cell += "" if ratio is None else f" ({ratio:.3f})"
            if errors and not options.rows:
                cell += f" / {seconds_of(entries, method, pattern):.0f} s"
            cells.append(cell + (f" [{len(errors)}]" if 0 < len(errors) < every else ""))
        print(f"| {method} | " + " | ".join(cells) + " |")


def print_swaps(entries: Sequence[Entry], options: argparse.Namespace) -> None:
    """Errors of masks improved by swaps over those of the same masks without."""
    swapped = [method for method in options.methods if "+" in method]
    if not swapped:
        return
    print("\n| error with swaps / without | " + " | ".join(options.patterns) + " |")
    print("| --- |" + " ---: |" * len(options.patterns))
    for method in swapped:
        ratios = [ratio_of(entries, method, method.partition("+")[0], pattern) for pattern in options.patterns]
        print(f"| {method} | " + " | ".join("" if ratio is None else f"{ratio:.3f}" for ratio in ratios) + " |")


def errors_of(entries: Sequence[Entry], method: str, pattern: str) -> dict[str, float]:
    """Error of every linear that was measured."""
    mine = [entry for entry in entries if entry.method == method and entry.pattern == pattern]
    return {entry.linear: max(entry.error, 1e-30) for entry in mine}


def ratio_of(entries: Sequence[Entry], method: str, other: str, pattern: str) -> float | None:
    """Geometric mean of one method's errors over another's, on the linears that both were measured on."""
    mine, peer = errors_of(entries, method, pattern), errors_of(entries, other, pattern)
    ratios = [mine[linear] / peer[linear] for linear in mine.keys() & peer.keys()]
    return geometric_mean(ratios) if ratios else None


def geometric_mean(values: Collection[float]) -> float:
    return math.exp(math.fsum(map(math.log, values)) / len(values))


def seconds_of(entries: Sequence[Entry], method: str, pattern: str) -> float:
    return math.fsum(entry.seconds for entry in entries if entry.method == method and entry.pattern == pattern)


if __name__ == "__main__":
    main()
