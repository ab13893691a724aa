"""Blocks and linears are found by the structure of the model."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from tiny import make_bert, make_llama
from torch import nn
from transformers.pytorch_utils import Conv1D

from optima.errors import ModelError
from optima.models.stacks import Block, Linear, find_blocks, linears_of, select_linears, uncovered_parameters

LLAMA_LINEARS = [
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
]


def make_gpt2() -> hf.GPT2LMHeadModel:
    return hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=32))


def names(blocks: list[Block]) -> list[str]:
    return [linear.name for block in blocks for linear in block.linears]


class TestFindBlocks:
    def test_decoder(self) -> None:
        model = make_llama()
        blocks = find_blocks(model)
        assert [(block.index, block.name) for block in blocks] == [(0, "model.layers.0"), (1, "model.layers.1")]
        assert all(block.module is layer for block, layer in zip(blocks, model.model.layers, strict=True))
        assert names(blocks) == [f"{block.name}.{name}" for block in blocks for name in LLAMA_LINEARS]
        for block in blocks:
            for linear in block.linears:
                assert linear.module is model.get_submodule(linear.name)
                assert linear.shape == tuple(linear.module.weight.shape)

    def test_encoder(self) -> None:
        blocks = find_blocks(make_bert())
        assert [block.name for block in blocks] == ["encoder.layer.0", "encoder.layer.1"]
        assert [linear.name.removeprefix("encoder.layer.0.") for linear in blocks[0].linears] == [
            "attention.self.query",
            "attention.self.key",
            "attention.self.value",
            "attention.output.dense",
            "intermediate.dense",
            "output.dense",
        ]

    def test_transposed_linears(self) -> None:
        model = make_gpt2()
        linears = {linear.name: linear for linear in find_blocks(model)[0].linears}
        assert list(linears) == [
            f"transformer.h.0.{name}" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
        ]
        assert linears["transformer.h.0.attn.c_attn"].shape == (48, 16)
        assert linears["transformer.h.0.mlp.c_proj"].shape == (16, 64)

    def test_the_largest_stack_wins(self) -> None:
        class TwoTowers(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.small = nn.ModuleList([nn.Sequential(nn.Linear(4, 4)) for _ in range(5)])
                self.large = nn.ModuleList([nn.Sequential(nn.Linear(16, 16), nn.ReLU()) for _ in range(2)])

        assert [block.name for block in find_blocks(TwoTowers())] == ["large.0", "large.1"]

    def test_bare_model_is_its_own_list(self) -> None:
        blocks = find_blocks(nn.ModuleList([nn.Sequential(nn.Linear(4, 4))]))
        assert [block.name for block in blocks] == ["0"]
        assert names(blocks) == ["0.0"]

    def test_lists_that_are_no_stack(self) -> None:
        class Lists(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.heads = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
                self.norms = nn.ModuleList([nn.LayerNorm(4)])
                self.mixed = nn.ModuleList([nn.Sequential(nn.Linear(4, 4)), nn.ReLU()])
                self.empty = nn.ModuleList()

        with pytest.raises(ModelError, match=r"no stack of transformer blocks in Lists.*heads \(2\).*norms \(1\)"):
            find_blocks(Lists())

    def test_nothing_at_all(self) -> None:
        with pytest.raises(ModelError, match=r"no stack .* in Sequential: its module lists are none.*\['0'\]"):
            find_blocks(nn.Sequential(nn.Linear(4, 4)))

    def test_encoder_decoder_is_refused(self) -> None:
        config = hf.T5Config(vocab_size=50, d_model=16, num_layers=1, num_heads=2, d_kv=8, d_ff=24)
        with pytest.raises(ModelError, match="T5ForConditionalGeneration is an encoder-decoder"):
            find_blocks(hf.T5ForConditionalGeneration(config))


class TestLinear:
    @pytest.mark.parametrize("module", [nn.Linear(3, 5), Conv1D(5, 3)], ids=["Linear", "Conv1D"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_write_casts_and_stays_in_place(self, module: nn.Module, dtype: torch.dtype) -> None:
        module.to(dtype)
        parameter = module.weight
        linear = Linear("x", module)
        assert linear.shape == (5, 3)
        new_OD = torch.rand(5, 3, dtype=torch.float64)
        linear.write(new_OD)
        assert module.weight is parameter
        assert torch.equal(linear.weight_OD, new_OD.to(dtype))
        inputs = torch.eye(3, dtype=dtype)
        with torch.no_grad():
            assert torch.allclose(module(inputs) - module.bias, new_OD.to(dtype).mT, atol=1e-2)

    def test_weight_needs_no_gradient(self) -> None:
        assert not Linear("x", nn.Linear(3, 5)).weight_OD.requires_grad


class TestSelectLinears:
    def select(self, targets: list[str], ignore: list[str]) -> list[str]:
        return names(select_linears(find_blocks(make_llama()), targets, ignore))

    def test_a_target_matches_anywhere_in_the_full_name(self) -> None:
        assert self.select(["up_proj", r"layers\.1\.self_attn\.q"], []) == [
            "model.layers.0.mlp.up_proj",
            "model.layers.1.self_attn.q_proj",
            "model.layers.1.mlp.up_proj",
        ]

    def test_ignore_wins(self) -> None:
        assert self.select(["mlp"], ["gate", r"layers\.0"]) == [
            "model.layers.1.mlp.up_proj",
            "model.layers.1.mlp.down_proj",
        ]

    def test_blocks_without_linears_stay_for_their_place_in_the_forward_pass(self) -> None:
        blocks = select_linears(find_blocks(make_llama()), [r"layers\.1"], [])
        assert [(block.index, len(block.linears)) for block in blocks] == [(0, 0), (1, 7)]

    @pytest.mark.parametrize(("targets", "ignore"), [(["q_porj"], []), ([".*"], ["model"]), ([], [])])
    def test_zero_matches_lists_what_is_there(self, targets: list[str], ignore: list[str]) -> None:
        with pytest.raises(ModelError) as caught:
            self.select(targets, ignore)
        assert str(targets) in str(caught.value)
        assert all(name in str(caught.value) for name in LLAMA_LINEARS)


def test_every_matrix_is_covered_or_named() -> None:
    assert uncovered_parameters(find_blocks(make_llama())[0]) == {}
    assert uncovered_parameters(find_blocks(make_gpt2())[0]) == {}
    config = hf.MixtralConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_local_experts=4,
    )
    block = find_blocks(hf.MixtralForCausalLM(config))[0]
    covered = {id(linear.module.weight) for linear in linears_of(block.module, block.name)}
    matrices = {id(parameter) for parameter in block.module.parameters() if parameter.ndim >= 2}
    named = uncovered_parameters(block)
    assert len(covered) + len(named) == len(matrices)
    assert any("experts" in name for name in named)
    assert all(name.startswith("model.layers.0.") for name in named)
