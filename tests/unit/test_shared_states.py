"""Blocks run one by one: their gradients are the whole model's, and keys and values of earlier blocks stay apart."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from families import build, make_ids, stack_of

from optima import Recipe
from optima.calibration.capture import capture
from optima.calibration.fisher import fisher_weights, row_weights
from optima.calibration.lm_head import label_gradient
from optima.calibration.probe import forward, hidden_of
from optima.data.batches import words_size
from optima.errors import ModelError
from optima.models.blocks import find_stacks, select_linears
from optima.plan import resolve
from optima.prune import Job

FAMILIES = ["gemma3n", "gemma4"]
CHAIN = ["llama", "llama4", "nemotron_h_omni", "qwen4_exp", "t5", "xlnet", "rwkv"]
HYPER_CONNECTIONS = ["deepseek_v4", "hy_v4", "glm5_next"]


@pytest.mark.parametrize("family", [*CHAIN, *HYPER_CONNECTIONS])
def test_gradients_are_those_of_the_whole_model(family: str) -> None:
    """The oracle: autograd through the model's own forward pass, with the same sampled labels."""
    model, batches = build(family), list(make_ids(4).split(2))
    stack = select_linears(find_stacks(model), [".*"], [])[-1]
    acts = capture(model, stack, batches, whole=True)
    found = fisher_weights(model, stack, acts, seed=3)
    linears = [
        linear
        for block in stack.blocks
        for linear in block.linears
        if not (linear.expert or linear.name in acts.probe.routed)
    ]
    tokens = sum(math.prod(words_size(model, tokens_BL)) for tokens_BL in batches)
    expected = {linear.name: torch.zeros(2, linear.shape[0]) for linear in linears}

    def add(name: str, gradient: torch.Tensor, *_: object) -> None:
        square_TO = gradient.square().flatten(0, -2)
        expected[name][0] += square_TO.sum(dim=0) / tokens
        expected[name][1] += (square_TO / square_TO.sum(dim=1, keepdim=True).sqrt()).nan_to_num().sum(dim=0) / tokens

    handles = [linear.watch(partial(add, linear.name)) for linear in linears]
    generator = torch.Generator().manual_seed(3)
    for tokens_BL in batches:
        drawn_T = torch.rand(words_size(model, tokens_BL), generator=generator).flatten()
        logits_TV = forward(model, tokens_BL).logits.flatten(0, 1)
        logits_TV.backward(label_gradient(logits_TV.detach(), drawn_T))
    for handle in handles:
        handle.remove()
    for name, (square_O, tempered_O) in expected.items():
        expected_O = row_weights(tempered_O * (square_O.sum() / tempered_O.sum()))
        torch.testing.assert_close(
            found.rows[name],
            expected_O,
            rtol=1e-3,
            atol=1e-3 * float(expected_O.mean()),
            msg=lambda text, name=name: f"{name}: {text}",
        )


@pytest.mark.parametrize("family", ["glm_moe_dsa", "zaya"])
def test_what_the_next_block_alone_is_given_is_dropped(family: str) -> None:
    model = build(family)
    recipe = Recipe(objective="plain", selector="magnitude", max_seq_length=16)
    found = resolve(model, recipe, torch.device("cpu"))
    acts = capture(model, found.stacks[0], [make_ids(4)])
    Job(found.methods, acts.device, 0.01, 0.0).prune(found.stacks[0], acts, found.patterns)
    assert acts.carried == [{}]


def test_a_look_takes_batches_apart() -> None:
    """As tuning does: each of its steps is one sequence, and reads the keys and values of that sequence."""
    model, tokens_NL = build("gemma4"), make_ids(4)
    stack = stack_of(model)
    acts = capture(model, stack, [tokens_NL], whole=True)
    with torch.no_grad():
        for block in stack.blocks:
            assert acts.pieces(block) == [(0, slice(first, first + 1)) for first in range(4)]
            parts = [hidden_of(acts.run(block, *piece, looks=True)) for piece in acts.pieces(block)]
            with pytest.raises(ModelError, match="share keys and values"):
                acts.run(block, 0, slice(0, 1))
            acts.forward(block)
            torch.testing.assert_close(torch.cat(parts), acts.hidden[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_dense_activations_do_not_read_what_pruned_ones_wrote(family: str) -> None:
    model, tokens_NL = build(family), make_ids(2)
    outputs: list[torch.Tensor] = []
    stack = stack_of(model)
    acts = capture(model, stack, [tokens_NL], whole=True)
    alone = acts.clone()
    for block in stack.blocks:
        alone.forward(block)
        outputs.append(alone.hidden[0])
    dense = acts.clone()
    for block, output in zip(stack.blocks, outputs, strict=True):
        dense.forward(block)
        assert torch.equal(dense.hidden[0], output)
        for linear in block.linears:
            linear.write(linear.read() * 0.5)
        acts.forward(block)
        assert not torch.equal(acts.hidden[0], output)
