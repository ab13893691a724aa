"""Blocks that run one by one give what the model gives, forward and backward."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from closeness import assert_close_in_norm
from families import build, make_ids, stack_of

from optima.calibration.activations import capture
from optima.calibration.fisher import fisher_weights, label_gradient
from optima.calibration.weights import row_weights
from optima.models.blocks import find_stacks, select_linears
from optima.models.forward import forward, hidden_of, label_size

CHAIN = ["llama", "llama4", "nemotron_h", "t5", "xlnet"]
HYPER_CONNECTIONS = ["deepseek_v4"]


@pytest.mark.parametrize("family", [*CHAIN, *HYPER_CONNECTIONS])
def test_gradients_are_those_of_the_whole_model(family: str) -> None:
    """The oracle: autograd through the model's own forward pass, with the same sampled labels."""
    model, batches = build(family), list(make_ids(4).split(2))
    stack = select_linears(find_stacks(model), [".*"], [])[-1]
    acts = capture(model, stack, batches, whole=True)
    found = fisher_weights(model, stack, acts, seed=3)
    linears = [linear for block in stack.blocks for linear in block.linears if not linear.expert]
    linears = [linear for linear in linears if linear.name not in acts.probe.routed]
    tokens = sum(math.prod(label_size(model, tokens_BL)) for tokens_BL in batches)
    expected = {linear.name: torch.zeros(2, linear.shape[0]) for linear in linears}

    def add(name: str, gradient: torch.Tensor, *_: object) -> None:
        square_TO = gradient.square().flatten(0, -2)
        expected[name][0] += square_TO.sum(dim=0) / tokens
        expected[name][1] += (square_TO / square_TO.sum(dim=1, keepdim=True).sqrt()).nan_to_num().sum(dim=0) / tokens

    handles = [linear.watch(partial(add, linear.name)) for linear in linears]
    generator = torch.Generator().manual_seed(3)
    for tokens_BL in batches:
        drawn_T = torch.rand(label_size(model, tokens_BL), generator=generator).flatten()
        logits_TV = forward(model, tokens_BL).logits.flatten(0, 1)
        logits_TV.backward(label_gradient(logits_TV.detach(), drawn_T))
    for handle in handles:
        handle.remove()
    for name, (square_O, tempered_O) in expected.items():
        expected_O = row_weights(tempered_O * (square_O.sum() / tempered_O.sum()))
        assert_close_in_norm(found.rows[name], expected_O, name=name)


# Where all experts and tokens are chosen, no choice between nearly equal ones depends on rounding.
ALL_CHOSEN = {"index_topk": 16, "num_experts_per_tok": 4}


@pytest.mark.parametrize(
    ("family", "changes"), [("llama", {}), ("gemma4", {}), ("t5_encoder", {}), ("glm_moe_dsa", ALL_CHOSEN)]
)
def test_microbatches_give_what_the_batch_gives(family: str, changes: dict[str, int]) -> None:
    """Also where blocks are called with what earlier blocks computed."""
    model = build(family, **changes)
    stack = stack_of(model)
    acts = capture(model, stack, [make_ids(4)], whole=True)
    with torch.no_grad():
        for block in stack.blocks:
            parts = [hidden_of(acts.run(block, 0, slice(row, row + 1))) for row in range(4)]
            acts.forward(block)
            assert_close_in_norm(torch.cat(parts), acts.hidden[0])


@pytest.mark.parametrize("family", ["gemma3n", "gemma4"])
def test_what_blocks_pass_on_is_that_of_the_dense_model(family: str) -> None:
    """A later pass over dense inputs gives the dense outputs, although earlier blocks have been pruned."""
    model, expected = build(family), list[torch.Tensor]()
    stack = stack_of(model)
    acts = capture(model, stack, [make_ids(2)], whole=True)
    alone, dense = acts.part(), acts.part()
    for block in stack.blocks:
        alone.forward(block)
        expected.append(alone.hidden[0])
    for block, output in zip(stack.blocks, expected, strict=True):
        dense.forward(block)
        assert torch.equal(dense.hidden[0], output)
        for linear in block.linears:
            linear.write(linear.read() * 0.5)
        acts.forward(block)
        assert not torch.equal(acts.hidden[0], output)
