"""How far masks are from the best: simulated annealing of swaps at exact prices, row by row.

    optima prune MODEL --output-dir OUT --dump-layer . --objective plain --dataset TEXT
    python benchmarks/headroom.py --dump-dir OUT/layers --match '\\.9\\.'

Prints, for a few rows of each linear, the optimal error of OPTIMA's mask, of ALPS's and OPTIMA's after greedy swaps to
a one-swap optimum, and of the better of OPTIMA's after annealing or greedy swaps: geometric means, relative to ALPS's.
All masks prune rows alike, and every error is that of the optimal weights, in float64. What annealing finds is no
proof of the best mask, but it crosses what stops greedy swaps: where it gains little, there is little to gain.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
from harness.cases import Case, load_cases
from harness.timing import use_threads
from torch import Tensor

from optima.linalg.statistics import Statistics
from optima.patterns import NM, Pattern, group_width, parse_table
from optima.qp import Hessian
from optima.selectors.base import LinearTask, make_selector
from optima.swaps.pivots import Tableau
from optima.swaps.search import SwapSearch, System, solve, tableau_of

COLUMNS = ("optima", "alps, greedy swaps", "optima, greedy swaps", "annealed")
REBUILD = 500  # accepted swaps after which rounding has had its time
BATCH = 4096  # proposals priced at once


def main(arguments: list[str] | None = None) -> list[list[float]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dump-dir", type=Path, required=True, help="layers that optima prune --dump-layer wrote")
    parser.add_argument("--match", default="", help="regular expression that chooses layers by name")
    parser.add_argument("--pattern", default="0.5", help="sparsity or n:m pattern")
    parser.add_argument("--rows", type=int, default=4, help="of each linear, evenly spaced")
    parser.add_argument("--proposals", type=int, default=30_000_000, help="swaps that annealing tries in a row")
    parser.add_argument("--hot", type=float, default=1e-3, help="first temperature, of the row's error")
    parser.add_argument("--cold", type=float, default=1e-6, help="last one")
    parser.add_argument("--damping", type=float, default=0.01)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    use_threads(options.threads)
    pattern = parse_table([options.pattern], "row").default
    assert pattern is not None
    print("| linear | " + " | ".join(COLUMNS) + " | seconds |")
    print("| --- |" + " ---: |" * (len(COLUMNS) + 1))
    means = []
    for case in load_cases(options.dump_dir, options.match, torch.device("cpu")):
        started = time.perf_counter()
        means.append(measure(case, pattern, options))
        cells = " | ".join(f"{mean:.4f}" for mean in means[-1])
        print(f"| {case.name} | {cells} | {time.perf_counter() - started:.0f} |", flush=True)
    return means


def measure(case: Case, pattern: Pattern, options: argparse.Namespace) -> list[float]:
    """Geometric means of the errors over rows, relative to ALPS's, in the order of ``COLUMNS``."""
    hessian, weight_OD = Hessian(case.hessian_DD, options.damping), case.weight_OD.double()
    task = LinearTask(case.name, case.weight_OD, Statistics(hessian))
    rows = torch.linspace(0, case.num_rows - 1, min(options.rows, case.num_rows)).long()
    keep = {name: make_selector(name).select(task, pattern).keep_OD[rows] for name in ("alps", "optima")}
    as_given, greedy = SwapSearch(rounds=0), SwapSearch(rounds=1000)

    def errors(search: SwapSearch, keep_RD: Tensor) -> Tensor:
        return search.search(hessian, weight_OD[rows], keep_RD, pattern).error_O

    generator = torch.Generator().manual_seed(0)
    annealed = [
        anneal(hessian, weight_OD[row : row + 1], keep_D[None], pattern, options, generator)
        for row, keep_D in zip(rows.tolist(), keep["optima"], strict=True)
    ]
    base_R = errors(as_given, keep["alps"])
    results = [
        errors(as_given, keep["optima"]),
        errors(greedy, keep["alps"]),
        errors(greedy, keep["optima"]),
        torch.minimum(errors(greedy, torch.cat(annealed)), errors(greedy, keep["optima"])),
    ]
    return [math.exp(float((error_R / base_R).log().mean())) for error_R in results]


def anneal(
    hessian: Hessian,
    weight_1D: Tensor,
    keep_1D: Tensor,
    pattern: Pattern,
    options: argparse.Namespace,
    generator: torch.Generator,
) -> Tensor:
    """Metropolis' rule on random swaps of one row, the temperature falling geometrically; returns the last mask."""
    tableau, error = full_tableau(hessian, weight_1D, keep_1D, pattern)
    width, grouped = group_width(pattern, weight_1D.shape[1]), isinstance(pattern, NM)
    done = accepted = 0
    while done < options.proposals:
        temperature = options.hot * (options.cold / options.hot) ** (done / options.proposals) * error
        taken = propose(tableau, width, grouped, temperature, generator)
        done += taken[0] + 1 if taken else BATCH
        if taken is None:
            continue
        for index in taken[1:]:
            tableau.pivot(torch.tensor([index]))
        accepted += 1
        if accepted % REBUILD == 0:
            tableau, _ = full_tableau(hessian, weight_1D, tableau.kept_AB, pattern)
    return tableau.kept_AB.clone()


def full_tableau(hessian: Hessian, weight_AD: Tensor, keep_AD: Tensor, pattern: Pattern) -> tuple[Tableau, float]:
    """The tableau of all inputs, float64, and the largest optimal error of the rows, to study what swaps can do."""
    system = System(hessian, torch.float64, pattern)
    optimum = solve(system, weight_AD.double() * system.norm_D, keep_AD)
    every_AB = torch.arange(system.num_inputs, device=keep_AD.device).expand(len(keep_AD), -1)
    return tableau_of(system, optimum, every_AB), float(optimum.error_A.max())


def propose(
    tableau: Tableau, width: int, grouped: bool, temperature: float, generator: torch.Generator
) -> tuple[int, int, int] | None:
    """The first of a batch of random swaps that is accepted: how many came before it, who leaves and who enters."""
    kept_B = tableau.kept_AB[0]
    inside, outside = kept_B.nonzero()[:, 0], (~kept_B).nonzero()[:, 0]
    leaving_P = inside[torch.randint(len(inside), (BATCH,), generator=generator)]
    if grouped:
        entering_P = leaving_P // width * width + torch.randint(width, (BATCH,), generator=generator)
    else:
        entering_P = outside[torch.randint(len(outside), (BATCH,), generator=generator)]
    matrix_BB, value_B = tableau.matrix_ABB[0], tableau.value_AB[0]
    own_B = matrix_BB.diagonal()
    share_P, shared_P = value_B[leaving_P] / own_B[leaving_P], matrix_BB[leaving_P, entering_P]
    gain_P = (value_B[entering_P] + share_P * shared_P).square()
    gain_P /= own_B[entering_P] + shared_P.square() / own_B[leaving_P]
    change_P = 0.5 * (share_P * value_B[leaving_P] - gain_P)
    chance_P = torch.rand(BATCH, generator=generator, dtype=torch.float64)
    accepted = ((chance_P.log() < -change_P / temperature) & ~kept_B[entering_P]).nonzero()[:, 0]
    if not len(accepted):
        return None
    first = int(accepted[0])
    return first, int(leaving_P[first]), int(entering_P[first])


if __name__ == "__main__":
    main()
