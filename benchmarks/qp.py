"""How fast, and how far from the optimum: optima's row solver against other methods on the same rows.

    python benchmarks/qp.py                                  # synthetic layers, 2 threads
    python benchmarks/qp.py --dump-dir DUMP                  # and real ones, written by dump.py
    python benchmarks/qp.py --device cuda --synthetic 4096 14336 --output qp.md

Methods: ours at several certified gaps; (a) the paper's solver, MPAX raPDHG, from its package; (b) diagonal CG as
ALPS runs it, and strengthened by all that serves ours, stopped by certificate and by an oracle; (c) batched Cholesky;
(d) OSQP and PIQP row by row; (e) the same matrix products with nothing between them. Seconds are medians after a
warm-up; compile time is excluded; what all rows share (factorising H) is in the seconds, and shown. The last lines
judge the promises of the engine.

Shapes: R rows, D inputs.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from harness import claims, table
from harness.cases import SOLVER_NAMES, Case, load_cases, solver_of, synthetic_case
from harness.table import Entry, power
from harness.timing import MatmulRate, Timed, profiled, timed, use_threads
from harness.wall_time import wall_time
from qp_peers import alps_cg, diagonal_cg
from qp_peers.diagonal_cg import PeerSolution
from qp_peers.direct import Solve, cholesky_rows, osqp_solve, piqp_solve, row_by_row
from rich.console import Console
from torch import Tensor

from optima.core import Hessian, LowRankCG, RowSolution, certify, make_problem, solve_rows

# Work spent on the float64 oracle of one case, in floating-point operations and rows: the rows it covers follow.
ORACLE_FLOPS = 5e10
ORACLE_ROWS = 512
PEERS = ["diagonal", "cholesky", "osqp", "piqp", "mpax"]


@dataclass
class Bench:
    """One case, prepared once, with what every method is measured against."""

    case: Case
    options: argparse.Namespace
    device: torch.device
    rate: MatmulRate

    def __post_init__(self) -> None:
        prepared = timed(self._prepare, self.device, self.options.repeats)
        self.hessian, self.prepare_seconds = prepared.result, prepared.seconds
        self.problem = self.case.problem(self.hessian, self.options.sparsity)
        self.ours: dict[float, Entry] = {}

    def _prepare(self) -> Hessian:
        hessian = Hessian(self.case.hessian_DD)
        hessian.operator(hessian.working_dtype)  # factorised, and cast for the iterations
        return hessian

    @cached_property
    def oracle(self) -> Timed[Tensor]:
        """Float64 Cholesky of the first rows, as many as ``ORACLE_FLOPS`` allows."""
        kept = self.case.num_inputs * (1.0 - self.options.sparsity)
        rows = int(min(max(ORACLE_FLOPS / (kept**3 / 3 + 1), 8), ORACLE_ROWS, self.case.num_rows))
        part = self.problem.rows(slice(0, rows))
        return timed(lambda: cholesky_rows(self.hessian, part, torch.float64), self.device, self.options.repeats)

    @cached_property
    def optimal_R(self) -> Tensor:
        """E(v*) of the oracle's rows."""
        return self.error(self.oracle.result)

    @cached_property
    def optimum_RD(self) -> Tensor:
        """v* of all rows: solved to 1e-10 in float64, and held against the oracle where there is one."""
        exact = make_problem(self.hessian, self.problem.target_RD.double(), self.problem.keep_RD)
        solution = solve_rows(LowRankCG(1e-10), self.hessian, exact)
        excess = solution.error_R[: len(self.optimal_R)] / self.optimal_R - 1.0
        assert float(excess.abs().max()) < 1e-8, "the reference solution disagrees with the float64 Cholesky"
        return solution.weight_RD

    def error(self, weight_RD: Tensor) -> Tensor:
        """E(v) in float64 for the first rows."""
        return certify(self.hessian, self.problem.rows(slice(0, len(weight_RD))), weight_RD).error_R

    def true_gap(self, weight_RD: Tensor) -> float:
        """Largest relative suboptimality over the rows that the oracle covers."""
        rows = min(len(weight_RD), len(self.optimal_R))
        return float((self.error(weight_RD[:rows]) / self.optimal_R[:rows] - 1.0).max().clamp_min(0.0))

    def entry(self, method: str, rows: int, seconds: float, against: float, **fields: object) -> Entry:
        """An entry of this case, compared with ours at gap ``against``."""
        ours = self.ours[against]
        entry = Entry(self.case.name, self.case.num_inputs, method, rows, seconds, against=against, **fields)  # type: ignore[arg-type]
        return replace(entry, ratio=ours.rows_per_second / entry.rows_per_second)

    def measured(self, method: str, solve: Callable[[], PeerSolution], against: float, **fields: object) -> Entry:
        """Time ``solve`` and hold its weights against the oracle."""
        run = timed(solve, self.device, self.options.repeats)
        peer = run.result
        return self.entry(
            method,
            len(peer.weight_RD),
            run.seconds,
            against,
            repeats=run.repeats,
            gap_true=self.true_gap(peer.weight_RD),
            gap_certified=None if peer.gap_R is None else float(peer.gap_R.max()),
            iterations="" if peer.iterations_R is None else iterations(peer.iterations_R),
            **fields,
        )


