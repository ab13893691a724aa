"""Causal attention on a CPU by parts, see ``optima.calibration.attention``, against torch's kernel on the whole.

    python benchmarks/attention.py --threads 1

2,048 tokens at a time, as a run takes them, in sequences of each length. Both take turns; medians of --repeats.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from harness.table import machine
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from optima.calibration.attention import CausalByParts
from optima.memory import CPU_TOKENS

# (heads, heads of keys, size of a head).
MODELS = {"SmolLM2-135M": (9, 3, 64), "Llama 3 8B": (32, 8, 128), "Gemma 3 270M": (4, 1, 256)}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", nargs="+", type=int, default=[128, 256, 512, 640])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    print(f"{machine(torch.device('cpu'), options.threads)}\n")
    print("| heads of | length | whole, ms | by parts, ms | ratio |\n| --- | ---: | ---: | ---: | ---: |")
    for name, (heads, of_keys, size) in MODELS.items():
        for length in options.lengths:
            print_row(name, length, [(count, size) for count in (heads, of_keys, of_keys)], options.repeats)


def print_row(name: str, length: int, heads: list[tuple[int, int]], repeats: int) -> None:
    samples = max(CPU_TOKENS // length, 1)
    given = [torch.randn(samples, length, *each, dtype=torch.bfloat16).transpose(1, 2) for each in heads]
    wholes, parts = [], []
    with torch.no_grad():
        for _ in range(repeats):
            wholes.append(seconds(given))
            with CausalByParts():
                parts.append(seconds(given))
    ratio = statistics.median(part / whole for part, whole in zip(parts, wholes, strict=True))
    whole, part = (1e3 * statistics.median(each) for each in (wholes, parts))
    print(f"| {name} | {length} | {whole:.1f} | {part:.1f} | {ratio:.2f} |", flush=True)


def seconds(given: list[Tensor]) -> float:
    started = time.perf_counter()
    scaled_dot_product_attention(*given, is_causal=True, enable_gqa=True)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
