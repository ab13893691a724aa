"""What is left of a block's error when it is tuned, on the text that tunes it and on other text.

    python benchmarks/tuning.py MODEL --calibration c4.jsonl --pattern 0.5 --blocks 4 10

The model is pruned without tuning, by the default recipe with sparsity allocation. The error of a block is the distance
of its outputs, on the inputs that pruned blocks give, from the dense block's outputs on dense inputs, in the metric of
the loss, with equal tokens. Blocks are tuned one by one, with all others untuned. Prints errors relative to the untuned
block: of the dense block on the same pruned inputs, and of the tuned block. The first text is the calibration text,
with the eighth that tuning holds out; the other text is the last fifth of the documents.
"""

from __future__ import annotations

import argparse
import copy
from dataclasses import dataclass

import torch
from harness.treatment import heading, make_parser, read
from torch import Tensor
from transformers import PreTrainedModel

from optima.calibration.activations import Activations, capture
from optima.calibration.fisher import fisher_weights
from optima.calibration.weights import FisherWeights
from optima.data.text import calibration_tokens
from optima.models.blocks import Block, Stack
from optima.plan import chosen_stacks
from optima.recipe import FISHER_FRACTION
from optima.reporting.markdown import table
from optima.tune import BlockError, Tuning, tune

BATCH = 4  # sequences


@dataclass
class Text:
    """What enters the next block of the dense model and of the pruned one, on one text."""

    dense: Activations
    pruned: Activations

    @classmethod
    def of(
        cls, models: tuple[PreTrainedModel, PreTrainedModel], stacks: tuple[Stack, Stack], tokens_NL: Tensor
    ) -> Text:
        batches = list(tokens_NL.split(BATCH))
        return cls(*(capture(model, stack, batches, whole=True) for model, stack in zip(models, stacks, strict=True)))

    def targets(self, dense: Block) -> list[Tensor]:
        acts = self.dense.part()
        acts.forward(dense)
        return acts.hidden

    def error(self, block: Block, targets: list[Tensor], cost: BlockError) -> float:
        acts = self.pruned.part()
        acts.forward(block)
        pairs = zip(acts.hidden, targets, strict=True)
        return sum(float(cost(found, target)) for found, target in pairs) / len(targets)


def main() -> None:
    parser = make_parser(__doc__, learning_rates=[1e-3, 3e-3, 6e-3])
    parser.add_argument("--blocks", nargs="+", type=int, required=True)
    parser.add_argument("--other-samples", type=int, default=32, help="sequences of other text")
    options = parser.parse_args()
    untreated = read(options)
    dense, recipe = untreated.dense, untreated.recipe
    stack = chosen_stacks(dense, recipe)[-1]
    if missing := sorted(set(options.blocks) - set(range(stack.needed))):
        parser.error(f"--blocks {missing[0]}: {options.model} has blocks 0 to {stack.needed - 1} to prune")
    other_NL = calibration_tokens(
        untreated.held_out, untreated.tokenizer, options.other_samples, options.max_seq_length
    )
    pruned = untreated.pruned(recipe)
    print(
        f"{heading(options)}, {options.epochs} epochs; errors relative to the solved block's, on own / on other text\n"
    )
    models, stacks = (dense, pruned), (stack, chosen_stacks(pruned, recipe)[-1])
    own, other = (Text.of(models, stacks, tokens) for tokens in (untreated.tokens_NL, other_NL))
    loss = fisher_weights(dense, stack, own.dense, seed=0, residual=True, share=FISHER_FRACTION)
    rows = []
    for blocks in zip(*(stack.blocks for stack in stacks), strict=True):
        if blocks[0].index in options.blocks:
            rows.append(row(blocks, (own, other), loss, options))
        if blocks[0].index == max(options.blocks):
            break
        for text in (own, other):
            text.dense.forward(blocks[0])
            text.pruned.forward(blocks[1])
    rates = [f"tuned, rate {rate:g}" for rate in options.learning_rates]
    print(table(["block", "dense block", *rates], rows))


def row(
    blocks: tuple[Block, Block], texts: tuple[Text, Text], loss: FisherWeights, options: argparse.Namespace
) -> list[str]:
    """Of one block; its weights are as before afterwards."""
    dense, pruned = blocks
    cost = BlockError.by_loss(loss.residual[dense.name], loss.tokens.get(dense.name))
    targets = [text.targets(dense) for text in texts]

    def errors(block: Block) -> list[float]:
        return [text.error(block, target, cost) for text, target in zip(texts, targets, strict=True)]

    solved = errors(pruned)
    cells = [errors(dense)]
    before = copy.deepcopy(pruned.module.state_dict())
    keeps = {linear.name: linear.read() != 0 for linear in pruned.linears}
    for rate in options.learning_rates:
        with torch.no_grad():
            tune(pruned, keeps, texts[0].pruned, targets[0], cost, Tuning(options.epochs, rate))
        cells.append(errors(pruned))
        pruned.module.load_state_dict(before)
    shown = [" / ".join(f"{e / s:.3f}" for e, s in zip(cell, solved, strict=True)) for cell in cells]
    return [str(dense.index), *shown]


if __name__ == "__main__":
    main()
