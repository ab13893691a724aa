"""How fast our preconditioners converge: true and certified relative suboptimality against dense products, as a plot.

    python benchmarks/convergence.py                                                     # synthetic layers
    python benchmarks/convergence.py --layer-dir OUT/layers --pattern '\\.8\\.' --output docs/convergence.svg

Textbook conjugate gradients in float64 on rows under Wanda's mask, preconditioned by the shared inverse, by the factor
model of low-rank CG and by the diagonal (Jacobi), against the optimum of the library's float64 Cholesky. An iteration
of the first is two dense products, of the others one. Prints the table in docs/mathematics.md too, in iterations.

Shapes: R rows, D inputs, N iterations.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import torch
from harness.cases import Case, load_cases, synthetic_case
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from torch import Tensor

from optima.core import BatchedCholesky, Hessian, RowProblem, certify
from optima.core.cg import FactorModel
from optima.core.problem import ENERGY_FLOOR

SHARED, LOW_RANK, JACOBI, CERTIFIED = "#0b5fa5", "#8a3ffc", "#d1701f", "#2a9d5c"
LOWEST, HIGHEST = 1e-10, 30.0
TARGETS = (1e-2, 1e-4, 1e-6)
# The oracle is refined to this; below RESOLVED it and the recursion of CG are rounding, and nothing can be compared.
ORACLE_GAP, RESOLVED = 1e-20, 1e-18
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Curves:
    """Relative to the optimum's error: true_NR of each method, and what shared-inverse CG could certify."""

    name: str
    num_inputs: int
    shared_NR: Tensor
    certified_NR: Tensor
    low_rank_NR: Tensor
    jacobi_NR: Tensor


def curves(case: Case, num_rows: int, sparsity: float, iterations: int) -> Curves:
    """All methods on rows spread evenly over the layer."""
    index = torch.linspace(0, case.num_rows - 1, min(num_rows, case.num_rows)).long()
    hessian = Hessian(case.hessian_DD)
    problem = Case(case.name, case.hessian_DD, case.weight_OD[index].double()).problem(hessian, sparsity)
    solver = BatchedCholesky(gap=ORACLE_GAP, dtype=torch.float64)
    optimum_RD = solver.solve(hessian, problem).weight_RD
    diagonal_D = hessian.damped_DD.diagonal()
    shared_NR, certified_NR = descend(hessian, problem, optimum_RD, lambda r_RD: r_RD @ hessian.inverse_DD, iterations)
    model, mask_RD = FactorModel(hessian, torch.float64), problem.keep_RD.double()
    core_RFF = model.restrict(mask_RD)
    low_rank_NR, _ = descend(
        hessian, problem, optimum_RD, lambda r_RD: model.solve(r_RD, mask_RD, core_RFF), iterations
    )
    jacobi_NR, _ = descend(hessian, problem, optimum_RD, lambda r_RD: r_RD / diagonal_D, iterations)
    return Curves(case.name, case.num_inputs, shared_NR, certified_NR, low_rank_NR, jacobi_NR)


def descend(
    hessian: Hessian,
    problem: RowProblem,
    optimum_RD: Tensor,
    preconditioner: Callable[[Tensor], Tensor],
    iterations: int,
) -> tuple[Tensor, Tensor]:
    """Preconditioned CG from the masked weights: true relative suboptimality, and the shared inverse's bound on it."""
    matrix_DD, keep_RD = hessian.damped_DD, problem.keep_RD.double()
    energy_R = 0.5 * problem.target_RD.square() @ matrix_DD.diagonal()
    floor_R = ENERGY_FLOOR * energy_R
    optimal_R = torch.maximum(certify(hessian, problem, optimum_RD).error_R, floor_R)
    point_RD = problem.target_RD * keep_RD
    residual_RD = (problem.target_RD - point_RD) @ matrix_DD * keep_RD
    direction_RD = preconditioner(residual_RD) * keep_RD
    slope_R = torch.linalg.vecdot(residual_RD, direction_RD)
    ratio_R = torch.ones_like(slope_R)  # bound over 1/2 slope: Gauss-Radau with a node at 1
    true_NR, certified_NR = [], []
    for _ in range(iterations + 1):
        away_RD, left_RD = point_RD - optimum_RD, problem.target_RD - point_RD
        true_NR.append(0.5 * torch.linalg.vecdot(away_RD @ matrix_DD, away_RD) / optimal_R)
        error_R, bound_R = 0.5 * torch.linalg.vecdot(left_RD @ matrix_DD, left_RD), 0.5 * ratio_R * slope_R
        certified_NR.append(bound_R / torch.maximum(error_R - bound_R, floor_R))
        image_RD = direction_RD @ matrix_DD * keep_RD
        alpha_R = slope_R / torch.linalg.vecdot(direction_RD, image_RD)
        point_RD = point_RD + alpha_R[:, None] * direction_RD
        residual_RD = residual_RD - alpha_R[:, None] * image_RD
        preconditioned_RD = preconditioner(residual_RD) * keep_RD
        growth_R = torch.linalg.vecdot(residual_RD, preconditioned_RD) / slope_R
        excess_R = (ratio_R - alpha_R).clamp_min(0.0)
        ratio_R = excess_R / (excess_R + growth_R)
        slope_R = growth_R * slope_R
        direction_RD = preconditioned_RD + growth_R[:, None] * direction_RD
    return torch.stack(true_NR), torch.stack(certified_NR)


