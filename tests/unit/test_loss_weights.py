"""Loss weights: the gradients of the model's own loss, by autograd through the whole model, and what they change."""

from __future__ import annotations

import copy

import pytest
import torch
from layers import layer_of, make_layer
from tiny import make_bert, make_llama, make_tokens

from optima import Recipe, prune
from optima.calibration.capture import capture
from optima.calibration.loss_weights import LossWeights, loss_weights
from optima.errors import ModelError
from optima.linear import Methods, prune_linear
from optima.models.stacks import find_stacks, select_linears
from optima.patterns import Unstructured
from optima.selectors.magnitude import Magnitude


def sweep(model: torch.nn.Module, batch_size: int = 4) -> tuple[LossWeights, torch.Tensor]:
    tokens_NL = make_tokens(8, 16)
    (stack,) = select_linears(find_stacks(model), [".*"], [])
    batches = list(tokens_NL.split(batch_size))
    found = loss_weights(model, stack, capture(model, stack, batches), batches, torch.device("cpu"), seed=3)  # type: ignore[arg-type]
    return found, tokens_NL


def test_they_are_the_gradients_of_the_whole_model() -> None:
    model = make_llama().eval()
    found, tokens_NL = sweep(model)
    name = "model.layers.1.mlp.up_proj"
    seen: list[torch.Tensor] = []

    def watch(module: torch.nn.Module, args: object, output: torch.Tensor) -> None:
        output.retain_grad()
        seen.append(output)

    model.get_submodule(name).register_forward_hook(
        lambda module, args, output: seen.append(output) or output.retain_grad()
    )
    generator = torch.Generator().manual_seed(3)
    square = []
    for tokens_L in tokens_NL:
        log_LV = model(input_ids=tokens_L[None]).logits[0].float().log_softmax(dim=-1)
        noise_LV = torch.empty(log_LV.shape).exponential_(generator=generator)
        label_L1 = (log_LV.detach() - noise_LV.log()).argmax(dim=-1, keepdim=True)
        (-log_LV.gather(1, label_L1).sum()).backward()
        square.append(seen[-1].grad[0].square())
    square_TO = torch.cat(square)
    assert torch.allclose(found.rows[name], square_TO.mean(dim=0), rtol=1e-4, atol=1e-12)
    # gate and up share their input, and the group goes by its first.
    group = torch.cat([own.flatten() for own in found.tokens["model.layers.1.mlp.gate_proj"]])
    assert bool((group >= square_TO.sum(dim=1) * (1 - 1e-4)).all())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_batches_do_not_matter() -> None:
    first, second = sweep(make_llama().eval(), 4)[0], sweep(make_llama().eval(), 8)[0]
    for name in first.rows:
        assert torch.allclose(first.rows[name], second.rows[name], rtol=1e-4)


def test_weights_have_mean_one() -> None:
    found, _ = sweep(make_llama().eval())
    for name in found.tokens:
        assert float(torch.cat([found.of_tokens(name, batch) for batch in range(2)]).mean()) == pytest.approx(1.0)  # type: ignore[misc]
    assert all(float(found.of_rows(name).mean()) == pytest.approx(1.0) for name in found.rows)  # type: ignore[union-attr]


def test_rows_that_matter_keep_more() -> None:
    weight_OD, inputs_TD = make_layer(8, 64, dtype=torch.float32)
    task = layer_of(weight_OD / weight_OD.norm(dim=1, keepdim=True), inputs_TD)
    rows_O = torch.ones(8)
    rows_O[3] = 100.0
    weighed = copy.copy(task)
    object.__setattr__(weighed, "row_weight_O", rows_O)
    half = Unstructured(0.5, "layer")
    plain, kept = (prune_linear(each, half, Methods(Magnitude())).keep_OD for each in (task, weighed))
    assert int(kept[3].sum()) > int(plain[3].sum())
    assert int(kept.sum()) == int(plain.sum())


def test_a_run_by_the_loss() -> None:
    model = make_llama()
    report = prune(model, Recipe(objective="loss", selector="optima", scope="layer"), calibration=make_tokens())
    assert report.rows_not_converged == 0
    assert report.run.recipe["objective"] == "loss"
    assert all(linear.error_plain != linear.error for linear in report.linears)


def test_what_has_no_such_loss_is_refused() -> None:
    with pytest.raises(ModelError, match="objective loss needs a causal language model"):
        prune(make_bert(), Recipe(objective="loss"), calibration=make_tokens())
    with pytest.raises(ModelError, match="objective loss needs every block"):
        prune(make_llama(), Recipe(objective="loss", targets=[r"layers\.0\."]), calibration=make_tokens())
