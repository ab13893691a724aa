"""A run as a whole: what is refused before it, and what its report and saved recipe tell of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import build, make_ids
from tiny import make_llama, make_tokens, save_model, save_text

from optima import Recipe, load_recipe, load_report, prune
from optima.errors import CalibrationError, ModelError, RecipeError
from optima.models.source import find_source
from optima.plan import make_plan


@pytest.mark.parametrize(
    "given",
    [
        torch.tensor(3),
        torch.zeros(2, 8),
        torch.zeros(2, 0, dtype=torch.int64),
        torch.zeros(8, dtype=torch.int64),
        7,
        "text",
    ],
    ids=["scalar", "floats", "empty", "one sequence", "number", "one text"],
)
def test_calibration_that_is_none(given: object) -> None:
    with pytest.raises(CalibrationError, match="calibration must be token ids"):
        prune(make_llama(), calibration=given)  # type: ignore[arg-type]


@pytest.mark.parametrize("recipe", ["2:4", {"sparsity": 0.5}], ids=["text", "dict"])
def test_a_recipe_that_is_none(recipe: object) -> None:
    with pytest.raises(RecipeError, match="recipe must be a Recipe, got"):
        prune(make_llama(), recipe, calibration=make_tokens())  # type: ignore[arg-type]


def test_a_model_that_is_none() -> None:
    with pytest.raises(ModelError, match="model must be a path, a hub id or a model of transformers, got Linear"):
        prune(torch.nn.Linear(2, 2), calibration=make_tokens())  # type: ignore[arg-type]


def test_the_report_tells_what_was_run(tmp_path: Path) -> None:
    source, text = save_model(tmp_path / "model"), save_text(tmp_path / "text.txt")
    recipe = Recipe(dataset=[str(text)], num_calibration_samples=4, max_seq_length=16)
    prune(str(source), recipe, output_dir=tmp_path / "out")
    run = load_report(str(tmp_path / "out")).run
    assert run.model_fingerprint is not None
    assert {"forward", "sweep", "hessian", "select", "solve", "round", "write"} <= run.stages.keys()
    assert sum(run.stages.values()) <= run.seconds
    saved = load_recipe(tmp_path / "out" / "recipe.yaml")
    assert (saved.sparsity, saved.scope, saved.objective, saved.batch_size) == (0.5, "layer", "loss", 128)
    assert run.recipe == saved.to_dict()
    other = save_model(tmp_path / "other", make_llama(hidden_size=16))
    prune(str(other), recipe, output_dir=tmp_path / "out2")
    assert load_report(tmp_path / "out2").run.model_fingerprint != run.model_fingerprint


def test_blocks_are_timed_and_the_last_forward_is_left_out() -> None:
    report = prune(make_llama(), Recipe(), calibration=make_tokens())
    assert any("given by the caller" in note for note in report.run.notes), "the recipe names a data set all the same"
    assert [block.index for block in report.blocks] == list(range(len(report.blocks)))
    assert all({"read", "forward", "solve"} <= block.seconds.keys() for block in report.blocks)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "deepseek_v3"])
def test_plan_of_fused_experts(family: str, tmp_path: Path) -> None:
    model = build(family)
    model.bfloat16().save_pretrained(tmp_path)
    plan = make_plan(find_source(str(tmp_path)), Recipe(max_seq_length=32))
    report = prune(model, Recipe(), calibration=make_ids())
    planned = {linear.name for linear in plan.found.linears}
    assert {linear.name for linear in report.linears} == planned
    assert any("experts" in name for name in planned)