def plot(found: list[Curves], output: Path, title: str) -> None:
    """One panel a layer: bands from the median to the worst row, and the worst row's certified bound."""
    mpl.rcParams.update({"svg.hashsalt": "optima", "font.size": 10, "font.family": "DejaVu Sans"})
    columns = min(len(found), 2)
    rows = -(-len(found) // columns)
    size = (4.8 * columns, 1.0 + 2.9 * rows)
    figure, axes = plt.subplots(
        rows, columns, figsize=size, sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    for axis, curve in zip(axes.flat, found, strict=False):
        _panel(axis, curve)
    for axis in axes.flat[len(found) :]:
        axis.set_visible(False)
    for axis in axes[:, 0]:
        axis.set_ylabel("relative suboptimality")
    for axis in axes[-1]:
        axis.set_xlabel("dense products (rows x D by D x D)")
    figure.suptitle(title, fontsize=11)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.savefig(output, metadata={"Date": None} if output.suffix == ".svg" else None, facecolor="white", dpi=110)
    plt.close(figure)


def _panel(axis: Axes, curve: Curves) -> None:
    last = len(curve.shared_NR) - 1
    _band(axis, curve.jacobi_NR, 1, JACOBI, "diagonal CG")
    _band(axis, curve.low_rank_NR, 1, LOW_RANK, "low-rank CG")
    _band(axis, curve.shared_NR, 2, SHARED, "shared-inverse CG")
    certified_N = curve.certified_NR.amax(dim=1)
    products = range(0, 2 * len(certified_N), 2)
    axis.plot(
        products, certified_N, color=CERTIFIED, linestyle="--", linewidth=1.6, label="its certified gap: worst row"
    )
    axis.axhline(1e-4, color="0.45", linewidth=0.8, linestyle=":", label="default tolerance")
    axis.set(yscale="log", ylim=(LOWEST, HIGHEST), xlim=(0, last))
    axis.set_title(f"{curve.name.removeprefix('model.')}  (D = {curve.num_inputs})", fontsize=10)
    axis.grid(color="0.9", linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)


def _band(axis: Axes, true_NR: Tensor, products_each: int, color: str, label: str) -> None:
    median_N, worst_N = true_NR.quantile(0.5, dim=1), true_NR.amax(dim=1)
    products = range(0, products_each * len(median_N), products_each)
    axis.plot(products, median_N, color=color, linewidth=2.2, label=f"{label}: median row")
    axis.plot(products, worst_N, color=color, linewidth=1, label=f"{label}: worst row")
    axis.fill_between(products, median_N, worst_N, color=color, alpha=0.15, linewidth=0)


def print_table(found: list[Curves]) -> None:
    """Iterations until the worst row is true to, and certified at, each target."""
    header = " | ".join(f"{target:.0e}" for target in TARGETS)
    print(f"| layer | D | curve (worst row) | {header} |\n| --- | --- | --- |{' --- |' * len(TARGETS)}")
    for curve in found:
        rows = {
            "shared inverse, true": curve.shared_NR,
            "shared inverse, certified": curve.certified_NR,
            "low rank, true": curve.low_rank_NR,
            "diagonal, true": curve.jacobi_NR,
        }
        for label, values_NR in rows.items():
            counts = [_first(values_NR.amax(dim=1), target) for target in TARGETS]
            print(f"| {curve.name} | {curve.num_inputs} | {label} | {' | '.join(counts)} |")
        resolved_NR = curve.shared_NR > RESOLVED
        violated = int((resolved_NR & (curve.shared_NR > curve.certified_NR * (1 + 1e-7))).sum())
        print(f"<!-- {curve.name}: certified below true {violated} times of {int(resolved_NR.sum())} -->")


def _first(worst_N: Tensor, target: float) -> str:
    reached = (worst_N <= target).nonzero()
    return str(int(reached[0])) if len(reached) else f"> {len(worst_N) - 1}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layer-dir", type=Path, help="layers written by dump.py; else synthetic")
    parser.add_argument("--pattern", default="", help="regular expression that chooses layers by name")
    parser.add_argument("--rows", type=int, default=64, help="rows a layer")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--iterations", type=int, default=60)
    parser.add_argument("--dims", type=int, nargs="+", default=[640, 1024], help="sizes of the synthetic layers")
    parser.add_argument("--title", default="", help="above the plot")
    parser.add_argument("--output", type=Path, nargs="+", default=[Path("convergence.svg")], help=".svg, .png or .pdf")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.layer_dir:
        cases = load_cases(arguments.layer_dir, arguments.pattern, CPU)
    else:
        cases = [synthetic_case(dim, arguments.rows, CPU) for dim in arguments.dims]
    found = [curves(case, arguments.rows, arguments.sparsity, arguments.iterations) for case in cases]
    print_table(found)
    for output in arguments.output:
        plot(
            found, output, arguments.title or f"{arguments.sparsity:.0%} pruned by Wanda, {arguments.rows} rows a layer"
        )


if __name__ == "__main__":
    main()
