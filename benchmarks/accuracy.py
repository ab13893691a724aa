"""Perplexity and layer error of every method at every pattern, on one model: the table of the README.

    python benchmarks/accuracy.py MODEL --calibration c4.jsonl --evaluation wikitext2_test.txt

Prints a Markdown table (and writes it with --output as JSON): dense, magnitude, Wanda, SparseGPT, and the same masks
with the surviving weights re-solved. Each result is measured on a fresh copy of the model.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any

import torch

from optima import Recipe, prune
from optima.calibration.text import TextSource, calibration_tokens, data_hash, read_documents
from optima.evaluation.perplexity import evaluation_windows, perplexity
from optima.models.source import find_source, load_model, load_tokenizer
from optima.run import find_device

METHODS = {
    "magnitude": {"selector": "magnitude", "solver": "none"},
    "Wanda": {"selector": "wanda", "solver": "none"},
    "SparseGPT": {"selector": "sparsegpt", "solver": "none"},
    "Wanda + OPTIMA": {"selector": "wanda", "solver": "shared-inverse-cg"},
    "SparseGPT + OPTIMA": {"selector": "sparsegpt", "solver": "shared-inverse-cg"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="hub id, local directory or GGUF file")
    parser.add_argument("--calibration", nargs="+", required=True, help="text to calibrate on")
    parser.add_argument("--evaluation", nargs="+", required=True, help="text to measure perplexity on")
    parser.add_argument("--patterns", nargs="+", default=["0.5", "0.6", "2:4"], help="sparsities and n:m patterns")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--num-calibration-samples", type=int, default=64)
    parser.add_argument("--max-seq-length", type=int, default=512)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--max-windows", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--damping", type=float, default=0.01)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, help="write the results as JSON after every run")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    source = find_source(arguments.model)
    tokenizer, model = load_tokenizer(source), load_model(source)
    documents = read_documents(TextSource(tuple(arguments.calibration)), arguments.seed)
    tokens = calibration_tokens(documents, tokenizer, arguments.num_calibration_samples, arguments.max_seq_length)
    text = read_documents(TextSource(tuple(arguments.evaluation)))
    windows = evaluation_windows(list(text), tokenizer, arguments.window, arguments.max_windows)
    device = find_device(arguments.device)

    results: list[dict[str, Any]] = []
    dense = perplexity(model, windows, device=device)
    print(f"dense: {dense:.2f}  ({len(windows)} windows of {arguments.window}; calibration {data_hash(tokens)[:12]})")
    for pattern in arguments.patterns:
        for method in arguments.methods:
            results.append(run_one(model, tokens, windows, method, pattern, arguments))
            if arguments.output:
                arguments.output.write_text(json.dumps({"dense": dense, "results": results}, indent=2))
    print_table(dense, results, arguments.patterns, arguments.methods)


def run_one(
    model: Any, tokens: torch.Tensor, windows: torch.Tensor, method: str, pattern: str, arguments: argparse.Namespace
) -> dict[str, Any]:
    sparse = copy.deepcopy(model)
    chosen = {"pattern": pattern} if ":" in pattern else {"sparsity": float(pattern)}
    recipe = Recipe(
        **METHODS[method], **chosen, damping=arguments.damping, seed=arguments.seed, device=arguments.device
    )
    started = time.perf_counter()
    report = prune(sparse, recipe, calibration=tokens)
    seconds = time.perf_counter() - started
    worse = [r.name for r in report.linears if r.error > r.error_selector * (1 + 1e-6)]
    result = {
        "method": method,
        "pattern": pattern,
        "perplexity": perplexity(sparse, windows, device=find_device(arguments.device)),
        "error": report.error_geomean,
        "gap_max": report.gap_max,
        "rows_not_converged": report.rows_not_converged,
        "linears_worse_than_selector": worse,
        "seconds": seconds,
        "seconds_in_linears": sum(r.seconds for r in report.linears),
    }
    print(json.dumps(result), flush=True)
    return result


def print_table(dense: float, results: list[dict[str, Any]], patterns: list[str], methods: list[str]) -> None:
    cells = {(r["method"], r["pattern"]): r for r in results}
    print("\n| perplexity (error) | " + " | ".join(patterns) + " |")
    print("| --- |" + " ---: |" * len(patterns))
    print("| dense | " + " | ".join(f"{dense:.2f}" for _ in patterns) + " |")
    for method in methods:
        row = [f"{cells[method, p]['perplexity']:.2f} ({cells[method, p]['error']:.4f})" for p in patterns]
        print(f"| {method} | " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
