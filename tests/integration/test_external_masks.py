"""Masks made elsewhere: used as they are, or refused before any long work with the name of the tensor."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from families import build, make_ids
from safetensors.torch import save_file
from tiny import Refused, load_weights, make_llama, prune_arguments, save_model
from torch import Tensor

from optima import Recipe, prune
from optima.cli import main
from optima.errors import RecipeError
from optima.extras.mask_preserving import preserve_masks

UP = "model.layers.0.mlp.up_proj"
EXTERNAL = ["--selector", "external", "--mask-from"]


def make_masks(nm: tuple[int, int] = (2, 4), suffix: str = "") -> dict[str, Tensor]:
    """A random N:M mask for every linear of the tiny model."""
    generator = torch.Generator().manual_seed(0)
    masks = {}
    for name, weight in make_llama().state_dict().items():
        if ".layers." in name and name.endswith("_proj.weight"):
            order = torch.rand(*weight.shape[:-1], weight.shape[-1] // nm[1], nm[1], generator=generator).argsort(-1)
            masks[name.removesuffix(".weight") + suffix] = (order < nm[0]).reshape(weight.shape)
    return masks


def saved(masks: dict[str, Tensor], file: str = "masks.safetensors") -> str:
    save_file({name: mask.contiguous() for name, mask in masks.items()}, file)
    return file


def pruned(*options: str) -> dict[str, Tensor]:
    shutil.rmtree("out", ignore_errors=True)
    assert main(prune_arguments(*options)) == 0
    return load_weights(Path("out"))


@pytest.mark.parametrize(("suffix", "dtype"), [("", torch.bool), (".weight", torch.uint8)])
@pytest.mark.parametrize("options", [[], ["--pattern", "2:4"], ["--sparsity", "0.5", "--solver", "none"]], ids=str)
def test_masks_from_a_file(root: Path, suffix: str, dtype: torch.dtype, options: list[str]) -> None:
    masks = make_masks(suffix=suffix)
    weights = pruned(*EXTERNAL, saved({name: mask.to(dtype) for name, mask in masks.items()}), *options)
    for name, mask in masks.items():
        assert torch.equal(weights[name.removesuffix(".weight") + ".weight"] != 0, mask)
    patterns = {linear["pattern"] for linear in json.loads(Path("out/report.json").read_text())["linears"]}
    assert patterns == {options[1] if "--pattern" in options else "0.5 per layer" if "0.5" in options else "external"}


def test_masks_from_the_zeros_of_a_checkpoint(root: Path) -> None:
    """The mask of another run, weights re-solved: the same zeros."""
    first = pruned("--selector", "magnitude", "--sparsity", "0.6", "--solver", "none")
    Path("out").rename("theirs")
    second = pruned(*EXTERNAL, "theirs")
    for name, weight in first.items():
        if "_proj" in name:
            assert torch.equal(weight != 0, second[name] != 0)
            assert not torch.equal(weight, second[name])


def test_masks_of_a_model_that_stores_weights_transposed(root: Path) -> None:
    """GPT-2's masks are D x O as its weights are; c_proj of the attention is square, so only the model can tell."""
    check_masks_as_stored("gpt2", r"\.c_\w+\.weight$")


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_masks_of_fused_experts_are_stored_as_they_are(root: Path, family: str) -> None:
    check_masks_as_stored(family, r"experts\.\w+_proj$")


def check_masks_as_stored(family: str, pruned: str) -> None:
    model = build(family)
    weights = {name: weight for name, weight in model.named_parameters() if re.search(pruned, name)}
    masks = {name: torch.rand(weight.shape) < 0.5 for name, weight in weights.items()}
    targets = [re.escape(name.removesuffix(".weight")) for name in masks]
    prune(model, Recipe(selector="external", mask_from=saved(masks), targets=targets), calibration=make_ids())
    for name, mask in masks.items():
        assert torch.equal(model.get_parameter(name) != 0, mask)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_masks_of_experts_that_a_checkpoint_stores_one_by_one(root: Path, family: str) -> None:
    """transformers writes parts of fused parameters under names of their own, as all published ones have them."""
    theirs, fused = build(family), {}
    for name, parameter in theirs.named_parameters():
        if parameter.ndim == 3:
            fused[name] = torch.rand(parameter.shape) < 0.5
            parameter.data *= fused[name]
    theirs.save_pretrained("theirs")
    assert fused
    assert not fused.keys() & load_weights(Path("theirs")).keys()
    model = build(family)
    recipe = Recipe(selector="external", mask_from="theirs", targets=["experts"], max_seq_length=16)
    prune(model, recipe, calibration=make_ids())
    for name, mask in fused.items():
        assert torch.equal(model.get_parameter(name) != 0, mask)