def ours(bench: Bench, gap: float) -> Entry:
    """Ours to a certified gap, and where its time goes."""
    solver, rows = solver_of(bench.options.solver, gap), bench.case.num_rows

    def solve(hessian: Hessian | None = None) -> RowSolution:
        return solve_rows(solver, hessian or Hessian(bench.case.hessian_DD), bench.problem)

    run = timed(solve, bench.device, bench.options.repeats)
    alone = timed(lambda: solve(bench.hessian), bench.device, bench.options.repeats)
    profiled(lambda: solve(bench.hessian), bench.device)  # the meter's own first use is slow
    profile = profiled(lambda: solve(bench.hessian), bench.device)
    entry = Entry(
        bench.case.name, bench.case.num_inputs, f"{solver.name} {power(gap)}", rows, run.seconds,
        bench.prepare_seconds, run.repeats, gap, gap, 1.0, iterations(run.result.iterations_R),
        float(run.result.gap_R.max()), bench.true_gap(run.result.weight_RD), profile.product_share,
        profile.dense_share, profile.floor_seconds(bench.rate) / alone.seconds, profile.rate_share(bench.rate, rows),
        ours=True, note=f"{100 * profile.dense_share:.0f}% in products and triangular solves",
    )  # fmt: skip
    bench.ours[gap] = entry
    return entry


def iterations(iterations_R: Tensor) -> str:
    return f"{float(iterations_R.float().mean()):.0f}, max {int(iterations_R.max())}"


def diagonal(bench: Bench, gap: float, needed_R: Tensor) -> list[Entry]:
    """(b) Diagonal CG strengthened, stopped by certificate (a product in the faster dtype) or oracle; as published."""
    rows, size = bench.case.num_rows, bench.case.num_inputs
    dtypes = (torch.float32, torch.bfloat16)
    check_dtype = min(dtypes, key=lambda dtype: bench.rate.seconds((rows, size, size, dtype)))

    def certified() -> PeerSolution:
        return diagonal_cg.certified(Hessian(bench.case.hessian_DD), bench.problem, gap, check_dtype)

    def oracle() -> PeerSolution:
        return diagonal_cg.oracle(bench.hessian, bench.problem, needed_R)

    def published() -> PeerSolution:
        return alps_cg.fixed(bench.hessian, bench.problem, count)

    note = "no certificate, no factor"
    part = bench.problem.rows(slice(0, len(bench.optimal_R)))
    count = alps_cg.iterations_to(bench.hessian, part, gap, int(needed_R.max()), bench.true_gap)
    return [
        bench.measured(f"diagonal CG, certified {power(gap)}", certified, gap, target=gap),
        bench.measured(f"diagonal CG, oracle stop {power(gap)}", oracle, gap, target=gap, note=note),
        bench.measured(f"{claims.ALPS} {power(gap)}", published, gap, target=gap, note="the slowest row's oracle"),
    ]


