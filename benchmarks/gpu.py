"""One Llama-3-8B block, end to end, on one GPU: seconds, TFLOP/s and peak memory per linear, and the whole model.

    python benchmarks/gpu.py                          # full size; needs a GPU with 10 GiB
    python benchmarks/gpu.py --device cpu --scale eighth   # every size divided by 8: what the memory will be
    python benchmarks/gpu.py --device cpu --scale tiny     # divided by 64: that the script runs

For each distinct input of the block (of q, k, v; of o; of gate, up; of down): accumulate the hessian over 128 x 2,048
tokens of LLM-like activations, factorise it, and for each linear choose Wanda's mask at 50 %, re-solve the kept
weights to a certified gap of 1e-4 and cast them to bfloat16. Weights are random; the whole block's are on the device.
The whole model is 32 such blocks and two forward passes of each over the tokens, measured on one batch.

Memory: at 14,336 inputs a D x D matrix takes 1.53 GiB in float64 and 0.77 GiB in float32. The goal of 10 GiB leaves
room for about five float64 ones at any moment, next to 0.41 GiB of block weights, so accumulation holds the sum
(float64) and one product (float32); the engine may hold the hessian, its factor and one more in float64 while it
factorises, and the operator (float32) and the preconditioner (bfloat16) while it iterates.

Shapes: T tokens, O outputs (rows), D inputs, K common factors.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from harness.cases import solver_of
from harness.machine import machine, timed, use_threads
from harness.memory import TensorPeak
from torch import Tensor
from torch.nn import functional

from optima.calibration.hessians import Accumulator
from optima.core import SOLVERS, Hessian, RowSolver
from optima.device import Stopwatch
from optima.linear import Methods, prune_linear
from optima.patterns import Unstructured
from optima.reporting.markdown import table
from optima.reporting.record import LinearRecord
from optima.selectors.base import LinearTask, make_selector

BLOCKS = 32
SEQUENCES, LENGTH, SEQUENCES_PER_BATCH = 128, 2048, 4
# Of an iteration, with a D x D matrix; thin ones, and those of other solvers, are not counted.
PRODUCTS = {"low-rank-cg": 1}
HIDDEN, KEY_VALUE, INTERMEDIATE, HEADS = 4096, 1024, 14336, 32
SHRINK = {"full": 1, "eighth": 8, "tiny": 64}
GOAL_MINUTES, GOAL_GIB = 15.0, 10.0
GIB = 2**30


@dataclass(frozen=True)
class Shape:
    """The block divided by ``shrink`` in every dimension, tokens included, so that ratios of sizes stay."""

    shrink: int

    @property
    def groups(self) -> dict[str, tuple[int, dict[str, int]]]:
        """Distinct input -> (D, linear -> O)."""
        hidden, key_value, intermediate = (size // self.shrink for size in (HIDDEN, KEY_VALUE, INTERMEDIATE))
        return {
            "attention": (hidden, {"q_proj": hidden, "k_proj": key_value, "v_proj": key_value}),
            "attention output": (hidden, {"o_proj": hidden}),
            "mlp": (hidden, {"gate_proj": intermediate, "up_proj": intermediate}),
            "mlp output": (intermediate, {"down_proj": hidden}),
        }

    @property
    def tokens(self) -> int:
        return SEQUENCES * LENGTH // self.shrink

    @property
    def batch_tokens(self) -> int:
        return SEQUENCES_PER_BATCH * LENGTH // self.shrink


@dataclass(frozen=True)
class Line:
    """One linear. ``hessian_seconds`` and ``prepare_seconds`` are on the first linear of those that share an input."""

    name: str
    outputs: int
    inputs: int
    hessian_seconds: float
    prepare_seconds: float
    mask_seconds: float
    solve_seconds: float
    hessian_tflops: float
    solve_tflops: float
    peak_bytes: int
    peak_phase: str
    iterations: float
    gap: float
    open_rows: int

    @property
    def seconds(self) -> float:
        return self.hessian_seconds + self.prepare_seconds + self.mask_seconds + self.solve_seconds


def activations(size: int, shape: Shape, device: torch.device) -> Iterator[Tensor]:
    """Batches (T, D) in bfloat16: power-law common factors, noise, and a few massive inputs."""
    generator = torch.Generator(device).manual_seed(size)

    def normal(*dimensions: int) -> Tensor:
        return torch.randn(*dimensions, generator=generator, device=device)

    factors = min(128, max(size // 4, 1))
    strength_K = torch.arange(1, factors + 1, device=device) ** -0.5
    loading_KD = normal(factors, size) * strength_K[:, None]
    scale_D = (0.5 * normal(size)).exp()
    scale_D[:: max(size // 8, 1)] *= 30.0
    for _ in range(0, shape.tokens, shape.batch_tokens):
        inputs_TD = normal(shape.batch_tokens, size).addmm_(normal(shape.batch_tokens, factors), loading_KD)
        yield inputs_TD.mul_(scale_D).bfloat16()


def accumulate(size: int, shape: Shape, device: torch.device) -> tuple[Hessian, float]:
    """The hessian of one distinct input, and the seconds spent on it (not on making activations up)."""
    accumulator, seconds = Accumulator(size, device), 0.0
    for inputs_TD in activations(size, shape, device):
        seconds += timed(partial(accumulator.add, inputs_TD), device)[0]
    return Hessian(accumulator.mean(), 0.01, shape.tokens), seconds


def prune(name: str, weight_OD: Tensor, hessian: Hessian, solver: RowSolver) -> tuple[LinearRecord, dict[str, float]]:
    """Prune one linear; returns its record and the seconds of each stage."""
    methods = Methods(make_selector("wanda"), solver=solver)
    stopwatch = Stopwatch(weight_OD.device)
    task = LinearTask(name, weight_OD.float(), hessian)
    result = prune_linear(task, Unstructured(0.5), methods, weight_OD.dtype, stopwatch)
    weight_OD.copy_(result.weight_OD)
    return result.record, stopwatch.seconds


def run_block(shape: Shape, solver: RowSolver, device: torch.device) -> list[Line]:
    """Every linear of one block, in order, the block's weights on the device throughout."""
    groups = shape.groups
    generator = torch.Generator(device).manual_seed(0)
    weights = {
        name: torch.randn(outputs, size, generator=generator, device=device).mul_(0.02).bfloat16()
        for size, linears in groups.values()
        for name, outputs in linears.items()
    }
    lines = []
    for size, linears in groups.values():
        hessian: Hessian | None = None
        for name, outputs in linears.items():
            hessian_seconds = prepare_seconds = 0.0
            with TensorPeak(device, list(weights.values())) as memory:
                if hessian is None:
                    memory.phase("hessian")
                    hessian, hessian_seconds = accumulate(size, shape, device)
                    memory.phase("factor")
                    prepare_seconds, _ = timed(partial(hessian.operator, hessian.working_dtype), device)
                memory.phase("prune")
                record, seconds = prune(name, weights[name], hessian, solver)
            solve_seconds = seconds["solve"] + seconds["round"]
            products = 2.0 * size**2 * PRODUCTS.get(record.solver, 0) * record.iterations_mean * record.rows
            accumulation = 2.0 * shape.tokens * size**2
            line = Line(
                name, outputs, size, hessian_seconds, prepare_seconds, seconds["select"], solve_seconds,
                accumulation / hessian_seconds / 1e12 if hessian_seconds else 0.0, products / solve_seconds / 1e12,
                *memory.highest, record.iterations_mean, record.gap_max or 0.0, record.rows_not_converged,
            )  # fmt: skip
            lines.append(line)
        del hessian
    return lines


