"""How a run scales: counted and measured on this machine, then carried on to clusters.

    python benchmarks/scaling.py measure       # fit rates on two tiny models, predict a third, with 1 and 2 processes
    python benchmarks/scaling.py clusters      # 8B, 70B, 405B and DeepSeek-V3 on 1, 8 and 64 GPUs

Seconds are those of the processor (``time.process_time``): other work on the machine does not count.
"""

from __future__ import annotations

import argparse
import os
import socket
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from harness.scaling import DEFAULT, WANDA, Counts, Group, Model, Work, llama, work
from harness.table import machine
from harness.timing import use_threads
from transformers import LlamaConfig, LlamaForCausalLM

from optima import Recipe, prune
from optima.state import RunState

LENGTH = 128
STAGES = {
    "gradients": ("gradients",),
    "forward": ("forward",),
    "hessian": ("hessian",),
    "solve": ("select", "solve", "round"),
}
FITTED = (
    {"hidden": 256, "heads": 256, "pair": 128, "middle": 512, "blocks": 4, "vocabulary": 512},
    {"hidden": 512, "heads": 512, "pair": 256, "middle": 1280, "blocks": 4, "vocabulary": 512},
)
PREDICTED = {"hidden": 384, "heads": 384, "pair": 128, "middle": 1024, "blocks": 6, "vocabulary": 512}
SAMPLES = 32
PROCESSES = (1, 2)
EIGEN_HERE = 6  # products of its size that an eigendecomposition takes as long as, at 512 to 2,048 inputs


@dataclass(frozen=True)
class Measured:
    """Seconds of the busiest process by stage, and the bytes that the first exchanged by what they are."""

    seconds: dict[str, float]
    bytes: dict[str, float]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("measure", "clusters"))
    parser.add_argument("--samples", type=int, default=SAMPLES, help="sequences of 128 tokens")
    parser.add_argument("--scale", type=float, default=1.0, help="shrinks the models, to try the script")
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    options = parser.parse_args(arguments)
    if options.what == "clusters":
        print(clusters())
        return
    use_threads(max(PROCESSES) * options.threads)
    print(machine(torch.device("cpu"), options.threads))
    print(compare(options.samples, options.scale, options.threads))


# Here: rates of stages from two models, and what they say of a third.


def compare(samples: int, scale: float, threads: int) -> str:
    fitted = [scaled(sizes, scale) for sizes in FITTED]
    predicted = scaled(PREDICTED, scale)
    found = [measure(sizes, samples, 1, threads) for sizes in fitted]
    lines = ["| processes | | predicted | measured | off |", "| ---: | --- | ---: | ---: | ---: |"]
    for size in PROCESSES:
        true, account = measure(predicted, samples, size, threads), account_of(predicted, samples, size)
        total = 0.0
        for stage in STAGES:
            known = [(flops(sizes, samples, 1, stage), found[n].seconds[stage]) for n, sizes in enumerate(fitted)]
            expected = through(known, flops(predicted, samples, size, stage))
            total += expected
            lines.append(row(size, f"{stage}, s", expected, true.seconds[stage]))
        lines.append(row(size, "these stages, s", total, sum(true.seconds[stage] for stage in STAGES)))
        if size > 1:
            lines.append(row(size, "statistics, MB", account.reduced / 1e6, true.bytes["reduce"] / 1e6))
            lines.append(row(size, "weights and masks, MB", account.shared / 1e6, true.bytes["share"] / 1e6))
    return "\n".join(lines)


def through(points: list[tuple[float, float]], at: float) -> float:
    """On the line through two points, or through zero and the larger if that falls."""
    (x1, y1), (x2, y2) = sorted(points)
    slope = (y2 - y1) / (x2 - x1)
    return y1 + slope * (at - x1) if slope > 0 else y2 / x2 * at


def row(size: int, what: str, expected: float, true: float) -> str:
    return f"| {size} | {what} | {expected:.2f} | {true:.2f} | {expected / true - 1:+.0%} |"


