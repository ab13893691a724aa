"""docs/howto/quantise.md: its code as it stands, and that it keeps the zeros of a pruned model."""

from __future__ import annotations

import copy
from pathlib import Path

import gguf
import pytest
import torch
from snippets import ROOT, snippets
from tiny import make_llama
from torch import nn

from optima import Recipe, prune

ROUND, COUNT = (each.text for each in snippets(ROOT / "docs" / "howto" / "quantise.md") if each.language == "python")


@pytest.fixture(scope="module")
def sparse() -> nn.Module:
    """A pruned model in bfloat16."""
    model = make_llama(hidden_size=64, intermediate_size=96).bfloat16()
    prune(
        model, Recipe(selector="wanda", objective="plain", tuning_epochs=0), calibration=torch.randint(4, 300, (8, 32))
    )
    return model


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: module.weight.detach().clone() for name, module in model.named_modules() if "proj" in name}


def test_zeros_of_a_gguf_file_are_counted(
    sparse: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    writer = gguf.GGUFWriter("out.gguf", "llama")
    weight_OD = weights_of(sparse)["model.layers.0.mlp.up_proj"]
    writer.add_tensor("blk.0.ffn_up.weight", weight_OD.to(torch.float16).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    exec(COUNT, {})
    assert capsys.readouterr().out == "blk.0.ffn_up.weight F16 50.0% zeros\n"


@pytest.mark.parametrize(("bits", "group"), [(8, None), (4, 32)])
def test_symmetric_rounding_keeps_the_mask(sparse: nn.Module, bits: int, group: int | None) -> None:
    model, before, space = copy.deepcopy(sparse), weights_of(sparse), {}
    exec(ROUND, space)
    space["quantise"](model, bits, group)
    assert space["zeros"](model) >= 0.49
    for name, after_OD in weights_of(model).items():
        assert (after_OD[before[name] == 0] == 0).all()
        assert not torch.equal(after_OD, before[name])
