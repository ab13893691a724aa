"""What each allocation of one global sparsity costs the linears: Wanda's mask, weights re-solved.

    optima prune MODEL --output-dir OUT --dump-layer .
    python benchmarks/allocation.py --dump-dir OUT/layers

Prints a Markdown table: sum, geometric mean and largest of the relative reconstruction errors on dense inputs, weights
solved to a gap of 1e-2, and the time of the survey. Every dumped linear takes part.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from harness.cases import Case, load_cases

from optima.allocation import Owl
from optima.linalg.statistics import Statistics
from optima.linear import Methods, prune_linear
from optima.patterns import Unstructured
from optima.qp import Auto, Hessian
from optima.recipe import ALLOCATION_NAMES, OWL_SPREAD
from optima.selectors.base import LinearTask
from optima.selectors.wanda import Wanda


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dump-dir", type=Path, required=True, help="layers that optima prune --dump-layer wrote")
    parser.add_argument("--pattern", default="", help="regular expression that chooses layers by name")
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.6, 0.7])
    parser.add_argument("--spread", type=float, help="allocation_spread of the recipe (default: each method's own)")
    parser.add_argument("--damping", type=float, default=0.01)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, help="write the results as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    cases = sorted(load_cases(arguments.dump_dir, arguments.pattern, torch.device("cpu")), key=block_of)
    entries = [
        measure(cases, name, sparsity, None if name == "uniform" else arguments.spread, arguments.damping)
        for sparsity in arguments.sparsities
        for name in ALLOCATION_NAMES
    ]
    print_table(entries)
    if arguments.output:
        arguments.output.write_text(json.dumps({"entries": entries}, indent=2) + "\n", encoding="utf-8")


def block_of(case: Case) -> int:
    """Index of the block that holds the linear: the first number in its name."""
    found = re.search(r"\.(\d+)\.", case.name)
    return int(found[1]) if found else 0


def measure(cases: Sequence[Case], name: str, sparsity: float, spread: float | None, damping: float) -> dict[str, Any]:
    """Allocate, then prune every linear with its share."""
    started = time.perf_counter()
    allocation = None if name == "uniform" else Owl(sparsity, spread=spread or OWL_SPREAD)
    shares = {case.name: sparsity for case in cases}
    if allocation is not None:
        for case in cases:
            allocation.observe(
                block_of(case), LinearTask(case.name, case.weight_OD, Statistics(Hessian(case.hessian_DD, damping)))
            )
        shares = allocation.allocate()
    seconds = time.perf_counter() - started
    errors, pruned, total = {}, 0, 0
    for case in cases:
        task = LinearTask(case.name, case.weight_OD, Statistics(Hessian(case.hessian_DD, damping)))
        result = prune_linear(task, Unstructured(shares[case.name]), Methods(Wanda(), solver=Auto(gap=1e-2)))
        errors[case.name] = result.record.error
        pruned, total = pruned + int((~result.keep_OD).sum()), total + result.keep_OD.numel()
    reached = pruned / total
    return {
        "allocation": name, "sparsity": sparsity, "reached": reached, "seconds": seconds, "errors": errors,
        "shares": shares,
    }  # fmt: skip


def print_table(entries: Sequence[dict[str, Any]]) -> None:
    print("| sparsity | allocation | reached | sum of errors | geometric mean | largest | survey seconds |")
    print("| ---: | --- | ---: | ---: | ---: | ---: | ---: |")
    for entry in entries:
        errors = list(entry["errors"].values())
        mean = math.exp(math.fsum(map(math.log, errors)) / len(errors))
        print(
            f"| {entry['sparsity']:.0%} | {entry['allocation']} | {entry['reached']:.4%} | {math.fsum(errors):.3f} "
            f"| {mean:.4f} | {max(errors):.4f} | {entry['seconds']:.1f} |"
        )


if __name__ == "__main__":
    main()
