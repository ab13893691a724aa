"""``optima permute``: in every family the same function, and less that matters is pruned."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, build, fisher_of, make_ids
from tiny import load_weights, make_llama, make_tokens, prune_arguments, save_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import optima
from optima import Permutation, Recipe
from optima.cli import main
from optima.core.hessian import Hessian
from optima.errors import ModelError, NumericalError
from optima.models.blocks import find_stacks
from optima.models.inputs import arguments

# What stays as it is, by family: no channels of these kinds are known, or the model would compute something else.
HEADS_STAY = {"deepseek_v3", "gemma4_moe", "qwen3_next", "gemma3n", "gemma4", "glm_moe_dsa", "deepseek_v4"}
# Each has something that no other has; the rest are marked slow.
TELLING = {"llama", "phi3", "gpt2", "gpt_neox", "mixtral", "gpt_oss", "deepseek_v3", "gemma3n", "t5"}
NOTHING_MOVES = {"mamba", "xlnet"}


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        result = model(**arguments(model, make_ids(2, 16)))
    return result.logits if "logits" in result else result.last_hidden_state


def made_uneven(model: PreTrainedModel) -> PreTrainedModel:
    """Biases and norms that tell channels apart, as those of a trained model do."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def permute(model: PreTrainedModel, **options: Any) -> Permutation:
    recipe = Recipe(pattern=["2:4"], batch_size=2)
    return optima.permute(model, recipe, calibration=make_ids(), progress=False, **options)


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(family, marks=() if family in TELLING else pytest.mark.slow)
        for family in FAMILIES
        if family not in NOTHING_MOVES
    ],
)
def test_a_permuted_model_is_the_same_function_and_loses_less(family: str) -> None:
    model = made_uneven(build(family))
    before = outputs(model)
    found = permute(model)
    torch.testing.assert_close(outputs(model), before, rtol=1e-4, atol=1e-5 * float(before.abs().max()))
    assert found.permuted
    assert bool(found.rotated) == (family not in HEADS_STAY), found.notes
    assert max(*found.permuted.values(), *found.rotated.values()) <= 1.0
    assert min(*found.permuted.values(), *found.rotated.values()) < 1.0


