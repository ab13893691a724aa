"""Masks made elsewhere: used as they are, or refused before any long work with the name of the tensor."""

from __future__ import annotations

import json
import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build, make_ids
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import save_file
from tiny import Refused, load_weights, make_llama, make_tokens, prune_arguments, save_model
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from optima import Recipe, prune
from optima.cli import main
from optima.distributed import ALONE
from optima.errors import RecipeError
from optima.extras.mask_preserving import hold_zeros
from optima.models.blocks import Linear
from optima.models.load import find_source, skeleton
from optima.models.masks import MaskFiles
from optima.plan import plan_run
from optima.selectors.external import External

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
    assert main(prune_arguments("--overwrite", *options)) == 0
    return load_weights(Path("out"))


@pytest.mark.parametrize(("suffix", "dtype"), [("", torch.bool), (".weight", torch.uint8)])
@pytest.mark.parametrize("options", [[], ["--pattern", "2:4"], ["--sparsity", "0.5"], ["--solver", "none"]], ids=str)
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
    """GPT-2's masks are D x O as its weights are; c_proj of the attention is square, so only the model can tell. Its
    checkpoint names linears without the prefix of the model with a head.
    """
    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=300, n_positions=64)
    model = GPT2LMHeadModel(config).eval()
    masks = {}
    for name, weight in model.state_dict().items():
        if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            masks[name.removeprefix("transformer.")] = torch.rand(weight.shape) < 0.5
    recipe = Recipe(selector="external", mask_from=saved(masks), max_seq_length=16)
    prune(model, recipe, calibration=make_tokens())
    for name, mask in masks.items():
        assert torch.equal(model.state_dict()[f"transformer.{name}"] != 0, mask)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_masks_of_fused_experts_are_stored_as_they_are(root: Path, family: str) -> None:
    model = build(family)
    masks = {
        name: torch.rand(parameter.shape) < 0.5 for name, parameter in model.named_parameters() if parameter.ndim == 3
    }
    recipe = Recipe(selector="external", mask_from=saved(masks), targets=["experts"], max_seq_length=16)
    prune(model, recipe, calibration=make_ids())
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
    """As ``hold_zeros`` has them: outputs x inputs."""
    family, name = "mixtral", "model.layers.0.mlp.experts.down_proj"
    first, again = build(family), build(family)
    prune(first, Recipe(objective="sink", sparsity=0.6), calibration=make_ids())
    saved(hold_zeros(first).keep)
    recipe = Recipe(selector="external", mask_from="masks.safetensors", objective="sink", solver="none")
    prune(again, recipe, calibration=make_ids())
    weights, kept = first.state_dict(), again.state_dict()
    assert all(torch.equal(weights[key] == 0, kept[key] == 0) for key in weights if "_proj" in key)
    masks = hold_zeros(first).keep
    saved({**masks, f"{name}.0": masks[f"{name}.0"].mT})
    with pytest.raises(RecipeError, match=rf"mask of {name}\.0 has shape"):
        prune(build(family), recipe, calibration=make_ids())


def test_what_else_lies_beside_a_checkpoint_is_no_mask(root: Path) -> None:
    first = pruned("--selector", "magnitude", "--sparsity", "0.6", "--solver", "none")
    Path("out").rename("theirs")
    save_file({name: torch.ones_like(weight) for name, weight in first.items()}, "theirs/old.safetensors")
    second = pruned(*EXTERNAL, "theirs")
    assert all(torch.equal(weight != 0, second[name] != 0) for name, weight in first.items() if "_proj" in name)
    Path("theirs/model.safetensors.index.json").unlink()
    with pytest.raises(
        RecipeError, match=r"weight in model-.*\.safetensors and .*weight in old\.safetensors are one: keep one"
    ):
        prune(make_llama(), Recipe(selector="external", mask_from="theirs"), calibration=make_tokens())


