"""N:M masks are valid ones after their checkpoint is saved and loaded again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import blocks_of, make_llama, make_tokens
from transformers import AutoModelForCausalLM

from optima import Recipe, prune


@pytest.mark.parametrize(
    ("pattern", "dtype"),
    [("2:4", torch.float32), ("2:4", torch.bfloat16), ("4:8", torch.bfloat16), ("1:4", torch.float32),
     ("3:8", torch.bfloat16)],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("selector", ["wanda", "sparsegpt", "optima"])
def test_reloaded(selector: str, pattern: str, dtype: torch.dtype, tmp_path: Path) -> None:
    kept, group = map(int, pattern.split(":"))
    recipe = Recipe(selector=selector, pattern=[pattern], max_seq_length=16)
    prune(make_llama().to(dtype), recipe, calibration=make_tokens(), output_dir=tmp_path / "out")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert reloaded.dtype == dtype
    for block in blocks_of(reloaded):
        for linear in block.linears:
            count_G = (linear.read() != 0).reshape(-1, group).sum(dim=1)
            assert (count_G == kept).all(), linear.name