def test_a_wrong_layout_is_found_where_its_weights_matter_little() -> None:
    model = made_uneven(build("gpt_oss"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "experts.down_proj" in name and parameter.ndim > 1:
                parameter.mul_(0.002)
    before = outputs(model)
    assert permute(model).permuted
    torch.testing.assert_close(outputs(model), before, rtol=1e-4, atol=1e-5 * float(before.abs().max()))


def test_a_checkpoint_is_written_that_is_pruned_like_any_other(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = made_uneven(make_llama(attention_bias=True, mlp_bias=True, tie_word_embeddings=True))
    save_model(root / "model", model)
    options = prune_arguments("--pattern", "2:4")[4:]
    assert main(["permute", "model", "--output-dir", "permuted", *options]) == 0
    said = capsys.readouterr().out
    for line in (r"2 MLPs permuted; .* prunes \d+\.\d% less", r"2 attentions rotated; .* prunes \d+\.\d% less"):
        assert re.search(f"^{line}$", said, re.MULTILINE)
    tokens, new = make_tokens(), load_weights(root / "permuted")
    with torch.no_grad():
        after = AutoModelForCausalLM.from_pretrained("permuted")(tokens).logits
        torch.testing.assert_close(after, model(tokens).logits, rtol=1e-4, atol=1e-5)
    assert main(["permute", "model", "--output-dir", "again", *options]) == 0
    assert all(torch.equal(new[name], tensor) for name, tensor in load_weights(root / "again").items())
    assert main(prune_arguments("--pattern", "2:4", model="permuted")) == 0


@pytest.mark.parametrize("pruned", ["v_proj", "o_proj"])
def test_values_are_rotated_for_either_linear(pruned: str) -> None:
    """And only channels that matter to the pattern change."""
    dense, rotated = make_llama(), make_llama()
    recipe = Recipe(
        pattern=[f"{pruned}=2:4", "0.5"], objective="plain", allocation="uniform", tuning_epochs=0, batch_size=2
    )
    optima.permute(rotated, recipe, calibration=make_ids(), progress=False)
    old, new = (dict(model.named_parameters()) for model in (dense, rotated))
    assert {name.split(".")[-2] for name in old if not torch.equal(old[name], new[name])} == {"v_proj", "o_proj"}
    plain, better = (
        optima.prune(model, recipe, calibration=make_ids(), progress=False).linears for model in (dense, rotated)
    )
    for before, after in zip(plain, better, strict=True):
        if before.name.endswith(pruned):
            assert after.error_mask < 0.95 * before.error_mask, before.name


def test_channels_stay_if_the_block_shares_their_weights_with_another() -> None:
    model, tokens = make_llama(), make_tokens()
    first, second = (block.module.self_attn for block in find_stacks(model)[0].blocks[:2])
    second.v_proj = first.v_proj
    with torch.no_grad():
        before = model(tokens).logits
    found = optima.permute(model, Recipe(pattern="2:4", ignore=["v_proj", "lm_head"]), calibration=tokens)
    assert any("layers.1.self_attn: its" in note and "other blocks use them" in note for note in found.notes)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, before, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_sums_in_another_order_are_no_other_function() -> None:
    """Sharp attention in many blocks makes much of how float32 rounds."""
    model = make_llama(num_hidden_layers=24)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.3 / parameter.std() if parameter.ndim == 2 else 1.0)
    found = optima.permute(model, Recipe(pattern=["2:4"]), calibration=make_tokens(), progress=False)
    assert found.permuted
    assert found.rotated


def test_what_cannot_be_permuted_is_refused(cheap: Any, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = prune_arguments()[4:]
    assert "add --pattern 2:4" in cheap(arguments=["permute", "model", "--output-dir", "out", *arguments])
    with pytest.raises(ModelError, match="no channels can be"):
        permute(build("xlnet"))
    options = prune_arguments("--pattern", "q_proj=2:4", "0.5")[4:]
    assert main(["permute", "model", "--output-dir", "out", *options]) == 2
    assert not Path("out").exists()


def test_a_model_that_is_pruned_or_damaged_is_refused_and_stays_as_it_is() -> None:
    pruned, damaged = make_llama(), make_llama()
    optima.prune(pruned, Recipe(selector="magnitude", solver="none"), calibration=make_ids(), progress=False)
    with torch.no_grad():
        damaged.lm_head.weight[0, 0] = float("nan")
    for model, error, message in (pruned, ModelError, r"\d\d% of .* are zeros"), (damaged, NumericalError, "has NaN"):
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(error, match=message):
            permute(model)
        after = model.state_dict()
        assert all(torch.equal(after[name].nan_to_num(), tensor.nan_to_num()) for name, tensor in before.items())


@pytest.mark.parametrize("objective", ["loss", "plain"])
def test_saliencies_are_in_units_of_the_loss_and_of_their_inputs(
    monkeypatch: pytest.MonkeyPatch, objective: str
) -> None:
    """w^2 times the weight of the row times H_ii^(1/4) K_ii^(-3/4): half the logarithm of both saliencies."""
    seen: list[Tensor] = []
    inputs: list[Tensor] = []

    def stay(saliency_RC: Tensor, *args: Any) -> Tensor:
        seen.append(saliency_RC.clone())
        return torch.arange(saliency_RC.shape[1])

    monkeypatch.setattr("optima.extras.permute.best_order", stay)
    model, tokens_NL = make_llama(), make_tokens(8, 16)
    down = model.model.layers[0].mlp.down_proj
    weight_OD = down.weight.detach().clone()
    handle = down.register_forward_pre_hook(lambda module, args: inputs.append(args[0].detach().flatten(0, 1).double()))
    with torch.no_grad():
        model(tokens_NL)
    handle.remove()
    recipe = Recipe(pattern=["mlp=2:4", "0.5"], objective=objective, seed=3, batch_size=4)
    optima.permute(model, recipe, calibration=tokens_NL, progress=False)
    unit_OD = seen[0] / weight_OD.square()
    if objective == "loss":
        row_O = fisher_of(make_llama(), 4)[0].rows.get("model.layers.0.mlp.down_proj")
        assert row_O is not None
        torch.testing.assert_close(unit_OD[:, 0] / unit_OD[0, 0], row_O / row_O[0], rtol=1e-2, atol=0.0)
    else:
        (inputs_TD,) = inputs
        damped_DD = Hessian(inputs_TD.mT @ inputs_TD / len(inputs_TD), recipe.damping).damped_DD
        unit_D = damped_DD.diagonal() ** 0.25 / torch.linalg.inv(damped_DD).diagonal() ** 0.75
        torch.testing.assert_close(unit_OD, unit_D.float().expand_as(unit_OD), rtol=1e-2, atol=0.0)
