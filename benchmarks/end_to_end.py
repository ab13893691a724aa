"""From checkpoint to checkpoint, against SparseGPT of llm-compressor: seconds, work, peak memory, perplexity.

    python benchmarks/end_to_end.py MODEL --calibration c4.jsonl --evaluation wikitext2.txt --peer-python PYTHON

The peer has its own environment (pip install llmcompressor), whose interpreter is --peer-python. Contenders alternate,
each in a fresh process with the same tokens, threads and dtype, from reading the model to writing the checkpoint.
Perplexity is measured here for all. Prints Markdown: medians of --repeats runs, in wall-clock and in CPU seconds; other
jobs on the machine change the latter less.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from harness.machine import machine
from safetensors.torch import load_file, save_file
from torch import Tensor

from optima import Recipe, prune
from optima.data.datasets import load_documents
from optima.data.text import calibration_tokens
from optima.evaluation.perplexity import evaluation_windows, perplexity
from optima.files import digest
from optima.models.load import find_source, load_model, load_tokenizer, weight_files
from optima.recipe import load_recipe

PEER = "SparseGPT, llm-compressor"
PEER_SCRIPT = Path(__file__).parent / "whole_run_peers" / "llm_compressor.py"
FAST, DEFAULT = "OPTIMA, fast", "OPTIMA, default"


@dataclass(frozen=True)
class Turn:
    """One run of one contender."""

    seconds: float
    work_seconds: float  # of all threads
    peak_bytes: int
    perplexity: float


def main(arguments: list[str] | None = None) -> None:
    options = make_parser().parse_args(arguments)
    if options.run:  # a contender, in a process of its own
        run_own(options)
        return
    torch.set_num_threads(options.threads)
    source = find_source(options.model)
    for file in weight_files(Path(source.path)):
        digest(file)  # from here on the files are in memory for all
    tokenizer = load_tokenizer(source)
    text = list(load_documents(options.evaluation))
    windows_NL = evaluation_windows(text, tokenizer, options.window, options.max_windows)
    documents = load_documents(options.calibration, seed=0)
    print(f"{machine(torch.device('cpu'), options.threads)}\n{Path(options.model).name}, {options.sparsity:.0%}\n")
    print("| tokens | | seconds | of the peer's | CPU seconds | of the peer's | peak GB | of the peer's | perplexity |")
    print("| --- | --- |" + " ---: |" * 7)
    for samples, length in options.sizes:
        tokens_NL = calibration_tokens(documents, tokenizer, samples, length)
        turns: dict[str, list[Turn]] = defaultdict(list)
        names = [*([PEER] if options.peer_python else []), *options.contenders]
        for number in range(options.repeats):
            for name in names[:: -1 if number % 2 else 1]:  # nobody always comes first
                turns[name].append(turn(name, options, tokens_NL, windows_NL))
        print_rows(f"{samples} x {length}", turns)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="local directory")
    parser.add_argument("--calibration", nargs="+", default=[], help="text to calibrate on")
    parser.add_argument("--evaluation", nargs="+", default=[], help="text to measure perplexity on")
    parser.add_argument("--peer-python", help="interpreter of an environment that has llmcompressor; none: ours alone")
    ours = (FAST, DEFAULT)
    parser.add_argument("--contenders", nargs="+", choices=ours, default=ours, help="of ours")
    parser.add_argument("--sizes", nargs="+", type=size, default=[(64, 512), (128, 512)], metavar="SAMPLESxLENGTH")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--max-windows", type=int, default=20)
    parser.add_argument("--run", help=argparse.SUPPRESS)
    parser.add_argument("--tokens", help=argparse.SUPPRESS)
    parser.add_argument("--output", help=argparse.SUPPRESS)
    return parser


def size(text: str) -> tuple[int, int]:
    samples, length = text.split("x")
    return int(samples), int(length)


def turn(name: str, options: argparse.Namespace, tokens_NL: Tensor, windows_NL: Tensor) -> Turn:
    """Prune in a process of its own, and measure what it wrote."""
    with tempfile.TemporaryDirectory() as place:
        tokens, output = f"{place}/tokens.safetensors", f"{place}/out"
        save_file({"tokens": tokens_NL}, tokens)
        job = ["--tokens", tokens, "--output", output, "--sparsity", str(options.sparsity)]
        job += ["--threads", str(options.threads)]
        if name == PEER:
            command = [options.peer_python, str(PEER_SCRIPT), options.model, *job]
        else:
            command = [sys.executable, __file__, options.model, "--run", name, *job]
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(options.threads))
        started = time.perf_counter()
        with open(f"{place}/log", "w", encoding="utf-8") as log:
            process = subprocess.Popen(command, env=os.environ | threads, stdout=log, stderr=log)
            peak, status, usage = watched(process.pid)
        seconds = time.perf_counter() - started
        if status:
            raise SystemExit(f"{name} failed:\n{Path(place, 'log').read_text(encoding='utf-8')[-3000:]}")
        found = perplexity(load_model(find_source(output), "auto"), windows_NL)
        result = Turn(seconds, usage.ru_utime + usage.ru_stime, peak, found)
        print(json.dumps({"contender": name, **vars(result)}), file=sys.stderr, flush=True)
        return result


def watched(pid: int) -> tuple[int, int, resource.struct_rusage]:
    """Peak resident bytes, exit status and usage of a process, at its end.

    The peak is the kernel's for the program's own memory. ``ru_maxrss`` will not do: it begins with that of the parent.
    """
    peak, ended = 0, 0
    while not ended:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
            peak = max([peak, *(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))])
        time.sleep(0.1)
        ended, status, usage = os.wait4(pid, os.WNOHANG)
    return peak, status, usage


def run_own(options: argparse.Namespace) -> None:
    """What a user would do, on the tokens that all contenders share."""
    torch.set_num_threads(options.threads)
    recipe = Recipe() if options.run == DEFAULT else load_recipe("fast")
    recipe = recipe.replace(sparsity=options.sparsity)  # where the peer runs
    prune(options.model, recipe, output_dir=options.output, calibration=load_file(options.tokens)["tokens"])


def print_rows(tokens: str, turns: dict[str, list[Turn]]) -> None:
    """Medians of the contenders, and of their ratios to the peer in the same turn."""
    for name, own in turns.items():
        cells = [tokens, name]
        for field, unit, digits in (("seconds", 1.0, 0), ("work_seconds", 1.0, 0), ("peak_bytes", 1e9, 2)):
            median = statistics.median(getattr(one, field) for one in own) / unit
            cells += [f"{median:.{digits}f}", f"{ratio(own, turns.get(PEER, []), field):.2f}"]
        print("| " + " | ".join([*cells, f"{own[-1].perplexity:.2f}"]) + " |", flush=True)


def ratio(own: list[Turn], peers: list[Turn], field: str) -> float:
    """Median over turns; NaN without a peer."""
    ratios = [getattr(mine, field) / getattr(peer, field) for mine, peer in zip(own, peers, strict=False)]
    return statistics.median(ratios) if ratios else float("nan")


if __name__ == "__main__":
    main()
