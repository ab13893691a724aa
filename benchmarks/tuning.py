"""What is left of a block's error when it is tuned, on the text that tunes it and on other text.

    python benchmarks/tuning.py MODEL --calibration c4.jsonl --pattern 0.5 --blocks 4 10

The model is pruned without tuning, by the default recipe with sparsity shared out. A block's error is how far its
outputs behind pruned blocks are from those of the dense block behind dense blocks, in the metric of the loss, all
tokens alike. Blocks are then tuned one by one, each behind blocks that are not. Prints errors relative to that before
tuning: of the dense block behind the same pruned blocks, which is what these hand on, and of the tuned block. Other
text is the last fifth of the documents, on which nothing is calibrated.
"""

from __future__ import annotations

import argparse
import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from harness.table import machine
from harness.text import split
from torch import Tensor
from transformers import PreTrainedModel

from optima import Recipe, prune
from optima.calibration.capture import capture
from optima.calibration.loss_weights import LossWeights, loss_weights
from optima.calibration.streams import Streams
from optima.calibration.text import TextSource, calibration_tokens
from optima.models.source import find_source, load_model, load_tokenizer
from optima.models.stacks import Block, Stack
from optima.preflight import chosen_stacks
from optima.reporting.markdown import table
from optima.tuning import BlockError, Tuning, tune

CPU = torch.device("cpu")
BATCH = 4  # sequences


@dataclass
class Text:
    """What enters the next block of the dense model and of the pruned one, on one text."""

    dense: Streams
    pruned: Streams

    @classmethod
    def of(
        cls, models: tuple[PreTrainedModel, PreTrainedModel], stacks: tuple[Stack, Stack], tokens_NL: Tensor
    ) -> Text:
        batches = list(tokens_NL.split(BATCH))
        return cls(*(capture(model, stack, batches) for model, stack in zip(models, stacks, strict=True)))

    def targets(self, dense: Block) -> list[Tensor]:
        streams = self.dense.copy()
        streams.advance(dense, CPU)
        return streams.hidden

    def error(self, block: Block, targets: list[Tensor], cost: BlockError) -> float:
        streams = self.pruned.copy()
        streams.advance(block, CPU)
        pairs = zip(streams.hidden, targets, strict=True)
        return sum(float(cost(found, target, None)) for found, target in pairs) / len(targets)


def main() -> None:
    options = make_parser().parse_args()
    torch.set_num_threads(options.threads)
    source = find_source(options.model)
    dense, tokenizer = load_model(source, options.dtype), load_tokenizer(source)
    samples, length = options.num_calibration_samples, options.max_seq_length
    documents, held_out = split(TextSource(tuple(options.calibration)), held_out=0.2, seed=0)
    tokens_NL = calibration_tokens(documents, tokenizer, samples, length)
    other_NL = calibration_tokens(held_out, tokenizer, options.other_samples, length)
    recipe = Recipe(pattern=[options.pattern], allocation="uniform" if ":" in options.pattern else "loss")
    pruned = copy.deepcopy(dense)
    prune(pruned, recipe, calibration=tokens_NL, progress=False)
    print(
        f"{machine(CPU, options.threads)}\n{Path(options.model).name}, {samples} x {length} tokens, {options.pattern}, "
        f"{options.epochs} epochs; errors relative to the solved block's, on the text it is tuned on / on other\n"
    )
    models = dense.eval(), pruned.eval()
    stacks = chosen_stacks(dense, recipe)[-1], chosen_stacks(pruned, recipe)[-1]
    swept = capture(dense, stacks[0], list(tokens_NL.split(BATCH)), whole=True)
    loss = loss_weights(dense, stacks[0], swept, CPU, seed=0, residual=True, share=recipe.swept_share)
    own, other = (Text.of(models, stacks, tokens) for tokens in (tokens_NL, other_NL))
    rows = []
    for blocks in zip(*(stack.blocks for stack in stacks), strict=True):
        if blocks[0].index in options.blocks:
            rows.append(row(blocks, (own, other), loss, options))
        if blocks[0].index == max(options.blocks):
            break
        for text in (own, other):
            text.dense.advance(blocks[0], CPU)
            text.pruned.advance(blocks[1], CPU)
    rates = [f"tuned, rate {rate:g}" for rate in options.learning_rates]
    print(table(["block", "dense block", *rates], rows))


def row(
    blocks: tuple[Block, Block], texts: tuple[Text, Text], loss: LossWeights, options: argparse.Namespace
) -> list[str]:
    """Of one block; its weights are as before afterwards."""
    dense, pruned = blocks
    cost = BlockError.by_loss(loss.residual[dense.name], loss.of_tokens(dense.name))
    targets = [text.targets(dense) for text in texts]

    def errors(block: Block) -> list[float]:
        return [text.error(block, target, cost) for text, target in zip(texts, targets, strict=True)]

    solved = errors(pruned)
    cells = [errors(dense)]
    before = copy.deepcopy(pruned.module.state_dict())
    keeps = {linear.name: linear.read() != 0 for linear in pruned.linears}
    for rate in options.learning_rates:
        with torch.no_grad():
            tune(pruned, keeps, texts[0].pruned, targets[0], cost, Tuning(options.epochs, rate), CPU)
        cells.append(errors(pruned))
        pruned.module.load_state_dict(before)
    shown = [" / ".join(f"{e / s:.3f}" for e, s in zip(cell, solved, strict=True)) for cell in cells]
    return [str(dense.index), *shown]


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="hub id, local directory or GGUF file")
    parser.add_argument("--calibration", nargs="+", required=True, help="text to calibrate on")
    parser.add_argument("--pattern", default="0.5")
    parser.add_argument("--blocks", nargs="+", type=int, required=True)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--learning-rates", nargs="+", type=float, default=[1e-3, 3e-3, 6e-3])
    parser.add_argument("--num-calibration-samples", type=int, default=64)
    parser.add_argument("--other-samples", type=int, default=32, help="sequences of other text")
    parser.add_argument("--max-seq-length", type=int, default=512)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser


if __name__ == "__main__":
    main()
