"""Masks that someone else made, oriented as the model's linears."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from optima.errors import RecipeError
from optima.models.blocks import Linear, experts_of
from optima.models.masks import MaskFiles

KEEP_OD = torch.rand(5, 5, generator=torch.Generator().manual_seed(0)) < 0.5  # square, and no whole number of bytes


@pytest.mark.parametrize("module", [nn.Linear(5, 5), Conv1D(5, 5)], ids=["Linear", "Conv1D"])
def test_a_mask_is_stored_as_the_weight_is(module: nn.Module, tmp_path: Path) -> None:
    stored = KEEP_OD.mT.contiguous() if isinstance(module, Conv1D) else KEEP_OD
    save_file({"x": stored}, tmp_path / "masks.safetensors")
    masks = MaskFiles(str(tmp_path / "masks.safetensors"))
    assert torch.equal(masks.keep_OD(Linear("x", module)), KEEP_OD)


def test_a_mask_of_another_shape_is_refused(tmp_path: Path) -> None:
    save_file({"x": KEEP_OD[:4]}, tmp_path / "masks.safetensors")
    with pytest.raises(RecipeError, match=r"mask of x has shape \(4, 5\), but the model stores its weight as \(5, 5\)"):
        MaskFiles(str(tmp_path / "masks.safetensors")).keep_OD(Linear("x", nn.Linear(5, 5)))


def test_mask_of_an_expert(tmp_path: Path) -> None:

    keep = torch.rand(3, 3, 5, generator=torch.Generator().manual_seed(0)) < 0.5
    module: Any = nn.Module()
    module.is_transposed = False
    module.up_proj, module.down_proj = nn.Parameter(torch.zeros(3, 3, 5)), nn.Parameter(torch.zeros(3, 5, 3))
    save_file({"experts.up_proj": keep}, tmp_path / "masks.safetensors")
    masks, (experts,) = MaskFiles(str(tmp_path / "masks.safetensors")), experts_of(module, "experts")
    for number in range(3):
        assert torch.equal(masks.keep_OD(Linear(f"experts.up_proj.{number}", experts.up[number])), keep[number])
