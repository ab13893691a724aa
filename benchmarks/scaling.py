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
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from harness.scaling import Group, Model, Work, llama, work
from harness.table import machine
from harness.timing import use_threads
from transformers import LlamaConfig, LlamaForCausalLM

from optima import Recipe, Report, load_report, prune

LENGTH = 128
STAGES = {"sweep": ("sweep",), "forward": ("forward",), "hessian": ("hessian",), "solve": ("select", "solve", "round")}
FITTED = (
    {"hidden": 256, "heads": 256, "pair": 128, "middle": 512, "blocks": 4, "vocabulary": 512},
    {"hidden": 512, "heads": 512, "pair": 256, "middle": 1280, "blocks": 4, "vocabulary": 512},
)
PREDICTED = {"hidden": 384, "heads": 384, "pair": 128, "middle": 1024, "blocks": 6, "vocabulary": 512}
SAMPLES = 32


@dataclass(frozen=True)
class Measured:
    """Seconds of the first process by stage, and the bytes that it exchanged by what they are."""

    seconds: dict[str, float]
    bytes: dict[str, float]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("measure", "clusters"))
    parser.add_argument("--samples", type=int, default=SAMPLES, help="sequences of 128 tokens")
    parser.add_argument("--scale", type=float, default=1.0, help="shrinks the models, to try the script")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    if options.what == "clusters":
        print(clusters())
        return
    use_threads(options.threads)
    print(machine(torch.device("cpu"), options.threads))
    print(compare(options.samples, options.scale))


# Here: rates of stages from two models, and what they say of a third.


def compare(samples: int, scale: float) -> str:
    fitted = [scaled(sizes, scale) for sizes in FITTED]
    predicted = scaled(PREDICTED, scale)
    found = {(index, size): measure(sizes, samples, size) for size in (1, 2) for index, sizes in enumerate(fitted)}
    lines = ["| processes | | predicted | measured | off |", "| ---: | --- | ---: | ---: | ---: |"]
    for size in (1, 2):
        true, account = measure(predicted, samples, size), account_of(predicted, samples, size)
        total = 0.0
        for stage in STAGES:
            points = [(getattr(account_of(sizes, samples, 1), stage), found[index, 1].seconds[stage])
                      for index, sizes in enumerate(fitted)]  # fmt: skip
            expected = through(points, getattr(account, stage))
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


def account_of(sizes: dict[str, int], samples: int, processes: int) -> Work:
    return work(llama("", sizes), samples, LENGTH, processes, itemsize=4)


def measure(sizes: dict[str, int], samples: int, processes: int) -> Measured:
    with tempfile.TemporaryDirectory() as directory:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        arguments = (processes, port, sizes, samples, directory)
        multiprocessing.start_processes(child, arguments, processes, start_method="spawn")
        report = load_report(Path(directory, "out"))
        moved = torch.load(Path(directory, "bytes.pt"))
    seconds = {name: sum(report.run.stages.get(own, 0.0) for own in stages) for name, stages in STAGES.items()}
    return Measured(seconds, dict(moved))


def child(rank: int, processes: int, port: int, sizes: dict[str, int], samples: int, directory: str) -> None:
    torch.set_num_threads(1)
    if processes > 1:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_PORT": port}
        os.environ.update({"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in names.items()}})
    tokens = torch.randint(0, sizes["vocabulary"], (samples, LENGTH), generator=torch.Generator().manual_seed(0))
    recipe = Recipe(sparsity=0.5, batch_size=4)
    moved: Counter[str] = Counter()
    with patch("optima.device.time", SimpleNamespace(perf_counter=time.process_time)), counted(moved):
        prune(make_model(sizes, blocks=1), recipe, calibration=tokens[:8])  # compiles products, fills caches
        moved.clear()
        report: Report = prune(make_model(sizes, sizes["blocks"]), recipe, calibration=tokens)
    if rank == 0:
        Path(directory, "out").mkdir()
        report.save(Path(directory, "out"))
        torch.save(dict(moved), Path(directory, "bytes.pt"))


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

    with counting("all_reduce", "reduce"), counting("reduce", "reduce"):
        with counting("broadcast", "share"), counting("all_gather", "share"):
            yield
