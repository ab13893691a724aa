"""Where the time of a whole run goes: stage by stage, and how much of it is inside matrix products.

    python benchmarks/stages.py MODEL --calibration c4.jsonl --threads 2

Prunes the model in memory twice: once to time the stages, once under a meter at torch's dispatcher. The floor is the
time that the same products take with nothing between them, at the best rate of this machine for each shape.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch
from harness.table import machine
from harness.timing import MatmulRate, profiled, use_threads

from optima import Recipe, prune
from optima.data.datasets import load_documents
from optima.data.text import calibration_tokens
from optima.models.load import find_source, load_model, load_tokenizer


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="hub id, local directory or GGUF file")
    parser.add_argument("--calibration", nargs="+", required=True, help="text to calibrate on")
    parser.add_argument("--selector", default="wanda")
    parser.add_argument("--objective", default="sink", help="loss: includes the gradient pass")
    parser.add_argument("--pattern", default="0.5")
    parser.add_argument("--num-calibration-samples", type=int, default=64)
    parser.add_argument("--max-seq-length", type=int, default=512)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    use_threads(options.threads)
    device = torch.device("cpu")
    source = find_source(options.model)
    model = load_model(source, options.dtype)
    documents = load_documents(options.calibration, seed=0)
    samples, length = options.num_calibration_samples, options.max_seq_length
    tokens = calibration_tokens(documents, load_tokenizer(source), samples, length)
    recipe = Recipe(selector=options.selector, objective=options.objective, pattern=[options.pattern])
    report = prune(copy.deepcopy(model), recipe, calibration=tokens)
    print(f"{machine(device, options.threads)}\n{Path(options.model).name}, {samples} x {length} tokens")
    print("\n| stage | seconds | share |\n| --- | ---: | ---: |")
    rest = report.run.seconds - sum(report.run.stages.values())
    for stage, seconds in [*report.run.stages.items(), ("rest", rest)]:
        print(f"| {stage} | {seconds:.1f} | {seconds / report.run.seconds:.0%} |")
    print(f"| all | {report.run.seconds:.1f} | 100% |")
    profile = profiled(lambda: prune(model, recipe, calibration=tokens), device)
    floor = profile.floor_seconds(MatmulRate(device)) + profile.factor_seconds
    print(
        f"\nInside products, attention and factorisations: {profile.dense_share:.0%} of {profile.seconds:.1f} s. "
        f"Floor: {floor:.1f} s, {report.run.seconds / floor:.2f} times less than the run took."
    )


if __name__ == "__main__":
    main()