def forward_seconds(shape: Shape, device: torch.device) -> float:
    """One pass of a block over all tokens: its linears and its attention, in bfloat16, timed on one batch."""
    dtype = torch.bfloat16
    heads = max(HEADS // shape.shrink, 1)
    length = LENGTH // shape.shrink
    weights = [
        torch.randn(outputs, size, device=device, dtype=dtype) * 0.02
        for size, linears in shape.groups.values()
        for outputs in linears.values()
    ]
    inputs = {
        size: torch.randn(shape.batch_tokens, size, device=device, dtype=dtype) for size, _ in shape.groups.values()
    }
    head_size = HIDDEN // shape.shrink // heads
    query = torch.randn(shape.batch_tokens // length, heads, length, head_size, device=device, dtype=dtype)

    def forward() -> None:
        for weight in weights:
            functional.linear(inputs[weight.shape[1]], weight)
        functional.scaled_dot_product_attention(query, query, query, is_causal=True)

    forward()
    return timed(forward, device)[0] * shape.tokens / shape.batch_tokens


def show(lines: list[Line]) -> str:
    header = (
        "linear", "outputs", "inputs", "hessian s", "factor s", "mask s", "solve s", "hessian TFLOP/s",
        "solve TFLOP/s", "peak GiB", "reached in", "iterations", "gap", "rows open",
    )  # fmt: skip
    rows = [
        [
            line.name, str(line.outputs), str(line.inputs),
            f"{line.hessian_seconds:.3f}", f"{line.prepare_seconds:.3f}",
            f"{line.mask_seconds:.3f}", f"{line.solve_seconds:.3f}", f"{line.hessian_tflops:.3g}",
            f"{line.solve_tflops:.3g}", f"{line.peak_bytes / GIB:.3g}", line.peak_phase,
            f"{line.iterations:.1f}", f"{line.gap:.1e}", str(line.open_rows),
        ]
        for line in lines
    ]  # fmt: skip
    return table(header, rows)


def judge(lines: list[Line], passes: float, shape: Shape, device: torch.device, gap: float) -> list[str]:
    """The goals, which only a full-size run on a GPU can reach; a block of an eighth predicts the memory."""
    full = shape.shrink == 1 and device.type == "cuda"
    minutes = BLOCKS * (sum(line.seconds for line in lines) + 2 * passes) / 60
    peak = max(line.peak_bytes for line in lines) / GIB
    memory = f"{peak:.2f} GiB"
    if shape.shrink == SHRINK["eighth"]:
        memory = f"{peak * shape.shrink**2:.2f} GiB of tensors, predicted from 1/{shape.shrink} of every size"
    worst, open_rows = max(line.gap for line in lines), sum(line.open_rows for line in lines)
    goals = [
        (f"32 blocks under {GOAL_MINUTES:g} minutes", minutes < GOAL_MINUTES if full else None,
         f"{minutes:.2f} min, of it {2 * BLOCKS * passes / 60:.2f} forward passes"),
        (f"under {GOAL_GIB:g} GiB", peak < GOAL_GIB if full else None, memory),
        (f"every row certified to {gap:g}", worst <= gap and not open_rows, f"{worst:.1e}, {open_rows} rows open"),
    ]  # fmt: skip
    verdicts = {True: "PASS", False: "FAIL", None: "NOT RUN"}
    return [f"{verdicts[reached]:7}  {goal}: {figure}" for goal, reached, figure in goals]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--scale", default="full", choices=SHRINK)
    parser.add_argument("--solver", default="auto", choices=list(SOLVERS))
    parser.add_argument("--gap", type=float, default=1e-4)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    use_threads(options.threads)
    device, shape = torch.device(options.device), Shape(SHRINK[options.scale])
    if device.type == "cpu" and shape.shrink == 1:
        parser.error("the full size takes hours on a CPU: use --scale eighth or tiny, or --device cuda")
    print(machine(device, options.threads))
    solver = solver_of(options.solver, options.gap)
    if device.type == "cuda":
        run_block(Shape(SHRINK["tiny"]), solver, device)  # library handles and kernels are loaded outside the clock
    lines = run_block(shape, solver, device)
    print(show(lines))
    print(*judge(lines, forward_seconds(shape, device), shape, device, options.gap), sep="\n")


if __name__ == "__main__":
    main()
