"""A model in memory is left as it was, but for the weights that were pruned."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tiny import make_llama, make_tokens
from torch import nn
from torch.nn.utils.prune import random_unstructured

from optima import Callback, Recipe, prune
from optima.errors import ModelError, RecipeError


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_hooks_of_accelerate_survive() -> None:
    """They live in the ``forward`` that accelerate puts on a module itself."""
    model, calls = make_llama(), []
    for layer in model.model.layers:
        original = layer.forward

        def forward(*args: Any, original: Any = original, **kwargs: Any) -> Any:
            calls.append(1)
            return original(*args, **kwargs)

        layer.forward = forward
    model(make_tokens())
    assert len(calls) == 2
    prune(model, Recipe(), calibration=make_tokens())
    calls.clear()
    model(make_tokens())
    assert len(calls) == 2


def test_every_module_comes_back_in_its_own_mode() -> None:
    model = make_llama().train()
    model.model.layers[0].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    prune(model, Recipe(), calibration=make_tokens())
    assert {name: module.training for name, module in model.named_modules()} == modes


@pytest.mark.parametrize("made_inside", [False, True])
def test_inside_inference_mode_the_same_bits(made_inside: bool) -> None:
    expected, model = make_llama(), make_llama()
    # What was made inside has no gradients.
    recipe = Recipe(objective="sink") if made_inside else Recipe(tuning_epochs=1)
    prune(expected, recipe, calibration=make_tokens())
    with torch.inference_mode():
        if made_inside:
            model = make_llama()
        prune(model, recipe, calibration=make_tokens())
        found = weights(model)
    assert all(torch.equal(found[name], tensor) for name, tensor in weights(expected).items())


WIDTHS = (torch.bfloat16, torch.float64)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
        assert torch.get_default_dtype() == dtype
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def bfloat16_where_there_are_units() -> Iterator[None]:
    torch.set_float32_matmul_precision("medium")
    try:
        yield
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize(
    "switch",
    [
        torch.autocast("cpu", dtype=torch.bfloat16),
        torch.device("meta"),
        bfloat16_where_there_are_units(),
        *map(default_dtype, WIDTHS),
    ],
    ids=["autocast", "meta", "medium", *map(str, WIDTHS)],
)
def test_the_callers_switches_change_no_bit(switch: Any) -> None:
    expected, model = make_llama(), make_llama()
    recipe = Recipe(sparsity=0.5, allocation="loss", tuning_epochs=1)
    prune(expected, recipe, calibration=make_tokens())
    tokens = make_tokens()
    with switch:
        prune(model, recipe, calibration=tokens)
    assert all(torch.equal(weights(model)[name], tensor) for name, tensor in weights(expected).items())


def test_weights_that_are_not_in_memory() -> None:
    model = make_llama()
    model.model.layers[1].mlp.to("meta")
    with pytest.raises(ModelError, match="weights that are not in memory"):
        prune(model, Recipe(), calibration=make_tokens())


def test_a_quantized_one() -> None:
    model = make_llama()
    up = model.model.layers[1].mlp.up_proj
    up.weight = nn.Parameter(up.weight.mul(100).to(torch.int8), requires_grad=False)
    flagged = make_llama()  # as transformers marks it: codes may be in modules of other kinds
    flagged.is_quantized = True
    for each in (model, flagged):
        with pytest.raises(ModelError, match="is quantized: load it unquantized"):
            prune(each, Recipe(), calibration=make_tokens())


def test_one_with_adapters() -> None:
    """A linear with LoRA, as PEFT makes it."""
    model = make_llama()
    mlp = model.model.layers[0].mlp
    adapted = nn.ModuleDict({"base_layer": mlp.up_proj, "lora_A": nn.ModuleDict({"default": nn.Linear(32, 4)})})
    mlp.up_proj = adapted
    with pytest.raises(ModelError, match=r"is wrapped .*base_layer"):
        prune(model, Recipe(), calibration=make_tokens())


class Wrapped(torch.Tensor):
    """As quantization libraries keep weights, under a dtype that they are not of."""

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return [], None

    __tensor_unflatten__ = staticmethod(torch.empty)


def test_weights_that_are_made_of_others() -> None:
    masked, normed, embedded = make_llama(), make_llama(), make_llama()
    random_unstructured(masked.model.layers[0].mlp.up_proj, "weight", 0.1)
    nn.utils.parametrizations.weight_norm(normed.model.layers[0].mlp.up_proj)
    for model in (masked, normed):
        with pytest.raises(ModelError, match=r"layers\.0\.mlp\.up_proj is computed from other"):
            prune(model, Recipe(), calibration=make_tokens())
    up = embedded.model.layers[0].mlp.up_proj
    up.weight = nn.Parameter(up.weight.detach().as_subclass(Wrapped), requires_grad=False)
    with pytest.raises(ModelError, match=r"up_proj\.weight is a Wrapped, not a plain tensor"):
        prune(embedded, Recipe(), calibration=make_tokens())


def test_callbacks_are_a_list_of_callbacks() -> None:
    for callbacks in ([print], Callback(), ["text"]):
        with pytest.raises(RecipeError, match=r"callbacks must be a list of optima\.Callback objects"):
            prune(make_llama(), Recipe(), calibration=make_tokens(), callbacks=callbacks)  # type: ignore[arg-type]
