"""``optima order``: in every family the same function, fewer that matter lost, and nothing left out silently."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, build, fisher_of, make_ids
from tiny import load_weights, make_llama, make_tokens, prune_arguments, save_model, snapshot
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import optima
from optima import Ordering, Recipe
from optima.cli import main
from optima.core.hessian import Hessian
from optima.errors import ModelError, NumericalError, RecipeError
from optima.models.blocks import find_stacks, select_linears
from optima.models.inputs import arguments
from optima.names import kind

# What stays where it is, by family: no channels of these kinds are known, or the model would compute something else.
HEADS_STAY = {
    "xlnet", "deepseek_v3", "gemma4_moe", "qwen3_next", "gemma3n", "gemma4", "glm_moe_dsa", "deepseek_v4",
}  # fmt: skip
MLPS_STAY = {"xlnet"}
# Each has something that no other has; the rest are marked slow.
TELLING = {"llama", "phi3", "gpt2", "gpt_neox", "mixtral", "gpt_oss", "deepseek_v3", "gemma3n", "t5"}
UNDIVIDED = {"mamba"}  # a linear with two inputs


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


def order(model: PreTrainedModel, **options: Any) -> Ordering:
    recipe = Recipe(pattern=["2:4"], batch_size=2)
    return optima.order(model, recipe, calibration=make_ids(), progress=False, **options)


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(family, marks=() if family in TELLING else pytest.mark.slow)
        for family in FAMILIES
        if family not in UNDIVIDED
    ],
)
def test_an_ordered_model_is_the_same_function_and_loses_less(family: str) -> None:
    model = made_uneven(build(family))
    before = outputs(model)
    found = order(model)
    torch.testing.assert_close(outputs(model), before, rtol=1e-4, atol=1e-5 * float(before.abs().max()))
    moved = {kind: lost for kind, _, lost in found.summary()}
    assert all(lost < 1.0 for lost in moved.values()), moved
    assert ("heads" in moved) == (family not in HEADS_STAY), found.notes
    assert ("mlp" in moved) == (family not in MLPS_STAY), found.notes
    # Every linear's inputs were ordered, or a note names its kind.
    left = " ".join(note for note in found.notes if note.startswith("the inputs of these linears"))
    stacks = select_linears(find_stacks(model), [".*"], ["lm_head", "embed"])
    readers = {linear.name for stack in stacks for block in stack.blocks for linear in block.linears}
    if not moved:
        assert all(kind(name) in left for name in readers)


def test_a_wrong_layout_is_found_where_its_weights_matter_little() -> None:
    model = made_uneven(build("gpt_oss"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "experts.down_proj" in name and parameter.ndim > 1:
                parameter.mul_(0.002)
    before = outputs(model)
    found = order(model)
    torch.testing.assert_close(outputs(model), before, rtol=1e-4, atol=1e-5 * float(before.abs().max()))
    assert "mlp" in {kind for kind, _, _ in found.summary()}


def test_a_pruned_model_is_refused() -> None:
    model = make_llama()
    optima.prune(model, Recipe(sparsity=0.5, batch_size=2), calibration=make_ids(), progress=False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ModelError, match=r"\d\d% of .* are zeros: this model was pruned, .*Order the dense model"):
        order(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_record_tells_what_moved_where(root: Path) -> None:
    """The recorded orders make of the dense weights those that were written; the output is pruned like any other."""
    model = made_uneven(make_llama(attention_bias=True, mlp_bias=True, tie_word_embeddings=True))
    save_model(root / "model", model)
    options = prune_arguments("--pattern", "2:4")[4:]
    assert main(["order", "model", "--output-dir", "ordered", *options]) == 0
    content = json.loads(Path("ordered/ordering.json").read_text())
    channels = {(each["kind"], each["name"]): each for each in content["channels"]}
    assert len(channels) == 4  # an MLP and an attention in each of two blocks
    old, new = load_weights(root / "model"), load_weights(root / "ordered")
    inner_W = channels["mlp", "model.layers.1.mlp"]["order"]
    gate, down = "model.layers.1.mlp.gate_proj", "model.layers.1.mlp.down_proj"
    assert torch.equal(new[f"{gate}.weight"], old[f"{gate}.weight"][inner_W])
    assert torch.equal(new[f"{gate}.bias"], old[f"{gate}.bias"][inner_W])
    assert torch.equal(new[f"{down}.weight"], old[f"{down}.weight"][:, inner_W])
    # The values of each head are turned, and those of the queries that share it back: both tell by how much.
    attention = channels["heads", "model.layers.1.self_attn"]
    assert attention["order"] is None
    value, out = "model.layers.1.self_attn.v_proj", "model.layers.1.self_attn.o_proj"
    width = model.config.head_dim
    for head in range(model.config.num_key_value_heads):
        own = slice(head * width, (head + 1) * width)
        before, turned = old[f"{value}.weight"][own].double(), new[f"{value}.weight"][own].double()
        turn_WW = torch.linalg.lstsq(before.mT, turned.mT).solution.mT
        torch.testing.assert_close(turn_WW @ turn_WW.mT, torch.eye(width).double(), rtol=0.0, atol=1e-4)
        bias = f"{value}.bias"
        torch.testing.assert_close(new[bias][own].double(), turn_WW @ old[bias][own].double(), rtol=0.0, atol=1e-4)
        copies = model.config.num_attention_heads // model.config.num_key_value_heads
        for query in range(head * copies, (head + 1) * copies):
            read = slice(query * width, (query + 1) * width)
            expected = old[f"{out}.weight"][:, read].double() @ turn_WW.mT
            torch.testing.assert_close(new[f"{out}.weight"][:, read].double(), expected, rtol=0.0, atol=1e-4)
    tokens = make_tokens()
    with torch.no_grad():
        after = AutoModelForCausalLM.from_pretrained("ordered")(tokens).logits
        torch.testing.assert_close(after, model(tokens).logits, rtol=1e-4, atol=1e-5)
    # Only an output of ours is replaced, by the same bits.
    assert main(["order", "model", "--output-dir", "ordered", *options, "--overwrite"]) == 0
    assert all(torch.equal(new[name], tensor) for name, tensor in load_weights(root / "ordered").items())


def test_only_channels_that_are_named_change_places(capsys: pytest.CaptureFixture[str], root: Path) -> None:
    options = prune_arguments("--pattern", "down_proj=2:4", "0.5", "--channels", "mlp")[4:]
    assert main(["order", "model", "--output-dir", "ordered", *options]) == 0
    said = capsys.readouterr().out
    assert re.search(r"^mlp: 2 ordered; of their saliency the pattern prunes \d+\.\d% less$", said, re.MULTILINE)
    old, new = load_weights(root / "model"), load_weights(root / "ordered")
    changed = {name.split(".")[-2] for name in old if not torch.equal(old[name], new[name])}
    assert changed == {"gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize("pruned", ["v_proj", "o_proj"])
def test_values_are_rotated_for_either_linear(pruned: str) -> None:
    patterns = [f"{pruned}=2:4", "0.5"]
    dense, rotated = make_llama(), make_llama()
    recipe = Recipe(pattern=patterns, objective="plain", allocation="uniform", tuning_epochs=0)
    optima.order(rotated, recipe, calibration=make_ids(), channels=["heads"], progress=False)
    old, new = (dict(model.named_parameters()) for model in (dense, rotated))
    assert {name.split(".")[-2] for name in old if not torch.equal(old[name], new[name])} == {"v_proj", "o_proj"}
    plain, better = (
        optima.prune(model, recipe, calibration=make_ids(), progress=False).linears for model in (dense, rotated)
    )
    for before, after in zip(plain, better, strict=True):
        if before.name.endswith(pruned):
            assert after.error_mask < 0.95 * before.error_mask, before.name


@pytest.mark.parametrize(("part", "shared"), [("self_attn", "v_proj")])
def test_channels_inside_a_block_stay_if_it_shares_weights_with_another(part: str, shared: str) -> None:
    model, tokens = make_llama(), make_tokens()
    first, second = (getattr(block.module, part) for block in find_stacks(model)[0].blocks[:2])
    setattr(second, shared, getattr(first, shared))
    with torch.no_grad():
        before = model(tokens).logits
    found = optima.order(model, Recipe(pattern="2:4", ignore=[shared, "lm_head"]), calibration=tokens)
    assert any(f"layers.1.{part}: its" in note and "share weights of theirs" in note for note in found.notes)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, before, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_sums_in_another_order_are_no_other_function() -> None:
    """Sharp attention in many blocks makes much of how float32 rounds."""
    model = make_llama(num_hidden_layers=24)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.3 / parameter.std() if parameter.ndim == 2 else 1.0)
    found = optima.order(model, Recipe(pattern=["2:4"]), calibration=make_tokens(), progress=False)
    assert {each.kind for each in found.channels} == {"mlp", "heads"}


def test_what_cannot_be_ordered_is_refused(cheap: Any, root: Path) -> None:
    arguments = prune_arguments()[4:]
    assert "add --pattern 2:4" in cheap(arguments=["order", "model", "--output-dir", "out", *arguments])
    assert "--output-dir" in cheap(arguments=["order", "model", "--pattern", "2:4"])
    assert "invalid choice: 'ffn'" in cheap(arguments=["order", "model", "--output-dir", "o", "--channels", "ffn"])
    into = ["order", "model", "--output-dir", str(root), "--overwrite", "--pattern", "2:4", *arguments]
    assert "holds the current directory" in cheap(arguments=into)
    with pytest.raises(RecipeError, match="must be a list of mlp and heads, got"):
        optima.order(make_llama(), Recipe(pattern=["2:4"]), calibration=make_tokens(), channels=["ffn"])  # type: ignore[list-item]


def test_nothing_is_written_if_nothing_has_another_order(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = prune_arguments("--pattern", "self_attn=2:4", "0.5", "--channels", "mlp")[4:]
    assert main(["order", "model", "--output-dir", "out", *options]) == 2
    assert "nothing has another order, so nothing is written" in capsys.readouterr().err
    assert not Path("out").exists()


def test_outputs_that_are_no_numbers_are_named_before_anything_moves() -> None:
    model = make_llama()
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(NumericalError, match=r"lm_head\.weight has NaN"):
        order(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items() if "head" not in name)


@pytest.mark.parametrize("part", ["prepare", "best_turn", "asdict"])
def test_nothing_is_left_of_a_run_that_fails(root: Path, monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    def fail(*args: object) -> None:
        raise ModelError("no")

    monkeypatch.setattr(f"optima.extras.order.{part}", fail)
    before = snapshot(root)
    assert main(["order", "model", "--output-dir", "a/out", *prune_arguments("--pattern", "2:4")[4:]]) == 2
    assert snapshot(root) == before


def test_channels_are_ordered_by_rows_in_units_of_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []

    def stay(saliency_RC: torch.Tensor, *args: Any) -> torch.Tensor:
        seen.append(saliency_RC.clone())
        return torch.arange(saliency_RC.shape[1])

    monkeypatch.setattr("optima.extras.order.best_order", stay)
    model = make_llama()
    weights = [block.mlp.down_proj.weight.detach().clone() for block in model.model.layers]
    recipe = Recipe(pattern=["2:4"], objective="loss", seed=3, batch_size=4)
    optima.order(model, recipe, calibration=make_tokens(8, 16), channels=["mlp"], progress=False)
    found, _ = fisher_of(make_llama(), 4)
    for number, (saliency_OD, weight_OD) in enumerate(zip(seen, weights, strict=True)):
        row_O = found.rows.get(f"model.layers.{number}.mlp.down_proj")
        assert row_O is not None
        unit_OD = saliency_OD / weight_OD.square()  # of the row times of the input
        torch.testing.assert_close(unit_OD[:, 0] / unit_OD[0, 0], row_O / row_O[0], rtol=1e-2, atol=0.0)


def test_channels_are_ordered_by_columns_in_units_of_their_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of half the logarithm of both saliencies: w^2 H_ii^(1/4) K_ii^(-3/4)."""
    seen: list[Tensor] = []
    inputs: list[Tensor] = []

    def stay(saliency_RC: Tensor, *args: Any) -> Tensor:
        seen.append(saliency_RC.clone())
        return torch.arange(saliency_RC.shape[1])

    monkeypatch.setattr("optima.extras.order.best_order", stay)
    model, tokens_NL = make_llama(), make_tokens(8, 16)
    down = model.model.layers[0].mlp.down_proj
    handle = down.register_forward_pre_hook(lambda module, args: inputs.append(args[0].detach().flatten(0, 1).double()))
    with torch.no_grad():
        model(tokens_NL)
    handle.remove()
    recipe = Recipe(pattern=["2:4"], objective="plain", batch_size=4)
    optima.order(model, recipe, calibration=tokens_NL, channels=["mlp"], progress=False)
    (inputs_TD,) = inputs
    damped_DD = Hessian(inputs_TD.mT @ inputs_TD / len(inputs_TD), recipe.damping).damped_DD
    unit_D = damped_DD.diagonal() ** 0.25 / torch.linalg.inv(damped_DD).diagonal() ** 0.75
    expected_OD = down.weight.detach().square() * unit_D.float()
    torch.testing.assert_close(seen[0], expected_OD, rtol=1e-2, atol=1e-3 * float(expected_OD.max()))
