"""Keys and values that later blocks read: each stream has its own, and gradients find their way back through them."""

from __future__ import annotations

import pytest
import torch
from families import build, make_ids

from optima.calibration.capture import capture
from optima.calibration.loss_weights import label_gradient, loss_weights
from optima.models.stacks import find_stacks, select_linears

CPU = torch.device("cpu")
FAMILIES = ["gemma3n", "gemma4"]


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_come_back_to_the_block_that_wrote_them(family: str) -> None:
    model, tokens_NL = build(family), make_ids(4)
    (stack,) = select_linears(find_stacks(model), [".*"], [])
    batches = list(tokens_NL.split(2))
    found = loss_weights(model, stack, capture(model, stack, batches, whole=True), CPU, seed=3)
    linears = [linear for block in stack.blocks for linear in block.linears]
    expected = {linear.name: torch.zeros(linear.shape[0]) for linear in linears}

    def add(name: str, gradient: torch.Tensor) -> None:
        expected[name] += gradient.square().flatten(0, -2).sum(dim=0) / tokens_NL.numel()

    handles = [linear.watch(lambda gradient, name=linear.name: add(name, gradient)) for linear in linears]  # type: ignore[misc]
    generator = torch.Generator().manual_seed(3)
    for tokens_BL in batches:
        drawn_T = torch.rand(tokens_BL.shape, generator=generator).flatten()
        logits_TV = model(input_ids=tokens_BL, use_cache=False).logits.flatten(0, 1)
        logits_TV.backward(label_gradient(logits_TV.detach(), drawn_T))
    for handle in handles:
        handle.remove()
    for name, row_O in found.rows.items():
        torch.testing.assert_close(row_O, expected[name], rtol=1e-3, atol=1e-3 * float(expected[name].mean()))


@pytest.mark.parametrize("family", FAMILIES)
def test_dense_streams_do_not_read_what_pruned_ones_wrote(family: str) -> None:
    model, tokens_NL = build(family), make_ids(2)
    outputs: list[torch.Tensor] = []
    (stack,) = select_linears(find_stacks(model), [".*"], [])
    streams = capture(model, stack, [tokens_NL], whole=True)
    alone = streams.copy()
    for block in stack.blocks:
        alone.advance(block, CPU)
        outputs.append(alone.hidden[0])
    dense = streams.copy()
    for block, output in zip(stack.blocks, outputs, strict=True):
        dense.advance(block, CPU)
        assert torch.equal(dense.hidden[0], output)
        for linear in block.linears:
            linear.write(linear.read() * 0.5)
        streams.advance(block, CPU)
        assert not torch.equal(streams.hidden[0], output)
