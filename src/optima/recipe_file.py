"""Recipes as YAML files: those that come with the package, and a user's own."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from optima.errors import RecipeError
from optima.recipe import Recipe, unknown

# The recipes that come with the package, by name.
SHIPPED = {file.stem: file for file in sorted(Path(__file__).parent.joinpath("recipes").glob("*.yaml"))}


def recipe_from_dict(values: dict[str, Any], source: str | None = None) -> Recipe:
    """Build a recipe from plain values; missing keys take their defaults.

    Raises:
        RecipeError: on unknown keys, wrong types or values; the message names ``source``, if it is given.
    """
    known = [option.name for option in fields(Recipe)]
    try:
        for key in values:
            plain = str(key).replace("-", "_")
            if key not in known and plain in known:
                raise RecipeError(f"{key}: write {plain}")
            if key not in known:
                raise RecipeError(unknown("key", str(key), known))
        return Recipe(**values)
    except RecipeError as error:
        raise RecipeError(f"{source}: {error}" if source else str(error)) from error


def load_recipe(path: str | Path) -> Recipe:
    """Read a YAML recipe: a file, or one of ``SHIPPED`` by its name.

    Raises:
        RecipeError: if the file cannot be read, is not YAML, or holds unknown keys or impossible values.
    """
    return recipe_from_dict(read_recipe(path), f"recipe {path}")


def read_recipe(path: str | Path) -> dict[str, Any]:
    """The keys and values of a YAML recipe as they stand in the file, or in one of ``SHIPPED``, unchecked.

    Raises:
        RecipeError: if the file cannot be read, is not YAML, or holds something else than keys and values, each once.
    """
    try:
        # S506: _Loader is a SafeLoader.
        values = yaml.load(SHIPPED.get(str(path), Path(path)).read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        known = f"a file, or one of {', '.join(SHIPPED)}"
        raise RecipeError(f"recipe {path} cannot be read ({error.strerror}): name {known}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe {path} is not valid YAML: {error}") from error
    except RecursionError as error:
        raise RecipeError(f"recipe {path} is nested too deeply: no value of a recipe is more than a list") from error
    if not isinstance(values, dict):
        raise RecipeError(f"recipe {path} must hold keys and values, such as 'sparsity: 0.5'")
    return values


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice, of which YAML would take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            if name in lines:
                text = f"the key {name!r} stands in line {lines[name]} and in line {line}: keep one"
                raise yaml.MarkedYAMLError(None, None, text)
            lines[name] = line
        return super().construct_mapping(node, deep)
