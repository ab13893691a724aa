"""Dense targets: how much of the error that earlier blocks leave could a linear make up for?

    python benchmarks/dense_targets.py DENSE PRUNED --calibration c4.jsonl --evaluation wikitext2_test.txt --blocks 5 15

A linear w is given X where the dense model has D. Let d = (X^T X + damping)^-1 X^T (D - X) w. With X (w + a d) as its
target, pruning would make up for a part of (D - X) w. Prints that part, in squares and on the evaluation text: at the
best strength a and at 1, for the calibration text's first quarter and all of it, and for each damping relative to the
mean diagonal. Observed blocks have their dense weights in both models, all at once: where they stand close together,
the later ones are given less error than in their turn.

Shapes: T tokens, D inputs, O outputs.
"""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor, nn

from optima.data.datasets import load_documents
from optima.data.text import calibration_tokens
from optima.evaluation.perplexity import evaluation_windows
from optima.models.blocks import Linear, find_stacks
from optima.models.load import find_source, load_model, load_tokenizer
from optima.reporting.markdown import table


class Sums:
    """X^T X and X^T E, E = (D - X) W^T, with the energies of E and of D W^T, over the tokens seen so far."""

    def __init__(self, linear: Linear) -> None:
        outputs, inputs = linear.shape
        self.tokens = 0
        self.gram_DD = torch.zeros(inputs, inputs, dtype=torch.float64)
        self.cross_DO = torch.zeros(inputs, outputs, dtype=torch.float64)
        self.error = self.energy = 0.0

    def add(self, sparse_TD: Tensor, dense_TD: Tensor, weight_OD: Tensor) -> None:
        error_TO = (dense_TD - sparse_TD) @ weight_OD.T
        self.tokens += len(sparse_TD)
        self.gram_DD += sparse_TD.T @ sparse_TD
        self.cross_DO += sparse_TD.T @ error_TO
        self.error += float(error_TO.square().sum())
        self.energy += float((dense_TD @ weight_OD.T).square().sum())

    def shift(self, damping: float) -> Tensor:
        """The d that makes up for most of E on these tokens, (D, O)."""
        damped_DD = self.gram_DD.clone()
        damped_DD.diagonal().add_(damping * damped_DD.diagonal().mean())
        return torch.cholesky_solve(self.cross_DO, torch.linalg.cholesky(damped_DD))

    def parts(self, shift_DO: Tensor) -> tuple[float, float, float]:
        """The best strength of a shift on these tokens, and the part of E that it makes up for at that and at 1."""
        linear, square = float((shift_DO * self.cross_DO).sum()), float((shift_DO * (self.gram_DD @ shift_DO)).sum())
        best = linear / square
        return best, best * linear / self.error, (2.0 * linear - square) / self.error


@torch.no_grad()
def main(arguments: list[str] | None = None) -> list[list[str]]:
    options = make_parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    source = find_source(options.dense)
    tokenizer, dense = load_tokenizer(source), load_model(source, options.dtype)
    sparse = load_model(find_source(options.pruned), options.dtype)
    linears = observed(dense, sparse, options.blocks)
    documents = load_documents(options.calibration, seed=options.seed)
    tokens_NL = calibration_tokens(documents, tokenizer, options.num_calibration_samples, options.max_seq_length)
    text = list(load_documents(options.evaluation))
    windows_NL = evaluation_windows(text, tokenizer, options.max_seq_length, options.max_windows)
    quarter = -(-len(tokens_NL) // 4)
    found = [{name: Sums(linear) for name, (linear, _) in linears.items()} for _ in range(3)]
    gather(dense, sparse, linears, tokens_NL[:quarter], found[:2])
    gather(dense, sparse, linears, tokens_NL[quarter:], found[1:2])
    gather(dense, sparse, linears, windows_NL, found[2:])
    rows = []
    for name in linears:
        held_out = found[2][name]
        if not held_out.error:  # in front of all that is pruned both models have the same inputs
            rows.append([name, str(found[1][name].tokens), "", "0.000", "", "", ""])
            continue
        for sums in (found[0][name], found[1][name]):
            for damping in options.dampings:
                parts = held_out.parts(sums.shift(damping))
                cells = [f"{held_out.error / held_out.energy:.3f}", *(f"{part:.2f}" for part in parts)]
                rows.append([name, str(sums.tokens), f"{damping:g}", *cells])
    print(table(["linear", "tokens", "damping", "error", "best strength", "made up for", "at 1"], rows))
    return rows


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense", help="hub id, local directory or GGUF file")
    parser.add_argument("pruned", help="the same, pruned")
    parser.add_argument("--calibration", nargs="+", required=True, help="text to fit on")
    parser.add_argument("--evaluation", nargs="+", required=True, help="text to measure on")
    parser.add_argument("--blocks", nargs="+", type=int, required=True, help="whose linears are looked at")
    parser.add_argument("--dampings", nargs="+", type=float, default=[0.01, 1.0])
    parser.add_argument("--num-calibration-samples", type=int, default=64)
    parser.add_argument("--max-seq-length", type=int, default=512, help="tokens in a sequence and in a window")
    parser.add_argument("--max-windows", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="auto", help="of the models: auto (the checkpoint's own), bfloat16, float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser


def observed(dense: nn.Module, sparse: nn.Module, blocks: list[int]) -> dict[str, list[Linear]]:
    """Linears of some blocks in both models, by name; those blocks of ``sparse`` are made dense."""
    stacks = [find_stacks(model)[-1] for model in (dense, sparse)]
    pairs = [[stack.blocks[index] for stack in stacks] for index in blocks]
    for whole, pruned in pairs:
        pruned.module.load_state_dict(whole.module.state_dict())
    return {own.name: [own, other] for a, b in pairs for own, other in zip(a.linears, b.linears, strict=True)}


def gather(
    dense: nn.Module,
    sparse: nn.Module,
    linears: dict[str, list[Linear]],
    tokens_NL: Tensor,
    into: list[dict[str, Sums]],
) -> None:
    """Add what linears are given in both models on some sequences to each of ``into``."""
    given: list[dict[str, Tensor]] = [{}, {}]

    def see(name: str, place: int, inputs: Tensor) -> None:
        given[place][name] = inputs.flatten(0, -2).float()

    with ExitStack() as hooks:
        for name, pair in linears.items():
            for place, linear in enumerate(pair):
                hooks.callback(linear.observe(partial(see, name, place)).remove)
        for sequence_L in tokens_NL:
            for model in (dense, sparse):
                model(sequence_L[None])
            for name, (linear, _) in linears.items():
                for sums in into:
                    sums[name].add(given[1][name], given[0][name], linear.read().float())


if __name__ == "__main__":
    main()
