"""What ``optima plan --measure`` says of a run, and what the run then takes: seconds, and peak memory.

    python benchmarks/plan.py MODEL [MODEL ...] --calibration c4.jsonl --presets fast default --sizes 16x512 64x512

Plan and run follow one another, each in a fresh process, on the same text and threads. The run's figures are those of
its report. Where other work shares the machine, --processor-seconds has both count the seconds of the processor instead
(one thread): what waits for its turn is not measured. A MODEL llama:WIDTH, mixtral:WIDTH or bert:WIDTH is made here:
six blocks (four of the second), of random weights. Prints Markdown.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from harness.table import machine
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from optima import Recipe, prune
from optima.models.source import find_source, load_tokenizer
from optima.plan import make_plan
from optima.recipe_files import load_recipe
from optima.rehearsal.measure import measure


def main(arguments: list[str] | None = None) -> None:
    options = make_parser().parse_args(arguments)
    if options.job:  # one of the two, in a process of its own
        print(json.dumps(child(json.loads(options.job))))
        return
    kind = "seconds of the processor" if options.processor_seconds else "seconds"
    print(f"{machine(torch.device('cpu'), options.threads)}\n")
    figures = f"{kind}: planned | taken | ratio | peak, MiB: planned | taken | ratio"
    print(f"| model | preset | tokens | {figures} | plan took |")
    print("| --- | --- | --- |" + " ---: |" * 7, flush=True)
    for model in options.models:
        for preset in options.presets:
            for size in options.sizes:
                print(row(model, preset, size, options), flush=True)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help="local directory, or one to make")
    parser.add_argument("--calibration", nargs="+", default=[], help="local files of text")
    parser.add_argument("--tokenizer", help="of models that are made: a model's directory")
    parser.add_argument("--presets", nargs="+", default=["fast", "default"])
    parser.add_argument("--sizes", nargs="+", default=["16x512", "64x512"], metavar="SAMPLESxLENGTH")
    parser.add_argument("--targets", nargs="+", default=[".*"], help="prune these linears alone: a quick look")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--processor-seconds", action="store_true")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    return parser


def row(model: str, preset: str, size: str, options: argparse.Namespace) -> str:
    """Plan, run, compare."""
    with tempfile.TemporaryDirectory() as place:
        path = make(model, Path(place, "model"), options.tokenizer) if ":" in model else model
        job = {"model": path, "preset": preset, "size": size, "text": options.calibration, "threads": options.threads}
        job |= {"targets": options.targets, "processor": options.processor_seconds, "output": f"{place}/out"}
        planned, taken = (start(job | {"run": run}) for run in (False, True))
    print(json.dumps({"model": model, "preset": preset, "size": size, "plan": planned, "run": taken}), file=sys.stderr)
    ratios = [planned[key] / taken[key] for key in ("seconds", "peak")]
    cells = [Path(model).name, preset, size.replace("x", " x ")]
    for key, ratio, scale in (("seconds", ratios[0], 1), ("peak", ratios[1], 2**20)):
        cells += [f"{planned[key] / scale:.0f}", f"{taken[key] / scale:.0f}", f"{ratio:.2f}"]
    return f"| {' | '.join(cells)} | {planned['itself']:.0f} |"


def start(job: dict[str, Any]) -> dict[str, Any]:
    """What a process of its own found."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"), str(job["threads"]))
    command = [sys.executable, __file__, "--job", json.dumps(job)]
    done = subprocess.run(command, check=True, env=os.environ | threads, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def child(job: dict[str, Any]) -> dict[str, Any]:
    """Plan or run, on the same text."""
    torch.set_num_threads(job["threads"])
    if job["processor"]:
        time.perf_counter = time.process_time  # the clock of all stages
    samples, length = map(int, job["size"].split("x"))
    recipe = Recipe() if job["preset"] == "default" else load_recipe(job["preset"])
    recipe = replace(recipe, dataset=job["text"], num_calibration_samples=samples, max_seq_length=length)
    recipe = replace(recipe, targets=job["targets"])
    started = time.perf_counter()
    if not job["run"]:
        source = find_source(job["model"])
        found = measure(make_plan(source, recipe), source)
        seconds, peak, stages = sum(found.seconds.values()), found.peak_bytes, found.seconds
    else:
        run = prune(job["model"], recipe, output_dir=job["output"], progress=False).run
        seconds, peak, stages = run.seconds, run.peak_memory_bytes, run.stages
    return {"seconds": seconds, "peak": peak, "stages": stages, "itself": time.perf_counter() - started}


def make(model: str, directory: Path, tokenizer: str | None) -> str:
    """A model of random weights and a round width, in bfloat16, with the tokenizer of another."""
    family, _, width = model.partition(":")
    words = load_tokenizer(find_source(tokenizer or ""))
    sizes: dict[str, Any] = {"hidden_size": int(width), "vocab_size": len(words), "num_attention_heads": 8}
    sizes |= {"num_hidden_layers": 6, "max_position_embeddings": 2048}
    torch.manual_seed(0)
    made: Any
    if family == "llama":
        made = LlamaForCausalLM(LlamaConfig(intermediate_size=3 * int(width), num_key_value_heads=8, **sizes))
    elif family == "mixtral":
        sizes |= {"num_hidden_layers": 4, "num_local_experts": 8, "num_key_value_heads": 8}
        made = MixtralForCausalLM(MixtralConfig(intermediate_size=2 * int(width), **sizes))
    else:
        made = BertModel(BertConfig(intermediate_size=4 * int(width), **sizes))
    made.bfloat16().save_pretrained(directory)
    words.save_pretrained(directory)
    return str(directory)


if __name__ == "__main__":
    main()
