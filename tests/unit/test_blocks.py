"""Blocks and linears are found by the structure of the model."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest
import torch
from closeness import assert_close_in_norm
from families import FAMILIES, build
from tiny import blocks_of, make_llama
from torch import nn
from transformers.pytorch_utils import Conv1D

from optima.errors import ModelError
from optima.models.blocks import (
    Block,
    Linear,
    count_outside,
    count_parameters,
    dense_notes,
    find_stacks,
    is_expert,
    select_linears,
)
from optima.patterns import kind

LLAMA_LINEARS = [
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
]


def names(blocks: Sequence[Block]) -> list[str]:
    return [linear.name for block in blocks for linear in block.linears]


class TestFindStacks:
    def test_decoder(self) -> None:
        model = make_llama()
        blocks = blocks_of(model)
        assert [(block.index, block.name) for block in blocks] == [(0, "model.layers.0"), (1, "model.layers.1")]
        assert all(block.module is layer for block, layer in zip(blocks, model.model.layers, strict=True))
        assert names(blocks) == [f"{block.name}.{name}" for block in blocks for name in LLAMA_LINEARS]
        for block in blocks:
            for linear in block.linears:
                weight = model.get_submodule(linear.name).weight
                assert linear.parameter is weight
                assert linear.shape == tuple(weight.shape)

    def test_lists_that_are_no_stack(self) -> None:
        class Lists(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.heads = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
                self.norms = nn.ModuleList([nn.LayerNorm(4)])
                self.empty = nn.ModuleList()

        for model in (Lists(), nn.Sequential(nn.Linear(4, 4))):
            with pytest.raises(ModelError, match=f"no stack of transformer blocks in {type(model).__name__}"):
                find_stacks(model)


class TestLinear:
    @pytest.mark.parametrize("module", [nn.Linear(3, 5), Conv1D(5, 3)], ids=["Linear", "Conv1D"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_write_casts_and_stays_in_place(self, module: nn.Module, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        module.to(dtype)
        parameter = module.weight
        linear: Linear = Linear("x", module)
        assert linear.shape == (5, 3)
        new_OD = torch.rand(5, 3, dtype=torch.float64)
        linear.write(new_OD)
        assert module.weight is parameter
        assert torch.equal(linear.read(), new_OD.to(dtype))
        inputs = torch.eye(3, dtype=dtype)
        with torch.no_grad():
            assert_close_in_norm(module(inputs) - module.bias, new_OD.to(dtype).mT, 4.0)


class TestSelectLinears:
    def select(self, targets: list[str], ignore: list[str]) -> list[str]:
        (stack,) = select_linears(find_stacks(make_llama()), targets, ignore)
        return names(stack.blocks)

    def test_a_target_matches_anywhere_in_the_full_name(self) -> None:
        assert self.select(["mlp"], ["gate", r"layers\.0", "down"]) == ["model.layers.1.mlp.up_proj"]
        assert self.select(["up_proj", r"layers\.1\.self_attn\.q"], []) == [
            "model.layers.0.mlp.up_proj",
            "model.layers.1.self_attn.q_proj",
            "model.layers.1.mlp.up_proj",
        ]

    def test_blocks_without_linears_stay_for_their_place_in_the_forward_pass(self) -> None:
        (stack,) = select_linears(find_stacks(make_llama()), [r"layers\.1"], [])
        assert [(block.index, len(block.linears)) for block in stack.blocks] == [(0, 0), (1, 7)]
        assert stack.needed == 2
        (stack,) = select_linears(find_stacks(make_llama()), [r"layers\.0"], [])
        assert stack.needed == 1

    @pytest.mark.parametrize(("targets", "ignore"), [(["q_porj"], []), ([".*"], ["model"]), ([], [])])
    def test_zero_matches_lists_what_is_there(self, targets: list[str], ignore: list[str]) -> None:
        with pytest.raises(ModelError) as caught:
            self.select(targets, ignore)
        assert str(targets) in str(caught.value)
        assert all(name in str(caught.value) for name in LLAMA_LINEARS)

    def test_all_linears_that_share_their_weight_are_named_at_once(self) -> None:
        model = make_llama()
        first, second = model.model.layers[:2]
        second.mlp, second.self_attn.q_proj = first.mlp, first.self_attn.q_proj
        with pytest.raises(ModelError, match="are one weight") as caught:
            select_linears(find_stacks(model), [".*"], [])
        ignore = re.findall("'([^']*)'", str(caught.value))
        assert select_linears(find_stacks(model), [".*"], ignore)

    @pytest.mark.parametrize("head", [False, True])
    def test_whatever_a_weight_is_shared_with(self, head: bool) -> None:
        model = make_llama()
        linear, other = model.model.layers[1].mlp.up_proj, model.model.layers[0].mlp.up_proj
        (model.lm_head if head else other).weight = linear.weight
        with pytest.raises(ModelError, match=r"are one weight.*ignore 'mlp.*up_proj'"):
            select_linears(find_stacks(model), [".*"], [])
        assert select_linears(find_stacks(model), [".*"], ["up_proj"])


@pytest.mark.parametrize(("family", "count"), [("switch", 8), ("mixtral", 16)])
def test_experts_are_told_in_one_parameter_or_in_modules(family: str, count: int) -> None:
    for stack in find_stacks(build(family)):
        linears = [linear for block in stack.blocks for linear in block.linears]
        found = [linear.name for linear in linears if is_expert(linear)]
        assert found == [linear.name for linear in linears if ".experts." in linear.name]
        assert len(found) == count


INDEXER = [f"self_attn.indexer.{name}" for name in ("weights_proj", "wk", "wq_b")]
ROUTERS = {
    "switch": ["layer.1.mlp.router.classifier"],
    "llama4": ["feed_forward.router"],
    "phimoe": ["mlp.router"] * 2,
    "qwen3_next": ["mlp.shared_expert_gate"] * 2,
    "gemma3n": ["altup.modality_router"] * 4,
    "gemma4_moe": ["router.proj"] * 2,
    "glm_moe_dsa": INDEXER * 4,
    "deepseek_v4": [
        f"self_attn.compressor.indexer.{name}" for name in ("gate_proj", "kv_proj", "q_b_proj", "scorer.weights_proj")
    ],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_routers_are_left_dense_by_default(family: str) -> None:
    model = build(family)
    stacks = find_stacks(model)
    expected = ROUTERS.get(family, [])
    found = [linear.removeprefix(f"{block.name}.") for block in stacks[0].blocks for linear in sorted(block.routers)]
    assert found == expected
    dense = select_linears(stacks, [".*"], [])
    assert not {linear for block in dense[0].blocks for linear in block.routers} & set(names(dense[0].blocks))
    if expected:
        assert any(f"{kind(expected[0])} (" in note and "stays dense" in note for note in dense_notes(model, dense))


def test_a_mixture_of_linear_modules() -> None:
    """As in remote code: the experts are pruned, the gate next to them is not, gate_proj inside them is."""

    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(8, 2)
            self.experts = nn.ModuleList(nn.ModuleDict({"gate_proj": nn.Linear(8, 8)}) for _ in range(2))

    (stack,) = find_stacks(nn.Sequential(nn.ModuleList([nn.ModuleDict({"mlp": Mixture(), "gate": nn.Linear(8, 8)})])))
    assert stack.blocks[0].routers == {"0.0.mlp.gate"}


def test_weights_that_blocks_share_are_not_outside() -> None:
    model = make_llama()
    blocks = blocks_of(model)
    outside = count_outside(model, blocks)
    assert sum(count_parameters(block.module) for block in blocks) + outside == count_parameters(model)
    blocks[1].module.mlp = blocks[0].module.mlp
    assert count_outside(model, blocks) == outside


def test_what_options_leave_out_is_noted() -> None:
    model = make_llama()
    (note,) = dense_notes(model, select_linears(find_stacks(model), [".*"], ["q_proj", r"layers\.1\.mlp"]))
    assert "model.layers.*.self_attn.q_proj (2 places), model.layers.*.mlp.gate_proj (one place)" in note
    assert dense_notes(model, select_linears(find_stacks(model), [".*"], [])) == []