def test_masks_named_after_single_experts(root: Path) -> None:
    """As ``preserve_masks`` has them: outputs x inputs."""
    family, name = "mixtral", "model.layers.0.mlp.experts.down_proj"
    first, again = build(family), build(family)
    prune(first, Recipe(objective="sink", sparsity=0.6), calibration=make_ids())
    saved(preserve_masks(first).keep)
    recipe = Recipe(selector="external", mask_from="masks.safetensors", objective="sink", solver="none")
    prune(again, recipe, calibration=make_ids())
    weights, kept = first.state_dict(), again.state_dict()
    assert all(torch.equal(weights[key] == 0, kept[key] == 0) for key in weights if "_proj" in key)
    masks = preserve_masks(first).keep
    saved({**masks, f"{name}.0": masks[f"{name}.0"].mT})
    with pytest.raises(RecipeError, match=rf"mask of {name}\.0 has shape"):
        prune(build(family), recipe, calibration=make_ids())


Masks = dict[str, Tensor]
FIRST = "model.layers.0.self_attn.q_proj"


def unbalanced(masks: Masks) -> None:
    pruned_D = (~masks[UP][5, 8:12]).nonzero()
    masks[UP][5, 8 + int(pruned_D[0])] = True


def idle(masks: Masks) -> None:
    masks[UP][:] = masks[FIRST][:] = True


@pytest.mark.parametrize(
    ("change", "options", "problem"),
    [
        (lambda masks: masks.pop(UP), [], f"no mask for {UP} (it has model.layers.0.mlp.down_proj, "),
        (lambda masks: masks.update({"lm.7.up": ~masks[UP]}), [], "the model has no linear lm.7.up: rename"),
        (
            lambda masks: masks.update({UP: masks[UP].T}),
            [],
            "has shape (32, 48), but the model stores its weight as (48",
        ),
        (lambda masks: masks.update({UP: masks[UP].byte() * 255}), [], f"{UP} has values above 1: a mask is 0"),
        (lambda masks: masks.update({UP: masks[UP].float()}), [], f"{UP} is torch.float32, not bool or uint8"),
        (unbalanced, ["--pattern", "2:4"], "is not 2:4: of the 4 weights from row 5, column 8, it prunes 1, not 2"),
        (unbalanced, ["--sparsity", "0.5"], "of the 1536 weights from row 0, column 0, it prunes 767, not 768"),
        (unbalanced, ["--sparsity", "0.5", "--scope", "row"], "from row 5, column 0, it prunes 15, not 16"),
        (idle, [], "masks of 2 linears prune nothing: exclude them by --ignore"),
    ],
)
def test_masks_that_are_refused(
    cheap: Refused, change: Callable[[Masks], object], options: list[str], problem: str
) -> None:
    """With garbage for weights: nothing is loaded before the masks are checked."""
    masks = make_masks()
    change(masks)
    assert problem in cheap(*EXTERNAL, saved(masks), *options)


@pytest.mark.parametrize("path", ["missing", "missing.safetensors", "empty", "text.txt"])
def test_no_masks_there(cheap: Refused, root: Path, path: str) -> None:
    (root / "empty").mkdir()
    what = "is not a safetensors file" if path == "text.txt" else "is neither a directory with all its .safetensors"
    assert what in cheap(*EXTERNAL, path)


def test_a_dense_checkpoint_has_no_masks(late: Refused, root: Path) -> None:
    save_model(Path("dense"))
    assert "prunes nothing" in late(*EXTERNAL, "dense")
