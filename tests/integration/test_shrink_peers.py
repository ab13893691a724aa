"""Baselines of benchmarks/shrink.py remove the units that do nothing, and what they return loads in transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from closeness import assert_close_in_norm
from families import VOCAB, build
from shrink import METHODS, fits, shrunk
from tiny import make_tokens
from transformers import AutoModelForCausalLM

SIZES = {"neurons=0.5": (24, 2), "blocks=1": (48, 1), "blocks=1,neurons=0.5": (24, 1)}
CASES = [(method, removed) for method in METHODS for removed in SIZES if fits(method, removed)]


@pytest.mark.parametrize(("method", "removed"), CASES)
@pytest.mark.parametrize(("family", "options"), [("llama", {"mlp_bias": True}), ("llama", {}), ("gemma3", {})])
def test_idle_units_go(tmp_path: Path, family: str, options: dict[str, bool], method: str, removed: str) -> None:
    model, tokens_NL = build(family, **options), make_tokens(4) % VOCAB
    with torch.no_grad():
        for block in model.model.layers:
            for linear in (block.mlp.gate_proj, block.mlp.up_proj):
                linear.weight[::2] = 0.0
                if options:
                    linear.bias.fill_(0.5)
            if method != "flap":  # whose bias makes up for constant inputs
                block.mlp.down_proj.weight[:, ::2] = 0.0
        if "blocks" in removed:
            for tensor in (block.self_attn.o_proj.weight, *block.mlp.down_proj.parameters()):
                tensor.zero_()
    smaller = shrunk(model, method, removed, tokens_NL, multiple=8)
    assert (smaller.config.intermediate_size, smaller.config.num_hidden_layers) == SIZES[removed]
    assert_close_in_norm(smaller(tokens_NL).logits, model(tokens_NL).logits)
    smaller.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(tokens_NL).logits, smaller(tokens_NL).logits)
