"""Recipes that ship, the command about recipes, and the schema for editors."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from optima import Recipe, load_recipe
from optima.arguments import recipe_of
from optima.cli import main
from optima.errors import RecipeError
from optima.recipe_files import SHIPPED, describe_shipped, read_recipe, recipe_schema

KINDS = {"string": str, "number": (int, float), "integer": int, "boolean": bool, "array": list, "null": type(None)}


def fits(value: Any, schema: dict[str, Any]) -> bool:
    """The part of JSON schema that ours is written in."""
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    number = isinstance(value, int | float) and not isinstance(value, bool)
    found = [
        not kinds or any(isinstance(value, KINDS[kind]) for kind in kinds),
        "boolean" in kinds or not (kinds and isinstance(value, bool)),
        "anyOf" not in schema or any(fits(value, each) for each in schema["anyOf"]),
        "enum" not in schema or value in schema["enum"],
        "const" not in schema or value == schema["const"],
        "pattern" not in schema or (isinstance(value, str) and re.search(schema["pattern"], value) is not None),
        not number or schema.get("minimum", value) <= value <= schema.get("maximum", value),
        not number or "exclusiveMinimum" not in schema or value > schema["exclusiveMinimum"],
        not number or "exclusiveMaximum" not in schema or value < schema["exclusiveMaximum"],
        not isinstance(value, list) or all(fits(each, schema.get("items", {})) for each in value),
    ]
    return all(found)


def misfits(values: dict[str, Any]) -> set[str]:
    properties = recipe_schema()["properties"]
    return {key for key, value in values.items() if key not in properties or not fits(value, properties[key])}


class TestSchema:
    def test_knows_every_field_and_its_default(self) -> None:
        properties = recipe_schema()["properties"]
        assert list(properties) == [option.name for option in dataclasses.fields(Recipe)]
        assert all(properties[name]["default"] == value for name, value in Recipe().to_dict().items())
        json.dumps(properties)

    @pytest.mark.parametrize("name", SHIPPED)
    def test_takes_what_ships(self, name: str) -> None:
        assert misfits(read_recipe(name)) == set()

    def test_takes_what_a_run_writes(self) -> None:
        recipe = Recipe(pattern=["mlp=2:4", "0.5"])
        assert misfits(recipe.resolved(scope="layer").to_dict()) == set()
        assert misfits({"selector": "my.module:Mine", "pattern": 0.5, "dataset": "text.txt"}) == set()

    def test_refuses_what_a_recipe_refuses(self) -> None:
        bad = {"sparsity": 1.5, "gap": 0, "scope": "rows", "selector": "wand", "batch_size": 0, "spars": 1}
        bad |= {"max_seq_length": "long", "trust_remote_code": "yes", "targets": 3, "damping": True}
        assert misfits(bad) == set(bad)


class TestCommand:
    def test_list(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["recipe", "list"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[0] for line in lines] == sorted(SHIPPED)
        assert all(40 < len(line) < 120 for line in lines)

    def test_show_gives_the_file(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["recipe", "show", "best"]) == 0
        assert yaml.safe_load(capsys.readouterr().out) == read_recipe("best")

    def test_validate(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        file = tmp_path / "mine.yaml"
        file.write_text("sparsity: 0.6")
        assert main(["recipe", "validate", str(file)]) == 0
        file.write_text("sparsity: 0.6\npattern: '2:4'")
        assert main(["recipe", "validate", str(file)]) == 2
        assert "give either sparsity or pattern" in capsys.readouterr().err
        file.write_text("selector: my.module:Mine\ntrust_remote_code: true")
        assert main(["recipe", "validate", str(file)]) == 0
        assert f"--recipe {file} --trust-remote-code checks" in capsys.readouterr().out

    def test_schema(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["recipe", "schema"]) == 0
        assert json.loads(capsys.readouterr().out) == recipe_schema()

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["show"], "needs a name"),
            (["validate"], "needs a name"),
            (["list", "best"], "takes no name"),
            (["shoe"], "invalid choice"),
            ([], "ACTION"),
            (["show", "bestt"], "name a file, or one of"),
        ],
    )
    def test_bad_input(self, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["recipe", *arguments]) == 2
        assert message in capsys.readouterr().err


class TestNames:
    def test_a_shipped_name_comes_before_a_file_of_that_name_and_says_so(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.chdir(tmp_path)
        Path("best").write_text("sparsity: 0.9")
        assert load_recipe("best").sparsity == 0.5
        assert "say ./best" in caplog.text
        caplog.clear()
        assert load_recipe("./best").sparsity == 0.9
        assert not caplog.text

    def test_every_one_says_in_its_first_line_what_it_is(self) -> None:
        assert all((text.endswith((".", ").")) and text[0].isupper()) or text[0].isdigit()
                   for text in describe_shipped().values())  # fmt: skip

    def test_the_list_fits_a_narrow_terminal(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["recipe", "list"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == len(SHIPPED)
        assert max(map(len, lines)) <= 80

    @pytest.mark.parametrize("selector", ["wanda", "sparsegpt", "thanos"])
    def test_the_papers_settings_with_and_without_optima(self, selector: str) -> None:
        alone, ours = load_recipe(f"paper-{selector}"), load_recipe(f"paper-{selector}-optima")
        assert alone.solver == "none"
        assert dataclasses.replace(ours, solver="none", gap=alone.gap) == alone


class TestPatternOverAllocation:
    def test_a_pattern_given_ends_the_files_allocation(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.WARNING)
        recipe = recipe_of({"recipe": "best", "pattern": ["2:4"]})
        assert (recipe.pattern, recipe.applied_allocation, recipe.tuning_epochs) == (["2:4"], "uniform", 4)
        assert "its allocation loss is left out" in caplog.text

    def test_one_sparsity_keeps_it(self, caplog: pytest.LogCaptureFixture) -> None:
        assert recipe_of({"recipe": "best", "pattern": ["0.6"]}).allocation == "loss"
        assert not caplog.text

    @pytest.mark.parametrize(
        ("given", "reason"),
        [
            ({"objective": "sink"}, "objective sink"),
            ({"selector": "external", "mask_from": "masks"}, "selector external"),
            ({"pattern": ["2:4"]}, "pattern 2:4"),
        ],
    )
    def test_what_leaves_nothing_to_share_ends_that_of_a_runs_own_file(
        self, tmp_path: Path, given: dict[str, object], reason: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        Recipe().resolved(scope="layer").save(tmp_path / "recipe.yaml")
        recipe = recipe_of({"recipe": str(tmp_path / "recipe.yaml"), **given})
        assert recipe.applied_allocation == "uniform"
        assert f"its allocation loss is left out, for {reason} was given" in caplog.text

    def test_an_allocation_that_is_given_too_is_refused(self) -> None:
        with pytest.raises(ValueError, match="shares out one unstructured sparsity"):
            recipe_of({"recipe": "best", "pattern": ["2:4"], "allocation": "loss"})


@pytest.mark.parametrize(
    ("file", "given"),
    [
        ("objective: loss\nswept_share: 0.5", {"objective": "sink"}),
        ("tuning_epochs: 2\nlearning_rate: 1e-3", {"tuning_epochs": "0"}),
        ("tuning_epochs: 2\nlearning_rate: 1e-3", {"tuning_epochs": "00"}),
    ],
    ids=str,
)
def test_what_belongs_to_a_choice_goes_with_it(tmp_path: Path, file: str, given: dict[str, object]) -> None:
    (tmp_path / "mine.yaml").write_text(file)
    name = file.rpartition("\n")[2].partition(":")[0]
    recipe = recipe_of({"recipe": str(tmp_path / "mine.yaml"), **given})
    assert getattr(recipe, name) == getattr(Recipe(), name)


def test_what_is_given_and_does_nothing_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("solver: none")
    with pytest.raises(RecipeError, match=r"gap is for a solver: add that, or leave gap out"):
        recipe_of({"recipe": str(tmp_path / "mine.yaml"), "gap": "1e-5"})
