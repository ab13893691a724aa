"""Recipes as YAML files: read, listed, and described to editors. No torch is imported here."""

from __future__ import annotations

import logging
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from optima.errors import RecipeError
from optima.recipe import Recipe, recipe_from_dict
from optima.values import adapter

_logger = logging.getLogger("optima")

# The recipes that come with the package, by name.
SHIPPED = {
    file.stem: file for file in sorted(Path(__file__).parent.joinpath("recipes").glob("*.yaml"), key=lambda f: f.stem)
}
DIALECT = "http://json-schema.org/draft-07/schema#"  # the one that YAML editors read


def load_recipe(path: str | Path) -> Recipe:
    """Read a YAML recipe: a file, or one of ``SHIPPED`` by its name.

    Its ``trust_remote_code`` counts here, other than on the command line: look into a file from elsewhere first.

    Raises:
        RecipeError: if the file cannot be read, is not YAML, or holds unknown keys or impossible values.
    """
    return recipe_in(path, read_recipe(path))


def recipe_in(path: str | Path, values: dict[str, Any]) -> Recipe:
    """The recipe of these ``values``, which the file ``path`` holds.

    Raises:
        RecipeError: on unknown keys, wrong types or values; the message names the file.
    """
    try:
        return recipe_from_dict(values)
    except RecipeError as error:
        raise RecipeError(f"recipe {path}: {error}") from error


def read_recipe(path: str | Path) -> dict[str, Any]:
    """The keys and values of a YAML recipe as they stand in the file, or in one of ``SHIPPED``, unchecked.

    Raises:
        RecipeError: if the file cannot be read, is not YAML, or holds something else than keys and values, each once.
    """
    text = recipe_text(path)
    try:
        values = yaml.load(text, _Loader)  # S506: _Loader is a SafeLoader.
    except yaml.YAMLError as error:
        raise RecipeError(f"recipe {path} is not valid YAML: {_in_a_line(error)}") from error
    except (ValueError, IndexError) as error:  # a date that there is not, a number without digits
        raise RecipeError(f"recipe {path} holds a value that cannot be read ({error}): put it in quotes") from error
    except RecursionError as error:
        raise RecipeError(f"recipe {path} is nested too deeply: no value of a recipe is more than a list") from error
    if not isinstance(values, dict):
        raise RecipeError(f"recipe {path} must hold keys and values, such as 'sparsity: 0.5'")
    return values


def _in_a_line(error: yaml.YAMLError) -> str:
    """What the parser found and where; its own message takes up to eight lines."""
    mark = getattr(error, "problem_mark", None)
    place = "" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: "
    return place + (getattr(error, "problem", None) or " ".join(str(error).split()))


def recipe_text(path: str | Path) -> str:
    """The text of a recipe's file, or of one of ``SHIPPED``, which comes before a file of the same name.

    Raises:
        RecipeError: if the file cannot be read.
    """
    file = SHIPPED.get(str(path), Path(path))
    if str(path) in SHIPPED and Path(path).is_file():
        _logger.warning("recipe %s is the one that ships with OPTIMA: for the file of that name say ./%s", path, path)
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        known = f"a file, or one of {', '.join(SHIPPED)}"
        reason = error.strerror if isinstance(error, OSError) else error
        raise RecipeError(f"recipe {path} cannot be read ({reason}): name {known}") from error


def describe_shipped() -> dict[str, str]:
    """The recipes that ship, by name, each with its file's first line."""
    return {name: file.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ") for name, file in SHIPPED.items()}


def recipe_schema() -> dict[str, Any]:
    """A JSON schema of recipe files, made from the fields of ``Recipe``.

    It knows keys, types, ranges and names. What depends on two fields, ``optima recipe validate`` checks.
    """
    properties = {}
    for option in fields(Recipe):
        values = {} if option.name == "selector" else adapter(Recipe, option.name).json_schema()
        default = getattr(Recipe(), option.name)
        if isinstance(default, list):  # one text stands for a list of one
            single = ["string", "number"] if option.name == "pattern" else ["string"]
            values = {"anyOf": [{"type": kind} for kind in single] + [{"type": "array", "items": {"type": single}}]}
        if choices := option.metadata["choices"]:
            values = {"enum": [*choices, *([None] if default is None else [])]}
        if option.name == "selector":  # or a class of one's own
            values = {"anyOf": [values, {"type": "string", "pattern": "^[^:]+:[^:]+$"}]}
        properties[option.name] = {"description": option.metadata["help"], "default": default, **values}
    return {"$schema": DIALECT, "title": "OPTIMA recipe", "type": "object", "additionalProperties": False} | {
        "properties": properties
    }


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
