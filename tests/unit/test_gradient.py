"""Regional gradients against a plain loop over samples, and the pipeline that computes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from families import build, make_ids
from tiny import VOCAB, NoBackward, blocks_of, make_bert, make_llama, make_tokens
from torch import Tensor
from transformers import PreTrainedModel

from optima import Recipe, prune
from optima.calibration.capture import capture
from optima.calibration.gradient import regional_gradients
from optima.errors import ModelError
from optima.models.stacks import Block, find_stacks


def make(kind: str, **settings: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(vocab_size=VOCAB, **settings)
    model: PreTrainedModel = transformers.AutoModelForCausalLM.from_config(config).eval()
    return model


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": make_llama,
    "bert": make_bert,
    "gpt2": lambda: make("GPT2", n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "mixtral": lambda: make(
        "Mixtral", hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=2,
    ),
}  # fmt: skip


def first_block(model: PreTrainedModel, batch_size: int) -> dict[str, Tensor]:
    (stack,) = find_stacks(model)
    streams = capture(model, stack, make_tokens().split(batch_size))
    return regional_gradients(stack.blocks[0], streams)


def plain(model: PreTrainedModel, block: Block) -> dict[str, Tensor]:
    """The model's own forward pass on one sample after the other; the block's output as a hook sees it."""
    outputs: list[Any] = []
    block.module.register_forward_hook(lambda module, args, output: outputs.append(output))
    squares: dict[str, list[Tensor]] = {}
    for tokens_L in make_tokens():
        model.zero_grad()
        model(input_ids=tokens_L[None])
        output = outputs.pop()
        hidden = output[0] if isinstance(output, tuple) else output
        hidden.square().sum().div(hidden.shape[1]).sqrt().backward()
        for linear in block.linears:
            assert linear.parameter.grad is not None
            gradient = linear.orient(linear.parameter.grad)
            squares.setdefault(linear.name, []).append(gradient.square())
    return {name: torch.stack(values).mean(dim=0).sqrt() for name, values in squares.items()}


@pytest.mark.parametrize("batch_size", [1, 2, 5])
@pytest.mark.parametrize("kind", MODELS)
def test_against_a_plain_loop(kind: str, batch_size: int) -> None:
    model = MODELS[kind]()
    required = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    found = first_block(model, batch_size)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == required
    expected = plain(model, blocks_of(model)[0])
    assert found.keys() == expected.keys()
    for name, gradient_OD in expected.items():
        torch.testing.assert_close(found[name], gradient_OD, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("Bloom", {"hidden_size": 32, "n_layer": 1, "n_head": 4}),
        ("XLNet", {"d_model": 32, "n_layer": 1, "n_head": 4, "d_inner": 48}),
    ],
)
def test_batches_of_models_that_cannot_take_them_apart(family: str, sizes: dict[str, int]) -> None:
    """Bloom's position biases come as batch x heads, and XLNet's hidden states are not batch first."""
    found, expected = (first_block(make(family, **sizes), batch_size) for batch_size in (2, 1))
    assert all(gradient_OD.equal(expected[name]) for name, gradient_OD in found.items())


def test_inside_inference_mode() -> None:
    expected = first_block(make_llama(), 2)
    model = make_llama()
    with torch.inference_mode():
        found = first_block(model, 2)
    assert all(torch.equal(found[name], gradient_OD) for name, gradient_OD in expected.items())
    with torch.inference_mode(), pytest.raises(ModelError, match="was made inside"):
        first_block(make_llama(), 2)


def test_kernels_without_a_backward_pass() -> None:
    model = make_llama()
    mlp = model.model.layers[0].mlp
    mlp.forward = lambda hidden, forward=mlp.forward: forward(NoBackward.apply(hidden))
    with pytest.raises(ModelError, match="has no backward pass"):
        first_block(model, 2)


def test_keys_and_values_that_blocks_share() -> None:
    """Gradients are those of each sample, which reads its own of a batch."""
    model, found = build("gemma4"), list[dict[str, Tensor]]()
    (stack,) = find_stacks(model)
    for size in (1, 2):
        streams = capture(model, stack, make_ids(4).split(size))
        with torch.no_grad():
            gradients = {}
            for block in stack.blocks:
                gradients |= regional_gradients(block, streams)
                streams.advance(block)
        found.append(gradients)
    assert all(torch.equal(found[1][name], gradient_OD) for name, gradient_OD in found[0].items())


def test_bfloat16_weights_have_float32_gradients() -> None:
    model = make_llama().bfloat16()
    for gradient_OD in first_block(model, 2).values():
        assert gradient_OD.dtype == torch.float32
        assert gradient_OD.isfinite().all()


def test_a_survey_takes_no_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def spy(block: Block, *args: Any) -> dict[str, Tensor]:
        calls.append(block.name)
        return regional_gradients(block, *args)

    monkeypatch.setattr("optima.pipeline.regional_gradients", spy)
    recipe = Recipe(selector="gradient", allocation="owl", max_seq_length=16)
    prune(make_llama(), recipe, calibration=make_tokens())
    assert calls == ["model.layers.0", "model.layers.1"]


def test_the_pipeline_gives_the_selector_its_gradients() -> None:
    kept = {}
    for selector in ("gradient", "wanda"):
        model = make_llama()
        prune(model, Recipe(selector=selector, solver="none", max_seq_length=16), calibration=make_tokens())
        kept[selector] = {linear.name: linear.read() != 0 for linear in blocks_of(model)[0].linears}
    for name in kept["wanda"]:
        assert kept["gradient"][name].sum() == kept["wanda"][name].sum()
    assert any(not torch.equal(kept["gradient"][name], kept["wanda"][name]) for name in kept["wanda"])
