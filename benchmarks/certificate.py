"""Is the certificate ever wrong? True gap <= certified gap on 100,000 rows and more, against a float64 Cholesky.

    python benchmarks/certificate.py                     # generated rows
    python benchmarks/certificate.py --dump-dir DUMP     # and real layers, written by dump.py

Generated rows vary the size, the spectrum (well and badly conditioned, rank-deficient, duplicated, dead and massive
inputs, a hessian asymmetric by rounding), the damping (1e-6 .. 1), the density (2 .. 98 %, N:M), the start, the gap
(loose ones make the bound work) and the iteration limit (rows that stop early must be certified as such). Every row is
checked at two points: where the solver stopped, and at a random feasible point. Exit code 1 on a violation.

Shapes: R rows, D inputs.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path

import torch
from harness.cases import SOLVER_NAMES, llm_like_hessian, load_cases, solver_of
from harness.machine import use_threads
from qp_peers.direct import cholesky_rows
from torch import Tensor

from optima.core import Hessian, RowProblem, RowSolver, certify, make_problem, solve_rows
from optima.core.problem import ENERGY_FLOOR
from optima.patterns import NM, Unstructured
from optima.reporting.markdown import table
from optima.selectors.ranking import top_scores
from optima.selectors.scores import wanda_score

# Those that ``auto`` takes, named: small problems would never meet one that is for large ones.
SOLVERS = ("low-rank-cg", "cholesky")
SPECTRA = ("white", "llm", "rank-deficient", "duplicated", "dead", "scaled", "ill-conditioned", "asymmetric")


@dataclass
class Tally:
    """Counts of one kind of rows."""

    rows: int = 0
    nontrivial: int = 0
    violations: int = 0
    worst: float = 0.0
    ratios: list[Tensor] = field(default_factory=list)

    def add(self, excess_R: Tensor, promised_R: Tensor, rounding_R: Tensor) -> None:
        """Compare E(v) - E(v*) with what a certificate promised it to be at most: squared norms, so roots add."""
        self.rows += len(excess_R)
        self.violations += int((excess_R.sqrt() > promised_R.sqrt() + rounding_R.sqrt()).sum())
        meaningful_R = promised_R > 1e6 * rounding_R
        ratio_R = excess_R[meaningful_R] / promised_R[meaningful_R]
        self.worst = max(self.worst, float(ratio_R.max()) if len(ratio_R) else 0.0)
        self.ratios.append(ratio_R.cpu())

    @property
    def median(self) -> float:
        ratio_R = torch.cat(self.ratios) if self.ratios else torch.zeros(0)
        return float(ratio_R.median()) if len(ratio_R) else 0.0


def check(tally: Tally, hessian: Hessian, problem: RowProblem, points: list[tuple[Tensor, Tensor | None]]) -> None:
    """Hold each point's certificate (or the gap that its solver reported) against the float64 optimum."""
    optimum_RD = cholesky_rows(hessian, problem, torch.float64)
    optimal_R = certify(hessian, problem, optimum_RD).error_R
    energy_R = 0.5 * (problem.target_RD.double().square() @ hessian.damped_DD.diagonal())
    # An error is known to a unit of the row's energy; a gradient too, of which the norm in H^-1 is squared.
    unit = rounding_unit(hessian)
    scale_R = torch.maximum(optimal_R, ENERGY_FLOOR * energy_R) + unit * energy_R
    rounding_R = unit**2 * condition(hessian) * energy_R
    for weight_RD, reported_R in points:
        certificate = certify(hessian, problem, weight_RD)
        # The excess as a square around the optimum: no cancellation, unlike a difference of two errors.
        away_RD = weight_RD.double() - optimum_RD
        excess_R = 0.5 * torch.linalg.vecdot(away_RD @ hessian.damped_DD, away_RD)
        gap_R = certificate.gap_R if reported_R is None else reported_R
        tally.nontrivial += int((gap_R > 1e-3).sum())
        promised_R = gap_R * scale_R
        if reported_R is None:
            promised_R = torch.minimum(promised_R, certificate.bound_R)
        tally.add(excess_R, promised_R, rounding_R)


