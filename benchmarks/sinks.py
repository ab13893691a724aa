"""The first token of a sequence, the attention sink: how little it weighs in a Hessian, and what pruning does to it.

    python benchmarks/sinks.py MODEL --calibration c4.jsonl --evaluation wikitext2_test.txt --pattern 2:4

Prints, for each kind of linear, the energy of the first token's inputs and outputs in the dense model, relative to the
mean of all other tokens of a sequence; then, for each of --sink-weights with which a copy of the model is pruned, the
relative error of the outputs, ||(V - W) x||^2 / ||W x||^2, at the first token and over all others. All on the dense
model's activations, on the evaluation text; geometric means over blocks.
"""

from __future__ import annotations

import argparse
import copy
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from optima import Recipe, prune
from optima.data.datasets import load_documents
from optima.data.text import calibration_tokens
from optima.evaluation.perplexity import evaluation_windows
from optima.models.blocks import Linear, find_stacks
from optima.models.load import find_source, load_model, load_tokenizer

# Sums over windows of energies at the first token and at all others, (measurements, 2) float64, by the linear's name.
Energies = dict[str, Tensor]


def main(arguments: list[str] | None = None) -> Energies:
    options = make_parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    source = find_source(options.model)
    tokenizer, model = load_tokenizer(source), load_model(source, options.dtype)
    documents = load_documents(options.calibration, seed=options.seed)
    tokens_NL = calibration_tokens(documents, tokenizer, options.num_calibration_samples, options.max_seq_length)
    text = list(load_documents(options.evaluation))
    windows_NL = evaluation_windows(text, tokenizer, options.max_seq_length, options.max_windows)
    pruned = []
    for sink_weight in options.sink_weights:
        sparse = copy.deepcopy(model)
        recipe = Recipe(pattern=[options.pattern], selector=options.selector, objective="sink", sink_weight=sink_weight)
        prune(sparse, recipe, calibration=tokens_NL)
        pruned.append(find_linears(sparse))
    energies = measure(model, pruned, windows_NL)
    print_table(energies, options.sink_weights, windows_NL.shape[1])
    return energies


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="hub id, local directory or GGUF file")
    parser.add_argument("--calibration", nargs="+", required=True, help="text to calibrate on")
    parser.add_argument("--evaluation", nargs="+", required=True, help="text to measure on")
    parser.add_argument("--sink-weights", nargs="+", type=float, default=[0.0, 0.04], help="prune with each of these")
    parser.add_argument("--pattern", default="2:4", help="sparsity or n:m pattern")
    parser.add_argument("--selector", default="wanda")
    parser.add_argument("--num-calibration-samples", type=int, default=64)
    parser.add_argument("--max-seq-length", type=int, default=512, help="tokens in a sequence and in a window")
    parser.add_argument("--max-windows", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="auto", help="of the model: auto (the checkpoint's own), bfloat16, float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser


def find_linears(model: nn.Module) -> dict[str, Linear]:
    (stack,) = find_stacks(model)
    return {linear.name: linear for block in stack.blocks for linear in block.linears}


@torch.no_grad()
def measure(model: nn.Module, pruned: Sequence[dict[str, Linear]], windows_NL: Tensor) -> Energies:
    """Of each linear: energies of its inputs, of its outputs, and of its errors in each pruned model."""
    energies: Energies = defaultdict(lambda: torch.zeros(2 + len(pruned), 2, dtype=torch.float64))

    def hook(linear: Linear) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def observe(module: nn.Module, args: tuple[Any, ...]) -> None:
            inputs_LD, dense_OD = args[0][0].float(), linear.read().float()
            errors = [inputs_LD @ (sparse[linear.name].read().float() - dense_OD).T for sparse in pruned]
            for index, values_LE in enumerate([inputs_LD, inputs_LD @ dense_OD.T, *errors]):
                energy_L = values_LE.double().square().sum(dim=1)
                energies[linear.name][index] += torch.stack([energy_L[0], energy_L[1:].mean()])

        return observe

    with ExitStack() as stack:
        for linear in find_linears(model).values():
            stack.callback(linear.module.register_forward_pre_hook(hook(linear)).remove)
        for window_L in windows_NL:
            model(window_L[None])
    return dict(energies)


def print_table(energies: Energies, sink_weights: Sequence[float], length: int) -> None:
    titles = [f"error {place}, sink weight {weight:g}" for weight in sink_weights for place in ("first", "others")]
    print(f"\n| linear, sequences of {length} | first token's energy in | out | " + " | ".join(titles) + " |")
    print("| --- |" + " ---: |" * (2 + len(titles)))
    kinds: dict[str, list[Tensor]] = defaultdict(list)
    for name, energy in energies.items():
        kinds[name.rsplit(".", 1)[-1]].append(energy)
    for kind, members in kinds.items():
        mean = torch.stack(members).log().mean(dim=0).exp()
        relative = (mean[2:] / mean[1]).flatten().tolist()
        cells = [f"{float(row[0] / row[1]):.3f}" for row in mean[:2]] + [f"{value:.4f}" for value in relative]
        print(f"| {kind} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
