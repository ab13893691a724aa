"""``optima permute``: in every family the same function, and less that matters is pruned."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import assert_close_in_norm
from families import FAMILIES, build, make_ids, outputs
from tiny import load_weights, make_llama, make_tokens, prune_arguments, save_model
from transformers import AutoModelForCausalLM, PreTrainedModel

import optima
from optima import Permutation, Recipe
from optima.cli import main
from optima.errors import ModelError, NumericalError
from optima.models.blocks import find_stacks

# What stays as it is, by family: no channels of these kinds are known, or the model would compute something else.
HEADS_STAY = {"gpt_neox", "bloom", "falcon", "deepseek_v3", "deepseek_v4", "qwen3_next", "glm_moe_dsa"}
HEADS_STAY |= {"gemma3n", "gemma4", "gemma4_moe"}
# Each has something that no other has; the rest are marked slow.
TELLING = {"llama", "phi3", "gpt2", "gpt_neox", "mixtral", "deepseek_v3", "gemma3n", "t5"}
NOT_THE_SAME = {"mamba", "xlnet", "gpt_oss"}


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
        if family not in NOT_THE_SAME
    ],
)
def test_a_permuted_model_is_the_same_function_and_loses_less(family: str) -> None:
    model = made_uneven(build(family))
    before = outputs(model)
    found = permute(model)
    assert_close_in_norm(outputs(model), before)
    assert found.permuted
    assert bool(found.rotated) == (family not in HEADS_STAY), found.notes
    assert max(*found.permuted.values(), *found.rotated.values()) <= 1.0
    assert min(*found.permuted.values(), *found.rotated.values()) < 1.0


def test_an_mlp_of_another_layout_stays_even_where_its_weights_matter_little() -> None:
    """The gates of GPT-OSS alternate with the other outputs."""
    model = made_uneven(build("gpt_oss"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "experts.down_proj" in name and parameter.ndim > 1:
                parameter.mul_(0.002)
    before = outputs(model)
    found = permute(model)
    assert found.rotated
    assert not found.permuted
    assert_close_in_norm(outputs(model), before)


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
        assert_close_in_norm(after, model(tokens).logits)
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
        assert_close_in_norm(model(tokens).logits, before)


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