def rounding_unit(hessian: Hessian) -> float:
    """Relative error of a sum over the inputs in float64, in a chain of a few products."""
    return 8.0 * (hessian.num_inputs + 8) * torch.finfo(torch.float64).eps


def condition(hessian: Hessian) -> float:
    """Condition number of H in the Frobenius norm, never below the usual one."""
    return float(torch.linalg.matrix_norm(hessian.damped_DD) * torch.linalg.matrix_norm(hessian.inverse_DD))


def random_feasible(problem: RowProblem, generator: torch.Generator) -> Tensor:
    """Points at every distance from the dense weights."""
    target_RD = problem.target_RD
    noise_RD = torch.randn(target_RD.shape, generator=generator, dtype=torch.float64).to(target_RD)
    size_R1 = 10.0 ** torch.empty(len(target_RD), 1, dtype=torch.float64).uniform_(-4, 1, generator=generator)
    return (target_RD + noise_RD * size_R1.to(target_RD) * target_RD.std()).masked_fill(~problem.keep_RD, 0.0)


def spectrum(kind: str, size: int, generator: torch.Generator) -> Tensor:
    """X^T X / T of one kind, shape (D, D), float64."""

    def samples(tokens: int) -> Tensor:
        return torch.randn(tokens, size, generator=generator, dtype=torch.float64)

    if kind == "llm":
        return llm_like_hessian(size, torch.device("cpu"), generator).double()
    if kind == "ill-conditioned":
        inputs_TD = samples(2 * size) @ torch.diag(torch.logspace(0, -6, size, dtype=torch.float64)) @ samples(size)
    elif kind == "rank-deficient":
        inputs_TD = samples(max(size // 3, 1))
    else:
        inputs_TD = samples(4 * size)
    if kind == "duplicated":
        inputs_TD[:, size // 2 :] = inputs_TD[:, : size - size // 2]
    if kind == "dead":
        inputs_TD[:, :: max(size // 4, 2)] = 0.0
    if kind == "scaled":
        inputs_TD *= 10.0 ** torch.empty(size, dtype=torch.float64).uniform_(-3, 3, generator=generator)
    matrix_DD = inputs_TD.mT @ inputs_TD / len(inputs_TD)
    if kind == "asymmetric":  # a float32 product whose two triangles rounded differently
        matrix_DD *= 1.0 + 1e-7 * torch.rand(size, size, generator=generator, dtype=torch.float64)
    return matrix_DD


def pick(options: list[float], generator: torch.Generator) -> float:
    return options[int(torch.randint(len(options), (1,), generator=generator))]


def random_keep(rows: int, size: int, generator: torch.Generator) -> Tensor:
    """N:M where it fits and the coin says so, else a random density for each row."""
    score_RD = torch.rand(rows, size, generator=generator)
    if size % 8 == 0 and pick([0.0, 1.0, 2.0], generator) == 0.0:
        return top_scores(score_RD, NM(2, 4) if pick([0.0, 1.0], generator) else NM(3, 8))
    density_R1 = torch.empty(rows, 1).uniform_(0.02, 0.98, generator=generator)
    # A few densities in a batch let the oracle factorise rows of equal count together.
    count_R1 = (density_R1.mul(8).round() / 8).clamp(0.02, 0.98).mul(size).round().clamp_min(1)
    return score_RD.argsort(dim=1).argsort(dim=1) < count_R1


def generated(options: argparse.Namespace) -> Iterator[tuple[str, Hessian, RowProblem, RowSolver]]:
    """Batches of rows until there are as many as asked for."""
    generator, batch = torch.Generator().manual_seed(options.seed), options.batch
    for number in range(-(-options.rows // batch)):
        kind = options.spectra[number % len(options.spectra)]
        size = int(pick([1, 2, 3, 8, 16, 24, 40, 64, 96, 160], generator))
        hessian = Hessian(spectrum(kind, size, generator), pick([1e-6, 1e-4, 1e-2, 1e-1, 1.0], generator))
        scale = pick([1e-6, 1.0, 1e4], generator)
        weight_RD = scale * torch.randn(batch, size, generator=generator)
        if pick([0.0, 1.0], generator):
            weight_RD = weight_RD.double()
        keep_RD = random_keep(batch, size, generator)
        problem = make_problem(hessian, weight_RD, keep_RD)
        if pick([0.0, 1.0, 2.0], generator) == 0.0:
            start_RD = random_feasible(problem, generator)
            problem = make_problem(hessian, weight_RD, keep_RD, start_RD)
        gap = pick([1.0, 1e-1, 1e-2, 1e-4, 1e-6], generator)
        limit = int(pick([1, 2, 3, 5, 200], generator))
        names = options.solvers
        solver = solver_of(names[int(torch.randint(len(names), (1,), generator=generator))], gap)
        if hasattr(solver, "max_iterations"):  # rows that stop early are checked too
            solver = replace(solver, max_iterations=limit)
        yield kind, hessian, problem, solver


def real(options: argparse.Namespace) -> Iterator[tuple[str, Hessian, RowProblem, RowSolver]]:
    """The first rows of each dumped layer, at several sparsities, dampings and gaps."""
    cpu = torch.device("cpu")
    for case in load_cases(options.dump_dir, options.match, cpu, options.real_rows):
        for damping in (1e-2, 1e-4):
            hessian = Hessian(case.hessian_DD, damping)
            score_RD = wanda_score(case.weight_OD, hessian)
            for pattern in (Unstructured(0.5), Unstructured(0.8), NM(2, 4)):
                problem = make_problem(hessian, case.weight_OD, top_scores(score_RD, pattern))
                for gap, name in product((1e-1, 1e-3, 1e-5), options.solvers):
                    yield case.name, hessian, problem, solver_of(name, gap)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=150_000, help="generated rows; each is checked at two points")
    parser.add_argument("--batch", type=int, default=400, help="rows that share a hessian")
    parser.add_argument(
        "--solvers", nargs="+", default=SOLVERS, choices=SOLVER_NAMES, help="whose certificates, each of some batches"
    )
    parser.add_argument("--spectra", nargs="+", default=SPECTRA, choices=SPECTRA, help="kinds of generated hessians")
    parser.add_argument("--dump-dir", type=Path, help="real layers, one safetensors file per linear")
    parser.add_argument("--match", default="", help="regex on the names of dumped layers")
    parser.add_argument("--real-rows", type=int, default=32, help="rows of each dumped layer")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    use_threads(options.threads)
    begin = time.perf_counter()
    tallies: dict[str, Tally] = {}
    generator = torch.Generator().manual_seed(options.seed + 1)
    batches = [generated(options)]
    if options.dump_dir:
        batches.append(real(options))
    for source in batches:
        for kind, hessian, problem, solver in source:
            solution = solve_rows(solver, hessian, problem)
            points = [(solution.weight_RD, solution.gap_R), (random_feasible(problem, generator), None)]
            check(tallies.setdefault(kind, Tally()), hessian, problem, points)
    return report(tallies, time.perf_counter() - begin)


def report(tallies: dict[str, Tally], seconds: float) -> int:
    """Print the counts; 1 if any certificate was violated."""
    lines = [
        [kind, f"{one.rows:,}", f"{one.nontrivial:,}", f"{one.worst:.6f}", f"{one.median:.3f}", str(one.violations)]
        for kind, one in tallies.items()
    ]
    header = ["rows", "checked points", "gap > 1e-3", "worst true/certified", "median", "violations"]
    print(table(header, lines))
    points, violations = (sum(getattr(tally, name) for tally in tallies.values()) for name in ("rows", "violations"))
    verdict = "PASS" if not violations else "FAIL"
    print(
        f"{verdict}  the certificate held on {points - violations:,} of {points:,} points ({points // 2:,} rows), "
        f"worst true/certified {max(tally.worst for tally in tallies.values()):.6f}, {seconds:.0f} s"
    )
    return int(violations > 0)


if __name__ == "__main__":
    sys.exit(main())
