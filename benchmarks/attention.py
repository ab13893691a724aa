"""Attention on a CPU, see ``optima.calibration.attention``, against torch's kernel: causal, and of single queries.

    python benchmarks/attention.py --threads 1

2,048 tokens at a time, as a run takes them, in sequences of each length. Then one query of each of 64 sequences, as in
writing, with as many keys. Both take turns; medians of --repeats.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from harness.table import machine
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from optima.calibration.attention import AttentionOnCPU
from optima.memory import CPU_TOKENS

WRITTEN = 64  # sequences together
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
    for single in (False, True):
        print(f"| {'single queries' if single else 'causal'}, heads of | length | torch, ms | ours, ms | ratio |")
        print("| --- | ---: | ---: | ---: | ---: |")
        for name, (heads, of_keys, size) in MODELS.items():
            for length in options.lengths:
                sizes = [(count, size) for count in (heads, of_keys, of_keys)]
                print_row(name, length, sizes, options.repeats, single)
        print()


def print_row(name: str, length: int, heads: list[tuple[int, int]], repeats: int, single: bool) -> None:
    samples = WRITTEN if single else max(CPU_TOKENS // length, 1)
    given = [torch.randn(samples, length, *each, dtype=torch.bfloat16).transpose(1, 2) for each in heads]
    if single:  # as a cache holds keys and values
        given = [given[0][:, :, :1], *(each.contiguous() for each in given[1:])]
    wholes, parts = [], []
    with torch.no_grad():
        for _ in range(repeats):
            wholes.append(seconds(given))
            with AttentionOnCPU():
                parts.append(seconds(given))
    ratio = statistics.median(part / whole for part, whole in zip(parts, wholes, strict=True))
    whole, part = (1e3 * statistics.median(each) for each in (wholes, parts))
    print(f"| {name} | {length} | {whole:.1f} | {part:.1f} | {ratio:.2f} |", flush=True)


def seconds(given: list[Tensor]) -> float:
    started = time.perf_counter()
    scaled_dot_product_attention(*given, is_causal=given[0].shape[2] > 1, enable_gqa=True)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
