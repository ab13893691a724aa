"""A recipe is complete and valid, or there is none: wherever its values come from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, strategies as st

from optima import NM, Recipe, load_recipe
from optima.cli import main
from optima.core import SOLVERS
from optima.errors import RecipeError
from optima.patterns import PatternTable, Unstructured
from optima.plan import default_scope, make_methods
from optima.recipe import SELECTOR_NAMES
from optima.selectors.base import SELECTORS
from optima.selectors.scores import Wanda


def read(tmp_path: Path, text: str, **changes: Any) -> Recipe:
    file = tmp_path / "run.yaml"
    file.write_text(text, encoding="utf-8")
    return load_recipe(file, **changes)


def refused(tmp_path: Path, text: str) -> str:
    """The message with which a recipe file is refused; it names the file."""
    with pytest.raises(RecipeError) as caught:
        read(tmp_path, text)
    assert str(tmp_path / "run.yaml") in str(caught.value)
    return str(caught.value)


class TestYaml:
    @given(
        sparsity=st.none() | st.floats(0.01, 0.99),
        selector=st.sampled_from(["magnitude", "wanda", "sparsegpt"]),
        solver=st.sampled_from(["auto", "low-rank-cg", "cholesky"]),
        gap=st.floats(1e-300, 1.0),
        damping=st.floats(0.0, 1.0),
        dataset=st.lists(st.text(st.characters(codec="utf-8"), min_size=1), min_size=1, max_size=3),
        seed=st.integers(0, 2**63 - 1),
    )
    def test_round_trip(self, tmp_path_factory: pytest.TempPathFactory, **values: Any) -> None:
        recipe = Recipe(**values)
        file = tmp_path_factory.getbasetemp() / "round-trip.yaml"
        recipe.save(file, "a comment")
        assert load_recipe(file) == recipe

    @pytest.mark.parametrize(
        ("text", "values"),
        [
            ("sparsity: 0.6", {"sparsity": 0.6}),
            ("sparsity: null\nmask_from:", {}),
            ("gap: 1e-4", {"gap": 1e-4}),  # which YAML reads as text
            ("dataset: a.txt\ntargets: mlp", {"dataset": ["a.txt"], "targets": ["mlp"]}),
            ("pattern: '2:4'", {"pattern": ["2:4"]}),
            ("pattern:\n  - mlp=2:4\n  - 0.6", {"pattern": ["mlp=2:4", "0.6"]}),
            ("pattern: 0.6", {"pattern": ["0.6"]}),
            ("pattern: null\nsparsity: 0.6", {"sparsity": 0.6}),
        ],
    )
    def test_values(self, tmp_path: Path, text: str, values: dict[str, Any]) -> None:
        assert read(tmp_path, text) == Recipe(**values)

    @pytest.mark.parametrize("text", ["2:4", "['mlp=2:4', 1:4]"])
    def test_unquoted_pattern_says_to_quote_it(self, tmp_path: Path, text: str) -> None:
        assert "quote the pattern" in refused(tmp_path, f"pattern: {text}")

    @pytest.mark.parametrize(
        "text",
        ["", "# only a comment", "- sparsity", "3", "3: x", "sparsity: [0.5", "sparsity: \0", "? [a]\n: 1",
         "seed: 2024-13-01", "!!python/object/apply:os.mkdir [here]"],
    )  # fmt: skip
    def test_no_keys_and_values(self, tmp_path: Path, text: str) -> None:
        refused(tmp_path, text)

    def test_changes_override_the_file(self, tmp_path: Path) -> None:
        assert read(tmp_path, "gap: 1e-3\nseed: 2", gap=1e-2) == Recipe(gap=1e-2, seed=2)
        assert read(tmp_path, "sparsity: 0.7", pattern="2:4") == Recipe(pattern="2:4")
        assert read(tmp_path, "pattern: ['mlp=2:4', 0.5]", sparsity="0.3") == Recipe(sparsity=0.3)


BAD_VALUES: list[tuple[dict[str, Any], str]] = [
    ({"sparsity": 0.0}, "sparsity: "),
    ({"sparsity": float("nan")}, "sparsity: "),
    ({"sparsity": [0.5]}, "sparsity: "),
    ({"pattern": "2-4"}, "pattern '2-4' is not of the form n:m"),
    ({"pattern": {"a": "b"}}, "pattern"),
    ({"sparsity": 0.5, "pattern": "2:4"}, "give either sparsity or pattern, not both"),
    ({"scope": "column"}, "'row', 'layer' or 'group'"),
    ({"selector": "wonda"}, "unknown selector 'wonda': choose magnitude"),
    ({"selector": Wanda}, "selector must be a name"),
    ({"solver": "cg"}, "'cholesky'"),
    ({"dtype": "int8"}, "'bfloat16'"),
    ({"gap": 0}, "gap: "),
    ({"damping": 1.1}, "damping: "),
    ({"tuning_epochs": 1, "objective": "plain"}, "tuning needs objective loss"),
    ({"allocation": "loss", "solver": "none"}, "allocation loss needs objective loss, not plain"),
    ({"allocation": "loss", "objective": "sink"}, "allocation loss needs objective loss, not sink"),
    ({"allocation": "loss", "pattern": "2:4"}, "allocation loss needs one unstructured sparsity"),
    ({"num_calibration_samples": 0}, "num_calibration_samples: "),
    ({"seed": 2**63}, "seed: "),
    ({"batch_size": 2.5}, "batch_size: "),
    ({"dataset": []}, "dataset: "),
    ({"self_generated": 1.0}, "self_generated: "),
    ({"targets": ["("]}, "targets: '(' is not a regular expression"),
    ({"selector": "external"}, "selector external needs mask_from"),
    ({"mask_from": "m.safetensors"}, "mask_from is for selector external"),
]


class TestValues:
    @pytest.mark.parametrize(("values", "message"), BAD_VALUES, ids=lambda item: str(item)[:40])
    def test_bad_value(self, values: dict[str, Any], message: str) -> None:
        with pytest.raises(RecipeError) as caught:
            Recipe(**values)
        assert message in str(caught.value)

    def test_texts_paths_and_patterns_are_taken_as_they_are(self) -> None:
        """A text is a sequence of texts: its letters must not become patterns."""
        recipe = Recipe(targets="q_proj", ignore=("a", "b"), dataset=Path("a.txt"), pattern=NM(2, 4))
        assert (recipe.targets, recipe.ignore, recipe.dataset) == (["q_proj"], ["a", "b"], ["a.txt"])
        assert recipe.pattern == ["2:4"]

    def test_names_are_those_of_the_registries(self) -> None:
        assert (*SELECTORS, "external") == SELECTOR_NAMES
        for solver in (*SOLVERS, "none"):
            assert Recipe(solver=solver).solver == solver

    def test_a_selector_object_is_named_by_its_class(self) -> None:
        selector = Wanda()
        assert make_methods(Recipe(selector=selector)).selector is selector
        assert Recipe(selector=selector).to_dict()["selector"] == "optima.selectors.scores:Wanda"


class TestResolved:
    def test_open_defaults_are_filled_in(self) -> None:
        values = Recipe().resolved(scope="row").to_dict()
        assert (values["sparsity"], values["scope"], values["objective"]) == (0.5, "row", "loss")
        assert (values["allocation"], values["tuning_epochs"]) == ("loss", 2)

    @pytest.mark.parametrize("values", [{}, {"pattern": "2:4"}, {"pattern": ["a=2:4", "0.3"]}, {"allocation": "loss"}])
    def test_twice_is_once_and_it_can_be_loaded(self, tmp_path: Path, values: dict[str, Any]) -> None:
        recipe = Recipe(**values).resolved(scope="row")
        assert recipe.resolved(scope="layer") == recipe
        recipe.save(tmp_path / "r.yaml")
        assert load_recipe(tmp_path / "r.yaml") == recipe

    def test_wide_models_are_calibrated_on_more(self) -> None:
        assert Recipe().samples(2048) == 128
        assert Recipe().samples(28672) == 448
        assert Recipe(max_seq_length=512).samples(14336) == 896
        assert Recipe(num_calibration_samples=3).samples(28672) == 3

    def test_methods_without_a_solver_are_as_published(self) -> None:
        recipe = Recipe(solver="none").resolved(scope="row")
        assert (recipe.objective, recipe.allocation, recipe.tuning_epochs) == ("plain", "uniform", 0)


class TestMaking:
    @pytest.mark.parametrize(
        ("values", "pattern"),
        [
            ({}, Unstructured(0.5, "layer")),
            ({"selector": "wanda", "solver": "none"}, Unstructured(0.5, "row")),
            ({"objective": "sink"}, Unstructured(0.5, "row")),
            ({"selector": "magnitude", "objective": "sink"}, Unstructured(0.5, "layer")),
            ({"selector": "sparsegpt"}, Unstructured(0.5, "group", 128)),
            ({"selector": "sparsegpt", "scope": "row"}, Unstructured(0.5, "row")),
            ({"pattern": "2:4"}, NM(2, 4)),
            ({"pattern": ["0.6"], "scope": "layer"}, Unstructured(0.6, "layer")),
        ],
        ids=str,
    )
    def test_rows_compete_by_the_loss_or_as_published(self, values: dict[str, Any], pattern: Unstructured | NM) -> None:
        recipe = Recipe(**values)
        scope = default_scope(recipe.resolved_objective, make_methods(recipe).selector)
        assert recipe.resolved(scope).table(recipe.resolved(scope).scope or "row") == PatternTable((), pattern)


class TestPresets:
    def test_all_are_valid_and_hold_what_differs(self) -> None:
        assert {"fast", "balanced", "best"} < Recipe.presets.keys()
        for name in Recipe.presets:
            load_recipe(name)
        assert load_recipe("balanced") == Recipe(sparsity=0.5)


class TestCommand:
    def test_lists_and_shows_presets(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["recipe"]) == 0
        assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(Recipe.presets)
        assert main(["recipe", "best"]) == 0
        assert yaml.safe_load(capsys.readouterr().out)["tuning_epochs"] == 4
