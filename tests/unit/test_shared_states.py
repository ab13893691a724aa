"""Keys and values that later blocks read: each stream has its own, and gradients find their way back through them."""

from __future__ import annotations

import pytest
import torch
from families import build, make_ids, stack_of

from optima import Recipe
from optima.calibration.capture import capture
from optima.calibration.probe import hidden_of
from optima.errors import ModelError
from optima.linear import Methods
from optima.pipeline import Job
from optima.preflight.checks import preflight
from optima.selectors.magnitude import Magnitude

FAMILIES = ["gemma3n", "gemma4"]
OTHERS = ["mistral_large4", "zaya", "llama4", "nemotron_h_omni", "qwen4_exp", "t5", "xlnet", "rwkv"]
STREAMS = ["deepseek_v4", "hy_v4", "glm5_next"]  # hyper-connections


@pytest.mark.parametrize("family", ["glm_moe_dsa", "zaya"])
def test_what_the_next_block_alone_is_given_is_dropped(family: str) -> None:
    model = build(family)
    recipe = Recipe(objective="plain", selector="magnitude")
    methods = Methods(Magnitude())
    found = preflight(model, recipe, methods)
    acts = capture(model, found.stacks[0], [make_ids(4)])
    Job(methods, acts.device, 0.01, 0.0).prune(found.stacks[0], acts, found.patterns)
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
