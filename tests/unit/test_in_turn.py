"""Linears calibrated in turn: each sees what the pruned ones before it hand on, in one forward pass of the block."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build, make_ids
from test_hessian_accumulation import GROUPS, Calls, Host, names, streams_into
from test_out_of_memory import little_memory
from tiny import make_llama, make_tokens, save_model
from torch import Tensor, nn

from optima import Recipe, prune
from optima.build import build as build_methods
from optima.calibration.accumulator import Found
from optima.calibration.statistics import observe, observe_in_turn
from optima.calibration.streams import Streams
from optima.errors import CalibrationError, ModelError, RecipeError
from optima.models.source import find_source
from optima.models.stacks import Block
from optima.plan import make_plan
from optima.preflight.checks import preflight, sized
from optima.recipe_files import load_recipe


def halve(found: Found) -> None:
    """Prune every other weight."""
    for linear in found.linears:
        weight_OD = linear.read().clone()
        weight_OD[:, ::2] = 0
        linear.write(weight_OD)


def in_turn(block: Block, streams: Streams, onward: bool = True) -> list[Found]:
    every = []
    for found in observe_in_turn(block, streams, 0.5, 0.01, onward=onward):
        every.append(found)
        halve(found)
    return every


def hessian_DD(found: Found) -> Tensor:
    assert found.statistics is not None
    return found.statistics.hessian.matrix_DD


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_each_sees_what_the_pruned_ones_before_it_hand_on(batch_size: int) -> None:
    """Pass by pass: the whole block is observed anew before each group is pruned."""
    model, batches = make_llama(), make_tokens(5, 16).split(batch_size)
    block, streams = streams_into(copy.deepcopy(model), batches)
    found = in_turn(block, streams)
    assert names(found) == GROUPS
    block, again = streams_into(model, batches)
    for place, one in enumerate(found):
        expected = list(observe(block, again, 0.5, 0.01))[place]
        assert torch.equal(hessian_DD(one), hessian_DD(expected))
        assert one.statistics is not None
        assert one.statistics.tokens == 80
        halve(expected)
    again.advance(block)
    assert all(map(torch.equal, streams.hidden, again.hidden))


def test_without_going_onward_streams_stay() -> None:
    block, streams = streams_into(make_llama(), make_tokens().split(2))
    before = list(streams.hidden)
    assert names(in_turn(block, streams, onward=False)) == GROUPS
    assert all(one is other for one, other in zip(streams.hidden, before, strict=True))


@pytest.mark.parametrize("name", ["self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"])
@pytest.mark.parametrize("later", [False, True])
def test_out_of_memory_halves_a_pass_wherever_it_waits(name: str, later: bool) -> None:
    model, batches = make_llama(), make_tokens(8, 16).split(4)
    block, streams = streams_into(copy.deepcopy(model), batches)
    expected = in_turn(block, streams)
    block, halved = streams_into(model, batches)
    halved.halving.most = 2 if later else None
    with little_memory(block.module.get_submodule(name), 2 - later):
        found = in_turn(block, halved)
    assert halved.halving.most == 2 - later
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(hessian_DD(one), hessian_DD(other), rtol=1e-4, atol=1e-6)
        assert one.statistics is not None
        assert one.statistics.tokens == 128
    for hidden, other in zip(halved.hidden, streams.hidden, strict=True):
        torch.testing.assert_close(hidden, other, rtol=1e-4, atol=1e-5)


def own_block(forward: Callable[[Calls, Tensor], object]) -> tuple[Block, Streams]:
    table_VD = torch.rand(40, 4, generator=torch.Generator().manual_seed(0))
    host = Host(Calls(forward, a=nn.Linear(4, 4), b=nn.Linear(4, 4)), table_VD)
    return streams_into(host, torch.randint(40, (6, 12), generator=torch.Generator().manual_seed(1)).split(2))


def test_sequences_that_take_different_ways_are_refused() -> None:
    def forward(block: Calls, hidden: Tensor) -> None:
        first, second = (block.a, block.b) if hidden[0, 0, 0] > 0.5 else (block.b, block.a)
        second(first(hidden))

    with pytest.raises(ModelError, match=r"blocks\.0\.a and blocks\.0\.b in different orders: leave out true_seq"):
        in_turn(*own_block(forward))


def test_what_looked_shared_and_is_not_is_refused() -> None:
    def forward(block: Calls, hidden: Tensor) -> None:
        block.a(hidden)
        block.b(hidden if hidden.shape[1] <= 8 else hidden * 2)

    with pytest.raises(CalibrationError, match="not over a whole calibration sequence"):
        in_turn(*own_block(forward))


def test_a_linear_that_no_token_reaches_comes_last() -> None:
    def forward(block: Calls, hidden: Tensor) -> None:
        block.b(hidden)
        block.a(hidden * 2 if hidden.shape[1] <= 8 else hidden[:, :0])

    found = in_turn(*own_block(forward))
    assert [(one.linears[0].name, one.statistics is None) for one in found] == [
        ("blocks.0.b", False),
        ("blocks.0.a", True),
    ]


def test_one_that_is_called_twice_is_calibrated_at_once_and_the_report_says_so() -> None:
    model = make_llama()
    mlp = model.model.layers[0].mlp
    once = mlp.forward
    mlp.forward = lambda hidden: once(hidden) + once(2 * hidden)
    report = prune(
        model, Recipe(selector="wanda", objective="plain", true_sequential=True), calibration=make_ids(), progress=False
    )
    (note,) = (note for note in report.run.notes if "true_sequential" in note)
    assert "by two: model.layers.0.mlp.gate_proj is called several times in a forward pass" in note
    assert all(linear.sparsity == 0.5 for linear in report.linears)


@pytest.mark.parametrize("family", ["gpt2", "bert", "t5", "bart", "mixtral"])
def test_families(family: str) -> None:
    """Every linear is pruned, by one pass a block where there are no experts."""
    model = build(family)
    recipe = Recipe(selector="wanda", objective="sink", gap=1e-2, true_sequential=True, pattern=["2:4"])
    report = prune(model, recipe, calibration=make_ids(), progress=False)
    assert report.linears
    assert all(linear.sparsity == 0.5 for linear in report.linears)
    assert any("experts are calibrated together" in note for note in report.run.notes) == (family == "mixtral")


def test_a_batch_need_not_reach_all_experts() -> None:
    """Of those that are modules each is called by itself."""
    recipe = replace(load_recipe("fast"), batch_size=1)
    report = prune(build("switch"), recipe, calibration=make_ids(), progress=False)
    assert any("experts are calibrated together" in note for note in report.run.notes)
    assert [linear for linear in report.linears if "expert_" in linear.name and linear.sparsity == 0.5]


def test_two_passes_where_there_is_no_room_for_all_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optima.preflight.settling.HELD_SHARE", 1e-9)
    one, other = make_llama(), make_llama()
    recipe = Recipe(selector="wanda", objective="plain", true_sequential=True)
    report = prune(one, recipe, calibration=make_ids(), progress=False)
    prune(other, replace(recipe, true_sequential=False), calibration=make_ids(), progress=False)
    assert not report.run.recipe["true_sequential"]
    assert any("what all sequences need inside one, 0.0 GiB, is more than" in note for note in report.run.notes)
    assert all(map(torch.equal, one.state_dict().values(), other.state_dict().values()))


@pytest.mark.parametrize(
    ("family", "samples", "options", "expected"),
    [
        ("llama", 1, {}, True),
        ("llama", 1, {"tuning_epochs": 1}, False),
        ("llama", 1, {"sparsity": 0.6}, False),
        ("llama", 1, {"pattern": ["2:4"]}, False),
        ("llama", 64, {}, False),
        ("llama", 64, {"true_sequential": True}, True),
        ("mixtral", 1, {}, False),
    ],
)
def test_auto_is_for_few_activations_that_save_a_pass(
    family: str, samples: int, options: dict[str, Any], expected: bool
) -> None:
    """Few beside the weights of these tiny models."""
    model = build(family)
    chosen = {"objective": "plain", "true_sequential": "auto", "num_calibration_samples": samples, "max_seq_length": 8}
    recipe = Recipe(**(chosen | options))
    found = preflight(model, recipe, build_methods(recipe))
    settled, after = sized(model, recipe, found, torch.float32)
    assert settled.true_sequential is expected
    assert after.notes == found.notes


def test_auto_is_in_recipes_alone() -> None:
    assert load_recipe("fast").true_sequential == "auto"
    with pytest.raises(RecipeError, match="true_sequential must be true, false or auto, got 'always'"):
        Recipe(true_sequential="always")  # type: ignore[arg-type]


@pytest.mark.parametrize("true_sequential", [False, True])
def test_a_plan_may_be_for_a_device_elsewhere(true_sequential: bool, tmp_path: Path) -> None:
    source = find_source(str(save_model(tmp_path / "model")))
    recipe = Recipe(device="cuda", objective="sink", max_seq_length=16, true_sequential=true_sequential)
    plan = make_plan(source, recipe)
    assert plan.passes == 2 - true_sequential


def test_tuning_begins_with_what_enters_the_block() -> None:
    recipe = Recipe(objective="plain", tuning_epochs=1, true_sequential=True)
    report = prune(make_llama(), recipe, calibration=make_tokens(8, 16), progress=False)
    assert all(block.tuning[block.tuning_epoch] <= block.tuning[0] for block in report.blocks)
