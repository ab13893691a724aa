"""How long our row solver takes, against peers on the same rows at the same true gap.

    python benchmarks/qp.py --dump-dir DUMP         # linears of a model, written by dump.py
    python benchmarks/qp.py --synthetic 640 2048    # generated linears

Every method solves rows under Wanda's mask at 50%, damping 0.01, one shared Hessian:

* ours at a certified gap, from the Hessian to the weights of all rows, factorisation included;
* MPAX raPDHG, the paper's solver, in the two forms of its public interface, with exact bounds and the loosest
  tolerance (to half a decade) whose true gap is at most the gap of ours. The sparse form is the package's default;
  it takes the iterations of the dense form, and its time per iteration is measured on four rows;
* a batched Cholesky of each row's own matrix in float64, against ours at a gap of 1e-6.

True gaps are relative to that Cholesky, for the rows that it covers. Ours and a peer run in turn; milliseconds and
ratios are medians over --repeats turns after a warm-up, which compiles. Calls above five seconds have one turn. Prints
Markdown.

Shapes: R rows, D inputs.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from harness.cases import SOLVER_NAMES, Case, load_cases, solver_of, synthetic_case
from harness.machine import machine, timed, use_threads
from qp_peers.direct import cholesky_rows
from torch import Tensor

from optima.core import Hessian, RowProblem, RowSolution, certify, solve_rows
from optima.reporting.markdown import table

SPARSITY = 0.5
EXACT_GAP = 1e-6  # of ours, where the peer is exact
ORACLE_FLOPS, ORACLE_ROWS = 5e10, 512  # limits of the Cholesky's rows
LONG_SECONDS = 5.0
SPARSE = "MPAX, sparse"
SPARSE_ROWS, SPARSE_INPUTS = 4, 1024  # the sparse form copies the matrix for each row
COLUMNS = ("linear", "inputs", "method", "rows", "true gap", "iterations", "ms per row", "x ours")


@dataclass(frozen=True)
class Peer:
    """A call, its rows and what is known of its answer."""

    name: str
    call: Callable[[], object]
    rows: int
    gap: float
    iterations: str = ""
    sparse: float | None = None  # time of an iteration of the sparse form, relative


class Bench:
    """One linear, with what every method is measured against."""

    def __init__(self, case: Case, options: argparse.Namespace) -> None:
        self.case, self.options, self.device = case, options, torch.device(options.device)
        self.hessian = Hessian(case.hessian_DD)
        self.problem = case.problem(self.hessian, SPARSITY)
        kept = case.num_inputs * (1.0 - SPARSITY)
        self.covered = int(min(max(ORACLE_FLOPS / (kept**3 / 3 + 1), 8), ORACLE_ROWS, case.num_rows))
        self.optimal_R = self.error(self.direct())

    def rows(self, count: int) -> RowProblem:
        return self.problem.rows(slice(0, count))

    def direct(self) -> Tensor:
        return cholesky_rows(self.hessian, self.rows(self.covered), torch.float64)

    def ours(self, gap: float) -> RowSolution:
        return solve_rows(solver_of(self.options.solver, gap), Hessian(self.case.hessian_DD), self.problem)

    def error(self, weight_RD: Tensor) -> Tensor:
        """E(v) in float64."""
        return certify(self.hessian, self.rows(len(weight_RD)), weight_RD).error_R

    def true_gap(self, weight_RD: Tensor) -> float:
        """Largest relative suboptimality over the rows that the Cholesky covers."""
        weight_RD = weight_RD[: self.covered]
        return float((self.error(weight_RD) / self.optimal_R[: len(weight_RD)] - 1.0).max().clamp_min(0.0))

    def compare(self, gap: float, peers: list[Peer]) -> list[list[str]]:
        """Rows of the table: ours at ``gap``, and each peer in turn with it."""
        call = partial(self.ours, gap)
        solution = call()
        counts_R, times = solution.iterations_R.float(), []
        printed = []
        for peer in peers:
            turns: list[tuple[float, float]] = []
            while len(turns) < self.options.repeats and max(map(sum, turns), default=0.0) < LONG_SECONDS:
                turns.append((timed(call, self.device)[0], timed(peer.call, self.device)[0]))
            times += [own for own, _ in turns]
            milliseconds = 1e3 * statistics.median(other for _, other in turns) / peer.rows
            ratio = statistics.median(other / own for own, other in turns) * self.case.num_rows / peer.rows
            for name, longer in ((peer.name, 1.0), (SPARSE, peer.sparse)):
                if longer is not None:
                    cells = (f"{milliseconds * longer:.3g}", f"{ratio * longer:,.1f}")
                    printed.append(self.line(name, peer.rows, peer.gap, peer.iterations, *cells))
        iterations = f"{counts_R.mean():.0f}, max {counts_R.max():.0f}"
        own = f"{1e3 * statistics.median(times) / self.case.num_rows:.3g}", ""
        name, reached = f"ours, {gap:.0e}", self.true_gap(solution.weight_RD)
        return [self.line(name, self.case.num_rows, reached, iterations, *own), *printed]

    def line(self, name: str, rows: int, gap: float, *cells: str) -> list[str]:
        return [self.case.name, str(self.case.num_inputs), name, str(rows), f"{gap:.1e}", *cells]


def mpax(bench: Bench) -> list[Peer]:
    """The dense form at the loosest tolerance that reaches the gap, unless --peer-seconds end it before; the sparse."""
    from qp_peers.mpax_pdhg import STRETCH, MpaxRows, masked_weight

    count = min(bench.options.peer_rows, bench.covered)
    rows = MpaxRows.build(bench.hessian, bench.rows(count))

    def seconds_of(few: MpaxRows, form: str, stretches: int) -> float:
        few.solve(form, 0.0, 1)  # compiles
        return timed(lambda: few.solve(form, 0.0, stretches), bench.device)[0]

    limit = max(int(4 * bench.options.peer_seconds / seconds_of(rows, "dense", 4)), 1)

    def peer(tolerance: float) -> Peer:
        correction_RD, iterations_R = rows.solve("dense", tolerance, limit)
        gap = bench.true_gap(masked_weight(bench.rows(count), correction_RD))
        call = partial(rows.solve, "dense", tolerance, limit)
        return Peer("MPAX, dense", call, count, gap, f"{iterations_R.mean():.0f}, max {iterations_R.max()}")

    tolerance, wanted = 1.0, bench.options.gap
    dense = peer(tolerance)
    while dense.gap > wanted and f"max {limit * STRETCH}" not in dense.iterations:
        tolerance /= 10.0**0.5
        dense = peer(tolerance)
    if bench.case.num_inputs <= SPARSE_INPUTS:
        few = MpaxRows.build(bench.hessian, bench.rows(SPARSE_ROWS))
        sparse = (seconds_of(few, "sparse", 9) - seconds_of(few, "sparse", 1)) / SPARSE_ROWS
        each = (seconds_of(rows, "dense", 9) - seconds_of(rows, "dense", 1)) / count
        return [replace(dense, sparse=sparse / each)]
    return [dense]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dump-dir", type=Path, help="linears of a model, one safetensors file each")
    parser.add_argument("--match", default="", help="regex on the names of dumped linears")
    parser.add_argument("--synthetic", type=int, nargs="*", default=[], help="inputs of generated linears")
    parser.add_argument("--rows", type=int, default=640, help="largest number of rows of a linear")
    parser.add_argument("--gap", type=float, default=1e-4)
    parser.add_argument("--solver", default="auto", choices=SOLVER_NAMES, help="ours")
    parser.add_argument("--peer-rows", type=int, default=64, help="rows of MPAX")
    parser.add_argument("--peer-seconds", type=float, default=60.0, help="of one call of MPAX")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu", help="of ours and the Cholesky; MPAX runs where jax does")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    use_threads(options.threads)
    device = torch.device(options.device)
    print(machine(device, options.threads))
    cases = load_cases(options.dump_dir, options.match, device, options.rows) if options.dump_dir else []
    cases += [synthetic_case(size, options.rows, device) for size in options.synthetic]
    if not find_spec("mpax"):
        print("Without MPAX: pip install 'optima-prune[bench]'")
    lines = []
    for case in cases:
        bench = Bench(case, options)
        lines += bench.compare(options.gap, mpax(bench)) if find_spec("mpax") else []
        lines += bench.compare(EXACT_GAP, [Peer("Cholesky, float64", bench.direct, bench.covered, 0.0)])
    print(table(COLUMNS, lines, num_left=3))


if __name__ == "__main__":
    main()