def cholesky(bench: Bench, tightest: float) -> list[Entry]:
    """(c) Cholesky of every row's own matrix, in float64 and float32."""
    exact = bench.oracle
    rows = len(exact.result)
    part = bench.problem.rows(slice(0, max(rows // 8, 8)))

    def single() -> PeerSolution:
        return PeerSolution(cholesky_rows(bench.hessian, part, torch.float32))

    return [
        bench.entry(
            "Cholesky float64", rows, exact.seconds, tightest, repeats=exact.repeats, gap_true=0.0, note="the oracle"
        ),
        bench.measured("Cholesky float32", single, tightest),
    ]


def one_by_one(bench: Bench, name: str, solve: Solve, tightest: float) -> Entry:
    """(d) A general solver, one row at a time, on a few rows."""
    few = bench.problem.rows(slice(0, bench.options.few_rows))

    def rows() -> PeerSolution:
        return PeerSolution(row_by_row(solve, bench.hessian, few).to(bench.device))

    note = "on the CPU" if bench.device.type == "cuda" else ""
    return bench.measured(f"{name} row by row", rows, tightest, note=note)


def floor(bench: Bench, gap: float) -> Entry:
    """(e) The products of ours at ``gap``, replayed alone."""
    solver = solver_of(bench.options.solver, gap)
    profile = profiled(lambda: solve_rows(solver, bench.hessian, bench.problem), bench.device)
    seconds = profile.floor_seconds(bench.rate)
    return bench.entry(f"products of ours {power(gap)} alone", bench.case.num_rows, seconds, gap, note="no preparation")


def run_case(bench: Bench, console: Console) -> list[Entry]:
    """All methods on one case, printed as it ends."""
    peers, gaps = bench.options.peers, sorted(bench.options.gaps, reverse=True)
    middle = min(gaps, key=lambda gap: abs(gap - 1e-4))
    entries = [ours(bench, gap) for gap in gaps]
    if "diagonal" in peers:
        needed = diagonal_cg.trial_run(bench.hessian, bench.problem, bench.optimum_RD, gaps)
        for gap in gaps:
            entries += diagonal(bench, gap, needed[gap])
    if "cholesky" in peers:
        entries += cholesky(bench, gaps[-1])
    for name, solve in (("OSQP", osqp_solve), ("PIQP", piqp_solve)):
        if name.lower() in peers:
            entries.append(one_by_one(bench, name, solve, gaps[-1]))
    if "mpax" in peers and bench.case.num_inputs <= bench.options.mpax_inputs:
        entries += mpax(bench, middle)
    entries.append(floor(bench, middle))
    rows, size = bench.case.num_rows, bench.case.num_inputs
    rates = [
        f"{str(dtype)[6:]} {bench.rate.flops_per_second((rows, size, size, dtype)) / 1e9:,.0f} GFLOP/s"
        for dtype in (torch.float32, torch.bfloat16, torch.float64)
    ]
    title = f"{bench.case.name}: {rows} rows, {size} inputs. Products of this shape run at {', '.join(rates)}"
    table.show(console, title, entries)
    return entries


def mpax(bench: Bench, target: float) -> list[Entry]:
    """(a) MPAX, and ours once more at a gap 1,000 times smaller than its loosest, which the promise is about."""
    from qp_peers.mpax_entries import mpax_entries

    entries = mpax_entries(bench, target)
    loosest = min(entry.gap_true or 0.0 for entry in entries if "eps 1e-2" in entry.method) / 1000.0
    if loosest < min(entry.gap_true or 0.0 for entry in bench.ours.values()):
        entries.append(ours(bench, loosest))
    return entries


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dump-dir", type=Path, help="real layers, one safetensors file per linear")
    parser.add_argument("--match", default="", help="regex on the names of dumped layers")
    parser.add_argument(
        "--synthetic", type=int, nargs="*", default=[640, 2048, 4096], help="inputs of synthetic layers"
    )
    parser.add_argument(
        "--rows",
        type=int,
        help="rows per layer; default all of a real one, 640 of a synthetic one (256 above 2048 inputs)",
    )
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--gaps", type=float, nargs="+", default=[1e-2, 1e-4, 1e-6])
    parser.add_argument("--solver", default="auto", choices=SOLVER_NAMES, help="which of ours")
    parser.add_argument("--peers", nargs="*", default=PEERS, choices=PEERS)
    parser.add_argument("--few-rows", type=int, default=3, help="rows for OSQP and PIQP")
    parser.add_argument("--mpax-rows", type=int, default=64, help="rows for MPAX; rows/s is compared")
    parser.add_argument("--mpax-inputs", type=int, default=2048, help="largest layer that MPAX is run on")
    parser.add_argument(
        "--mpax-seconds", type=float, default=10.0, help="give up on one MPAX run after about this long"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--model", help="also time `optima prune` on this model with and without re-solving")
    parser.add_argument("--calibration", nargs="+", default=[], help="text files for --model")
    parser.add_argument("--output", type=Path, help="also write the table; .json or .md")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> list[Entry]:
    options = parse(arguments)
    use_threads(options.threads)
    device, console = torch.device(options.device), table.wide_console()
    header = table.machine(device, options.threads)
    console.print(header)
    for peer, module in (("mpax", "mpax"), ("osqp", "osqp"), ("piqp", "piqp")):
        if peer in options.peers and importlib.util.find_spec(module) is None:
            console.print(f"{module} is not installed and is left out: pip install 'optima-prune[bench]'", markup=False)
            options.peers.remove(peer)
    cases = load_cases(options.dump_dir, options.match, device, options.rows) if options.dump_dir else []
    cases += [
        synthetic_case(size, options.rows or (640 if size <= 2048 else 256), device) for size in options.synthetic
    ]
    rate, entries = MatmulRate(device), []
    for case in cases:
        entries += run_case(Bench(case, options, device, rate), console)
    verdicts = claims.judge(entries)
    if options.model:
        verdicts.append(wall_time(options.model, options.calibration, options.threads))
    table.show_claims(console, verdicts)
    if options.output:
        table.write(options.output, header, entries, verdicts)
    return entries


if __name__ == "__main__":
    main()
