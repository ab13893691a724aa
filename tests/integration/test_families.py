"""Every family of ``families.py``: prune, save, reload, and compare with the model in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from closeness import assert_close_in_norm
from families import FAMILIES, REFUSED, build, make_ids, outputs
from torch import Tensor, nn

from optima import Recipe, prune
from optima.calibration.activations import capture
from optima.errors import ModelError
from optima.models.blocks import Linear, find_stacks, select_linears
from optima.models.inspect import head_of
from optima.models.load import find_source
from optima.patterns import kind
from optima.plan import make_plan
from optima.reporting.record import Report

UNREACHED = ("dt_proj",)  # Mamba reads its weight without calling it


def linears_to_prune(model: nn.Module) -> dict[str, Linear]:
    stacks = select_linears(find_stacks(model), [".*"], [])
    return {linear.name: linear for stack in stacks for block in stack.blocks for linear in block.linears}


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(one: nn.Module, other: nn.Module) -> None:
    assert all(own.equal(their) for own, their in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_prune_save_reload(family: str, tmp_path: Path) -> None:
    pattern = "0.5" if len(family) % 2 else "2:4"  # one of the two for each
    model, output = build(family), tmp_path / "out"
    dense = weights_of(model)
    check_chain(model)
    recipe = Recipe(batch_size=2, pattern=[pattern], allocation="uniform", tuning_epochs=1)
    report = prune(model, recipe, output_dir=output, calibration=make_ids(4))

    linears = linears_to_prune(model)
    pruned = {record.name for record in report.linears}
    assert pruned == {name for name in linears if not name.endswith(UNREACHED)}
    assert report.rows_not_converged == 0
    for record in report.linears:
        assert record.error <= record.error_mask * (1 + 1e-4)
        check_counts(linears[record.name].read() == 0, pattern)
    check_everything_is_named(model, report)

    reloaded = type(model).from_pretrained(output).eval()
    assert all(torch.equal(tensor, reloaded.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert_close_in_norm(outputs(reloaded), outputs(model))
    owners = pruned | {name.rpartition(".")[0] for name in pruned if linears[name].expert}
    vectors = {name for name, parameter in model.named_parameters() if parameter.ndim == 1}  # which tuning changes too
    for name, tensor in model.state_dict().items():
        if name.removesuffix(".weight") not in owners and name not in vectors:
            assert torch.equal(tensor, dense[name]), f"{name} is not to be pruned and changed"
    assert {"config.json", "report.json", "report.md", "recipe.yaml"} <= {path.name for path in output.iterdir()}

    for file in output.glob("*.safetensors"):
        file.write_bytes(b"a plan reads no weights")
    plan = make_plan(find_source(str(output)), Recipe(max_seq_length=16))
    assert {each.name: each.shape for each in plan.linears} == {name: each.shape for name, each in linears.items()}


def check_counts(zeros_OD: Tensor, pattern: str) -> None:
    if pattern == "2:4":
        assert (zeros_OD.reshape(-1, 4).sum(dim=1) == 2).all()
    else:
        assert int(zeros_OD.sum()) == round(0.5 * zeros_OD.numel())


def check_everything_is_named(model: nn.Module, report: Report) -> None:
    """Every matrix is pruned, or in the notes, or an embedding or head."""
    pruned, notes = {record.name for record in report.linears}, " ".join(report.run.notes).split()
    embeddings = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    head = set() if head_of(model) is None else set(head_of(model).parameters())
    blocks = tuple(f"{block.name}." for stack in find_stacks(model) for block in stack.blocks)
    for name, parameter in model.named_parameters():
        owner = name.removesuffix(".weight")
        vector = parameter.ndim < 2 or name.endswith("bias")  # experts and heads may have one each
        if vector or owner in pruned or f"{owner}.0" in pruned or parameter in head:
            continue
        if parameter not in embeddings or name.startswith(blocks):
            assert {kind(name), kind(owner), owner} & set(notes), f"no note names {name}, which stays dense"


def check_chain(model: nn.Module) -> None:
    """Block by block, hidden states are those of the model's own forward pass."""
    for stack in find_stacks(model):
        acts = capture(model, stack, make_ids().split(2))
        expected: list[Tensor] = []
        handle = stack.blocks[-1].module.register_forward_hook(
            lambda module, args, output, found=expected: found.append(
                output[0] if isinstance(output, (tuple, list)) else output
            )
        )
        for batch in acts.batches:
            outputs(model, batch)
        handle.remove()
        for block in stack.blocks:
            acts.forward(block)
        assert_close_in_norm(torch.cat(acts.hidden), torch.cat(expected), name=stack.blocks[-1].name)


@pytest.mark.parametrize("family", REFUSED)
def test_what_text_cannot_prune_is_refused_unchanged(family: str) -> None:
    model = build(family)
    before = weights_of(model)
    with pytest.raises(ModelError, match=REFUSED[family][1]):
        prune(model, Recipe(), calibration=make_ids())
    if family != "rwkv":  # its own forward pass changes its weights
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_weights_that_blocks_share_stay_as_they_are() -> None:
    model = build("zamba2")
    before = weights_of(model)
    recipe = Recipe(ignore=["shared_transformer"], tuning_epochs=2, learning_rate=3e-3, allocation="uniform")
    report = prune(model, recipe, calibration=make_ids(24))
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert not [name for name in changed if "shared_transformer" in name]
    assert [name for name in changed if name.endswith("norm.weight")], "what they do not share is tuned"
    assert len(report.linears) == 10
    assert any("shared_transformer.self_attn.q_proj (2 places)" in note for note in report.run.notes)


def test_a_decoder_is_calibrated_on_the_pruned_encoder() -> None:
    """With and without a pruned encoder, the decoder's weights differ."""
    whole, decoder = build("t5"), build("t5")
    prune(whole, Recipe(pattern=["2:4"]), calibration=make_ids())
    report = prune(decoder, Recipe(pattern=["2:4"], targets=["^decoder"]), calibration=make_ids())
    assert {linear.block for linear in report.linears} == {2, 3}, "as where the encoder's blocks are pruned too"
    cross = "decoder.block.1.layer.1.EncDecAttention.k"
    assert not torch.equal(linears_to_prune(whole)[cross].read(), linears_to_prune(decoder)[cross].read())
    assert not (linears_to_prune(decoder)["encoder.block.0.layer.0.SelfAttention.q"].read() == 0).any()
