"""What the how-tos claim: which formats keep the zeros of a pruned model. Their snippets run as they stand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tiny import make_llama

import optima
from optima import Recipe, prune

ROOT = Path(__file__).parents[2]
EXACT = ("F32", "F16", "BF16")
SYMMETRIC, OFFSET = ("Q8_0", "Q4_0", "Q5_0"), ("Q4_1", "Q5_1")


def snippets(page: str) -> list[str]:
    text = (ROOT / "docs" / "howto" / page).read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def sparse() -> dict[str, torch.Tensor]:
    """The pruned weights of a model in bfloat16."""
    model = make_llama(hidden_size=64, intermediate_size=96).bfloat16()
    prune(model, Recipe(selector="wanda", objective="plain"), calibration=torch.randint(4, 300, (8, 32)))
    return {name: module.weight.detach() for name, module in model.named_modules() if "proj" in name}


def written(file: Path, weights: dict[str, torch.Tensor], form: str) -> dict[str, Any]:
    """Through a GGUF file: what llama.cpp would see."""
    kind = gguf.GGMLQuantizationType[form]
    writer = gguf.GGUFWriter(file, "llama")
    for name, weight_OD in weights.items():
        writer.add_tensor(name, gguf.quantize(weight_OD.float().numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return {each.name: gguf.dequantize(each.data, each.tensor_type) for each in gguf.GGUFReader(file).tensors}


class TestLlamaCpp:
    @pytest.mark.parametrize("form", [*EXACT, *SYMMETRIC])
    def test_formats_that_keep_every_zero(self, sparse: dict[str, torch.Tensor], tmp_path: Path, form: str) -> None:
        found = written(tmp_path / "model.gguf", sparse, form)
        assert found.keys() == sparse.keys()
        for name, weight_OD in sparse.items():
            dense = weight_OD.float().numpy()
            assert (dense == 0).mean() == pytest.approx(0.5, abs=0.01)
            assert (found[name][dense == 0] == 0).all(), name
            if form in ("F32", "BF16"):
                assert np.array_equal(found[name], dense), name

    @pytest.mark.parametrize("form", OFFSET)
    def test_formats_that_lose_them(self, sparse: dict[str, torch.Tensor], tmp_path: Path, form: str) -> None:
        found = written(tmp_path / "model.gguf", sparse, form)
        zeros = np.concatenate([found[name][weight_OD.float().numpy() == 0] for name, weight_OD in sparse.items()])
        assert (zeros == 0).mean() < 0.1

    def test_the_check_counts_zeros(
        self, sparse: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:  # fmt: skip
        monkeypatch.chdir(tmp_path)
        name = next(name for name in sparse if name.endswith("up_proj"))
        written(tmp_path / "out.gguf", {"blk.0.ffn_up.weight": sparse[name]}, "F16")
        (snippet,) = snippets("llama-cpp.md")
        exec(snippet, {})
        assert capsys.readouterr().out == "blk.0.ffn_up.weight F16 50.0% zeros\n"


class TestQuantise:
    @pytest.mark.parametrize(("bits", "group"), [(8, None), (4, 32)])
    def test_symmetric_rounding_holds_the_mask(self, bits: int, group: int | None) -> None:
        model = make_llama(hidden_size=64, intermediate_size=96).bfloat16()
        prune(model, Recipe(selector="wanda", objective="plain"), calibration=torch.randint(4, 300, (8, 32)))
        before = {name: module.weight.detach().clone() for name, module in model.named_modules() if "proj" in name}
        space: dict[str, Any] = {}
        for snippet in snippets("quantise.md"):
            exec(snippet, space)
        share = space["zeros"](model)
        space["quantise"](model, bits, group)
        assert space["zeros"](model) >= share > 0.49
        for name, weight_OD in before.items():
            after_OD = model.get_submodule(name).weight.detach()
            assert (after_OD[weight_OD == 0] == 0).all()
            step = weight_OD.abs().max() / (2 ** (bits - 1) - 1)
            apart = (after_OD.float() - weight_OD.float()).abs().max()
            assert apart <= 0.5 * step + weight_OD.abs().max() / 256, "half a step, and the cast"
        assert optima.hold_zeros(model).keep.keys() >= before.keys()

    def test_the_rounding_of_the_page_is_that_of_the_benchmark(self) -> None:
        from harness.rounding import nearest, scales
        from quantise import with_offset

        space: dict[str, Any] = {}
        exec(snippets("quantise.md")[0], space)
        weight_OD = torch.randn(6, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
        weight_OD[:, ::2] = 0
        for bits, group in ((8, None), (4, 32)):
            rounded_OD = nearest(weight_OD, scales(weight_OD, bits, group), bits).bfloat16()
            assert torch.equal(space["round_symmetric"](weight_OD, bits, group), rounded_OD)
        assert (with_offset(weight_OD, 4, 32)[:, ::2] != 0).float().mean() > 0.5
        zero_OD = torch.zeros(2, 32)
        assert torch.equal(nearest(zero_OD, scales(zero_OD, 8), 8), zero_OD)
        assert torch.equal(with_offset(zero_OD, 4, 32), zero_OD)
