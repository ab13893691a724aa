"""The last block is tuned by the KL divergence of the model's logits."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from families import build, make_ids, stack_of
from tiny import make_llama, make_tokens
from transformers import PreTrainedModel

from optima import Recipe, prune
from optima.calibration import lm_head
from optima.calibration.activations import Activations, Microbatch, capture
from optima.calibration.lm_head import LmHead, LogitsError
from optima.models.offload import Weights
from optima.reporting.html import render_html
from optima.reporting.summary import render_summary

SAMPLES, LENGTH = 4, 16


def at_the_end(model: PreTrainedModel) -> tuple[Activations, list[torch.Tensor]]:
    """What enters the last block, in one batch, and what it makes of that."""
    stack = stack_of(model)
    acts = capture(model, stack, [make_ids(SAMPLES, LENGTH)], whole=True)
    for block in stack.blocks[:-1]:
        acts.forward(block)
    ends = acts.part()
    ends.forward(stack.blocks[-1])
    return acts, ends.hidden


def divergence(model: PreTrainedModel, pruned: PreTrainedModel) -> torch.Tensor:
    """KL(p || q) of each position, (B, L), by the models' own logits, in float64."""
    tokens = make_ids(SAMPLES, LENGTH)
    with torch.no_grad():
        dense, found = (each(tokens).logits.double().log_softmax(dim=-1) for each in (model, pruned))
    return (dense.exp() * (dense - found)).sum(dim=-1)


@pytest.mark.parametrize("family", ["gemma3", "roberta", "mixtral", "xlnet"])
@pytest.mark.parametrize("epoch", [0, 1])
def test_it_is_the_divergence_of_the_logits(family: str, epoch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm_head, "POSITIONS", LENGTH // 4)
    monkeypatch.setattr("optima.models.logits.LOGITS_BYTES", 1)  # a slice for each position
    model = build(family)
    with torch.no_grad():  # a random model hardly prefers any token
        model.get_output_embeddings().weight.mul_(30.0)
        for linear in stack_of(model).blocks[-1].linears:
            linear.write(linear.read() * 30.0)
        pruned = copy.deepcopy(model)
        for linear in stack_of(pruned).blocks[-1].linears:
            linear.write(linear.read() * (torch.rand_like(linear.read()) > 0.5))
    (acts, targets), (_, found) = at_the_end(model), at_the_end(pruned)
    samples = len(acts.batches[0])
    rows = slice(1, 3) if samples > 1 else slice(0, 1)  # XLNet comes in single sequences
    inputs = [hidden[0][rows] if samples > 1 else hidden[0] for hidden in (found, targets)]
    with LmHead(model, stack_of(model), Weights(model)).error(acts) as error:
        value = error(*inputs, Microbatch(0, rows, samples), epoch)
    every = divergence(model, pruned)[rows]
    sliced = family != "roberta"  # which cannot slice its logits
    expected = every[:, epoch::4] if sliced else every
    assert float(value) == pytest.approx(float(expected.mean()), rel=1e-3)
    assert float(value) > 0.0


def test_its_gradient_is_that_of_its_value() -> None:
    model = make_llama().double().eval()
    acts, (target,) = at_the_end(model)
    error = LogitsError(model, stack_of(model), acts)
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(target.shape, generator=generator, dtype=target.dtype)
    found = (target + 0.1 * direction).requires_grad_(True)
    microbatch, step = Microbatch(0, slice(0, SAMPLES), SAMPLES), 1e-3
    error(found, target, microbatch).backward()
    assert found.grad is not None
    above, below = (float(error(found.detach() + sign * step * direction, target, microbatch)) for sign in (1, -1))
    assert float((found.grad * direction).sum()) == pytest.approx((above - below) / (2 * step), rel=1e-2)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_run_lowers_it_on_held_out_sequences() -> None:
    settings: dict[str, Any] = {"sparsity": 0.5, "allocation": "uniform", "learning_rate": 2e-2, "tuning_epochs": 4}
    report = prune(make_llama(), Recipe(**settings), calibration=make_tokens(64, 16), progress=False)
    first, last = report.blocks
    assert not first.on_logits
    assert last.on_logits
    assert last.tuning[last.tuning_epoch] < last.tuning[0]
    assert all(linear.tuned for linear in report.linears if linear.block == 1)
    assert "KL to the dense model" in render_summary(report)
    assert render_html(report).count(" nats</td>") == 1


def test_tokens_that_the_head_forbids_cost_nothing() -> None:
    model, bias = build("llama"), torch.zeros(101)
    bias[90:] = -torch.inf
    model.lm_head.bias = torch.nn.Parameter(bias)
    report = prune(model, Recipe(), calibration=make_ids(16).clamp_max(80), progress=False)
    assert report.blocks[-1].on_logits
    assert all(0.0 < error < 100.0 for error in report.blocks[-1].tuning)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("t5", {}),  # a call of the decoder's head would run the encoder
        ("llama", {"targets": [r"layers\.0\."]}),  # the head does not read what leaves it
    ],
)
def test_other_blocks_are_tuned_by_their_outputs(family: str, options: dict[str, Any]) -> None:
    report = prune(build(family), Recipe(**options), calibration=make_ids(16), progress=False)
    assert any(block.tuning for block in report.blocks)
    assert not any(block.on_logits for block in report.blocks)