def scaled(sizes: dict[str, int], scale: float) -> dict[str, int]:
    return {
        name: n if name in ("blocks", "vocabulary") else max(int(n * scale) // 32 * 32, 32) for name, n in sizes.items()
    }


def flops(sizes: dict[str, int], samples: int, processes: int, stage: str) -> float:
    account = account_of(sizes, samples, processes)
    return float(account.solve + EIGEN_HERE * account.eigen if stage == "solve" else getattr(account, stage))


def account_of(sizes: dict[str, int], samples: int, processes: int) -> Work:
    return work(llama("", sizes), (samples, LENGTH), processes, itemsize=4)


def measure(sizes: dict[str, int], samples: int, processes: int, threads: int) -> Measured:
    with tempfile.TemporaryDirectory() as directory:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        arguments = (processes, threads, port, sizes, samples, directory)
        multiprocessing.start_processes(child, arguments, processes, start_method="spawn")
        found = [torch.load(Path(directory, f"{rank}.pt")) for rank in range(processes)]
    seconds = {
        name: max(sum(taken.get(stage, 0.0) for stage in stages) for taken, _ in found)
        for name, stages in STAGES.items()
    }
    return Measured(seconds, found[0][1])


def child(
    rank: int, processes: int, threads: int, port: int, sizes: dict[str, int], samples: int, directory: str
) -> None:
    torch.set_num_threads(threads)
    if processes > 1:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_PORT": port}
        os.environ.update({"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in names.items()}})
    tokens = torch.randint(0, sizes["vocabulary"], (samples, LENGTH), generator=torch.Generator().manual_seed(0))
    recipe = Recipe(sparsity=0.5, batch_size=4, allocation="uniform", tuning_epochs=0)
    moved: Counter[str] = Counter()
    runs: list[RunState] = []
    made = RunState.__post_init__

    def noted(run: RunState) -> None:
        runs.append(run)
        made(run)

    clock = patch("optima.device.time", SimpleNamespace(perf_counter=time.process_time))
    with clock, patch.object(RunState, "__post_init__", noted), counted(moved):
        prune(make_model(sizes, blocks=1), recipe, calibration=tokens[:8])  # compiles products, fills caches
        moved.clear()
        prune(make_model(sizes, sizes["blocks"]), recipe, calibration=tokens)
    torch.save((runs[-1].stages(), dict(moved)), Path(directory, f"{rank}.pt"))


# Elsewhere: what the account says of clusters.

SEQUENCES, TOKENS = 128, 2048
HALF = 0.5  # of the peak that products reach
# H100 SXM, dense, in operations a second; bfloat16 inputs make their hessians by TF32.
BF16, TF32, FP32 = 989e12 * HALF, 495e12 * HALF, 67e12 * HALF
EIGEN = 20  # products of its size that an eigendecomposition takes as long as
NVLINK, NETWORK, PCIE, NVME = 450e9, 50e9, 64e9, 6e9  # bytes a second: of a GPU, a GPU, a GPU, a machine
GPUS = 8  # in a machine
LOOKS = 2  # of the model on a few tokens: as a whole, and block by block
PASSES = 3  # over the weights: there and back for the loss, once to prune
READS = 2 + LOOKS + PASSES  # plus a fingerprint and a check of all numbers
LARGE = (
    llama("8B", {"hidden": 4096, "pair": 1024, "middle": 14336, "blocks": 32, "vocabulary": 128256}),
    llama("70B", {"hidden": 8192, "pair": 1024, "middle": 28672, "blocks": 80, "vocabulary": 128256}),
    llama("405B", {"hidden": 16384, "pair": 1024, "middle": 53248, "blocks": 126, "vocabulary": 128256}),
    Model(
        "DeepSeek-V3",
        blocks=61,
        hidden=7168,
        attention=20480,
        vocabulary=129280,
        groups=(
            Group(7168, (1536, 576)),
            Group(1536, (24576,)),
            Group(512, (32768,)),
            Group(16384, (7168,)),
            Group(7168, (4096,)),  # the shared expert
            Group(2048, (7168,)),
            Group(7168, (4096,), copies=256, share=8 / 256),
            Group(2048, (7168,), copies=256, share=8 / 256),
        ),
    ),
)


def clusters() -> str:
    """Seconds of each part of a run, as if nothing overlapped, and the largest of them."""
    lines = []
    for name, counts in (("selector optima", DEFAULT), ("selector wanda", WANDA)):
        titles = list(parts_of(LARGE[0], 1, counts))
        lines += ["", f"| {name} | GPUs | {' | '.join(titles)} | hours | binds |"]
        lines.append("| --- | ---: |" + " ---: |" * (len(titles) + 1) + " --- |")
        for model in LARGE:
            for size in (1, 8, 64):
                parts = parts_of(model, size, counts)
                binds, hours = max(parts, key=parts.__getitem__), sum(parts.values()) / 3600
                cells = " | ".join(f"{seconds:,.0f}" for seconds in parts.values())
                lines.append(f"| {model.name} | {size} | {cells} | {hours:.2f} | {binds} |")
    return "\n".join(lines)


def parts_of(model: Model, size: int, counts: Counts) -> dict[str, float]:
    account = work(model, (SEQUENCES, TOKENS), size, itemsize=2, counts=counts)
    weights = 2 * model.parameters
    carried = account.activations * model.blocks * 2 * (PASSES + 2)
    return {
        "forward": (account.gradients + account.forward) / BF16,
        "hessian": account.hessian / TF32,
        "solve": account.solve / FP32,
        "eigenvalues": account.eigen * EIGEN / FP32,
        "exchange": (2 * account.reduced + account.shared) / (NVLINK if size <= GPUS else NETWORK),
        "PCIe": ((LOOKS + PASSES) * weights + carried) / PCIE,
        "disk": (READS + 1) * weights / NVME,
    }


def make_model(sizes: dict[str, int], blocks: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=sizes["vocabulary"],
        hidden_size=sizes["hidden"],
        intermediate_size=sizes["middle"],
        num_hidden_layers=blocks,
        num_attention_heads=sizes["heads"] // 32,
        num_key_value_heads=sizes["pair"] // 32,
        head_dim=32,
    )
    return LlamaForCausalLM(config).eval()


@contextmanager
def counted(moved: Counter[str]) -> Iterator[None]:
    """Bytes of tensors by what they are: statistics are summed, weights and rows are not."""

    def counting(name: str, kind: str) -> Any:
        function = getattr(dist, name)

        def call(first: torch.Tensor | list[torch.Tensor], *arguments: Any, **options: Any) -> Any:
            moved[kind] += sum(t.numel() * t.element_size() for t in (first if isinstance(first, list) else [first]))
            return function(first, *arguments, **options)

        return patch.object(dist, name, call)

    kinds = {"all_reduce": "reduce", "reduce": "reduce", "broadcast": "share", "all_gather": "share"}
    with ExitStack() as stack:
        for name, kind in kinds.items():
            stack.enter_context(counting(name, kind))
        yield


if __name__ == "__main__":
    main()