def test_masks_for_a_part_of_the_model(root: Path) -> None:
    masks = {name: mask for name, mask in make_masks((3, 8)).items() if "mlp" in name}
    weights = pruned(*EXTERNAL, saved(masks), "--targets", "mlp")
    for name, mask in masks.items():
        assert torch.equal(weights[f"{name}.weight"] != 0, mask)
    assert (weights["model.layers.0.self_attn.q_proj.weight"] != 0).all()


def test_plan_shows_what_the_masks_prune(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = saved(make_masks((1, 4)))
    few = ["--max-seq-length", "16", "--num-calibration-samples", "2"]
    assert main(["plan", "model", *few, *EXTERNAL, file]) == 0
    output = capsys.readouterr().out
    assert "external" in output
    assert "75" in output


class TestRefused:
    """With garbage for weights: nothing is loaded before the masks are checked."""

    def test_missing_mask(self, cheap: Refused) -> None:
        masks = make_masks()
        del masks[UP]
        message = cheap(*EXTERNAL, saved(masks))
        assert f"no mask for {UP} (it has model.layers.0.mlp.down_proj, " in message
        assert f"--ignore '{UP}'" in message

    def test_unknown_name(self, cheap: Refused) -> None:
        masks = make_masks() | {"model.layers.7.mlp.up_proj": torch.ones(48, 32, dtype=torch.bool)}
        assert "the model has no linear model.layers.7.mlp.up_proj: rename" in cheap(*EXTERNAL, saved(masks))

    def test_wrong_shape(self, cheap: Refused) -> None:
        masks = make_masks()
        masks[UP] = masks[UP].T
        message = cheap(*EXTERNAL, saved(masks))
        assert f"mask of {UP} has shape (32, 48), but the model stores its weight as (48, 32)" in message

    @pytest.mark.parametrize(
        ("options", "problem"),
        [
            (["--pattern", "2:4"], "is not 2:4: 1 groups keep another number, first 3 in row 5, group 2"),
            (["--sparsity", "0.5"], "is not 0.5 per layer: columns 0 to 32 prune 767 weights, not 768"),
            (["--sparsity", "0.5", "--scope", "row"], "is not 0.5 per row: row 5 prunes 15, not 16"),
            (["--sparsity", "0.5", "--scope", "group"], "columns 0 to 32 prune 767 weights, not 768"),
        ],
        ids=str,
    )
    def test_wrong_count(self, cheap: Refused, options: list[str], problem: str) -> None:
        masks = make_masks()
        pruned_D = (~masks[UP][5, 8:12]).nonzero()
        masks[UP][5, 8 + int(pruned_D[0])] = True
        message = cheap(*EXTERNAL, saved(masks), *options)
        assert f"the external mask of {UP} is not " in message
        assert problem in message
        assert "to take the mask as it is" in message

    def test_nothing_pruned(self, cheap: Refused) -> None:
        masks = make_masks()
        masks[UP][:] = True
        message = cheap(*EXTERNAL, saved(masks))
        assert f"prune nothing: exclude them by --ignore 'lm_head' 'embed' '{re.escape(UP)}'" in message
        other = next(name for name in masks if name != UP)
        masks[other][:] = True
        message = cheap(*EXTERNAL, saved(masks))
        assert "masks of 2 linears prune nothing" in message
        assert all(f"'{re.escape(name)}'" in message for name in (UP, other))

    def test_two_masks_of_one_linear(self, cheap: Refused) -> None:
        masks = make_masks()
        assert f"{UP}.weight in " in cheap(*EXTERNAL, saved(masks | {f"{UP}.weight": ~masks[UP]}))

    def test_values_that_are_no_mask(self, cheap: Refused) -> None:
        masks = make_masks()
        file = saved(masks | {UP: masks[UP].to(torch.uint8) * 255})
        assert f"{UP} has values above 1: a mask is 0 (pruned) or 1 (kept)" in cheap(*EXTERNAL, file)

    def test_weights_where_masks_should_be(self, cheap: Refused) -> None:
        masks = make_masks()
        assert f"{UP} is torch.float32, not bool or uint8" in cheap(*EXTERNAL, saved(masks | {UP: masks[UP].float()}))

    @pytest.mark.parametrize("path", ["missing", "missing.safetensors", "empty"])
    def test_nothing_there(self, cheap: Refused, root: Path, path: str) -> None:
        (root / "empty").mkdir()
        assert f"mask_from {path} is neither a directory with all its .safetensors nor such a file" in cheap(
            *EXTERNAL, path
        )

    def test_file_that_is_not_safetensors(self, cheap: Refused) -> None:
        assert "text.txt is not a safetensors file" in cheap(*EXTERNAL, "text.txt")

    def test_options_that_contradict(self, cheap: Refused) -> None:
        assert "needs mask_from" in cheap("--selector", "external")
        assert "mask_from is for selector external" in cheap("--mask-from", "masks.safetensors")
        assert "allocation loss needs" in cheap(*EXTERNAL, "masks.safetensors", "--allocation", "loss")


@pytest.mark.parametrize("where", ["memory", "hub"])
def test_masks_of_a_model_with_its_channels_in_another_order(
    where: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever the model is: a directory is not all that can be pruned."""
    monkeypatch.setattr("optima.models.load.hf_hub_download", lambda path, name, **_: str(on_hub(root / path, name)))
    monkeypatch.setattr("optima.plan.skeleton", lambda source: skeleton(find_source(str(root / "model"))))
    (root / "owner/plain").mkdir(parents=True)
    for name in ("owner/ordered", "masks"):
        (root / name).mkdir(parents=True)
        (root / name / "ordering.json").write_text(json.dumps({"channels": [{"order": [[1, 0]]}]}))
    save_file(make_masks(), "masks/masks.safetensors")
    recipe = Recipe(selector="external", mask_from=str(root / "masks"), max_seq_length=16)
    monkeypatch.chdir(root / "owner")  # nothing here is called as on the hub
    for name, fits in (("ordered", True), ("plain", False)):
        model = make_llama()
        model.config.name_or_path = str(root / "owner" / name)
        given: Any = model if where == "memory" else f"owner/{name}"
        with nullcontext() if fits else pytest.raises(RecipeError, match="have their channels in different orders"):
            plan_run(given, recipe, "out", make_tokens(), ALONE)


def on_hub(directory: Path, name: str) -> Path:
    if not (directory / name).exists():
        raise EntryNotFoundError(name)
    return directory / name


def test_a_dense_checkpoint_has_no_masks(late: Refused, root: Path) -> None:
    save_model(Path("dense"))
    assert "prunes nothing" in late(*EXTERNAL, "dense")


def test_names_that_no_model_has(late: Refused, root: Path) -> None:
    save_model(Path("theirs"))
    save_file({f"own.{i}.{name}": w for i, (name, w) in enumerate(make_llama().state_dict().items())}, "w.safetensors")
    Path("w.safetensors").replace("theirs/model.safetensors")
    message = late(*EXTERNAL, "theirs")
    assert "has no mask for model.layers.0.self_attn.q_proj" in message
    assert "nor one that transformers would make of these: the checkpoint theirs lacks weights" in message


def test_two_masks_for_one_linear(root: Path) -> None:
    masks = make_masks()
    mask = masks.pop(UP)
    masks |= {"layers.0.mlp.up_proj": mask, f"text.{UP}": mask.clone(), "mlp.up_proj": mask.clone()}
    with pytest.raises(RecipeError, match=f"more than one mask for {UP}"):
        MaskFiles(saved(masks)).keep_OD(Linear(UP, make_llama().get_submodule(UP)))


def test_masks_of_an_object_are_taken_as_they_are() -> None:
    class Own:
        def keep_OD(self, linear: Any) -> Tensor:
            return torch.rand(linear.shape, generator=torch.Generator().manual_seed(1)) > 0.3

    model = make_llama()
    report = prune(model, Recipe(selector=External(Own())), calibration=make_tokens())
    assert report.sparsity == pytest.approx(0.3, abs=0.02)
    up = model.model.layers[0].mlp.up_proj
    assert torch.equal(up.weight != 0, torch.rand(up.weight.shape, generator=torch.Generator().manual_seed(1)) > 0.3)
