"""The recipe: a complete, validated configuration of a run. Its fields are the CLI's options and a file's keys.

No torch is imported here: a recipe is checked, and the help printed, before the libraries are loaded.
"""

from __future__ import annotations

import os
import re
import reprlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from optima.errors import RecipeError
from optima.patterns import SCOPES, PatternTable, Scope, Unstructured, parse_table, pattern_texts

SELECTOR_NAMES = ("magnitude", "wanda", "ria", "sparsegpt", "thanos", "admm", "alps", "optima", "external")
DEFAULT_SPARSITY = 0.5
DEFAULT_EPOCHS = 2
# Constants of the method, which no table of ours shows to be worth an option.
SINK_WEIGHT = 0.04  # of a sequence's first token with objective sink; 0.2 is as good where all begin with BOS
FISHER_FRACTION = 0.25  # of the sequences, for the gradient and the sensitivity pass
EXPERT_TOKENS = 256  # experts that fewer tokens reached are noted in the report
LEAST_SAMPLES = 128  # of calibration, as in the papers
BYTES_PER_TUNED = 28  # of a weight that is tuned: master, gradient, two moments, a copy
TOKENS_PER_INPUT = 32  # of the widest linear: with fewer, its Hessian is that of the sample

GROUPS = {
    "size": "what is removed",
    "mask": "which weights survive",
    "objective": "what is minimised",
    "solve": "the survivors' new values",
    "tuning": "gradient steps on a block's survivors",
    "calibration": "text that the decisions are based on",
    "model": "what is pruned, and how it is read",
}


def _one_or_many(value: Any) -> Any:
    many = [value] if isinstance(value, str | os.PathLike) else value
    return [_path_text(each) for each in many] if isinstance(many, list | tuple) else many


def _path_text(value: Any) -> Any:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


Texts = Annotated[list[Annotated[str, Field(min_length=1)]], BeforeValidator(_one_or_many)]


Options = TypeVar("Options", bound="RunOptions")


def _option(group: str, default: Any, text: str, metavar: str, shown: str | None = None, **bounds: Any) -> Any:
    """A field with its group, line of help, and its default in words where ``default`` does not say it."""
    extra: dict[str, Any] = {"group": group, "metavar": metavar, "shown": shown}
    return Field(default, description=text, json_schema_extra=extra, **bounds)


class RunOptions(BaseModel):
    """What every verb asks for: calibration, tuning, and how the model is read.

    Raises:
        RecipeError: on construction, for any value that cannot be carried out; the message names it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=False, allow_inf_nan=False)
    presets: ClassVar[dict[str, Path]] = {}

    # fmt: off
    damping: float = _option("objective", 0.01, "ridge / mean diagonal of the Hessian", "X", ge=0, le=1)
    tuning_epochs: int | None = _option(
        "tuning", None, "epochs of tuning", "N", "2 with loss and a solver", ge=0, lt=2**63)
    tuning_fraction: float = _option("tuning", 0.4, "fraction of sequences to tune on", "X", gt=0, le=1)
    learning_rate: float = _option("tuning", 4.5e-3, "relative to each tensor's RMS", "X", gt=0)
    dataset: Texts = _option("calibration", ["allenai/c4"], "files, NAME:CONFIG@COMMIT", "TEXT", min_length=1)
    num_calibration_samples: int | None = _option(
        "calibration", None, "sequences", "N", "128, wide models more", ge=1, lt=2**63)
    max_seq_length: int = _option("calibration", 2048, "tokens per sequence", "N", ge=1, lt=2**63)
    self_generated: float = _option("calibration", 0.0, "fraction the model generates", "X", ge=0, lt=1)
    batch_size: int | None = _option(
        "calibration", None, "sequences per forward pass", "N", "8, fewer on CPU", ge=1, lt=2**63)
    seed: int = _option("calibration", 0, "of data, labels and tuning", "N", ge=0, lt=2**63)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = _option(
        "model", "auto", "auto, float32, bfloat16, float16", "NAME")
    # fmt: on

    if not TYPE_CHECKING:  # types of the fields stay known to checkers

        def __init__(self, **values: Any) -> None:
            for key in values.keys() - type(self).model_fields.keys():
                raise RecipeError(f"unknown key {str(key)!r}: known keys are {', '.join(type(self).model_fields)}")
            try:
                super().__init__(**values)
            except ValidationError as error:
                raise RecipeError("; ".join(map(_message, error.errors(include_url=False)))) from None

    def replace(self, **changes: Any) -> Self:
        """The options with some fields changed, checked anew."""
        return type(self)(**dict(self) | changes)

    def samples(self, inputs: int = 0) -> int:
        """Calibration sequences: those that are asked for, or enough for a widest linear of so many ``inputs``."""
        enough = -(-TOKENS_PER_INPUT * inputs // self.max_seq_length)
        return self.num_calibration_samples or max(LEAST_SAMPLES, enough)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as written to YAML and to the report."""
        return {name: list(value) if isinstance(value, list) else value for name, value in self}

    def save(self, path: Path, comment: str = "") -> None:
        """Write it as YAML, after a ``comment``."""
        text = yaml.safe_dump(self.to_dict(), sort_keys=False)
        path.write_text(f"# {comment}\n" * bool(comment) + text, encoding="utf-8")


class Recipe(RunOptions):
    """What to prune and how. Every field has a default; None stands for one that depends on the others.

    ``selector`` may be an object (see ``optima.selectors.base.Selector``) instead of a name.
    """

    # The recipes that come with the package, by name. Each file holds what differs from the defaults.
    presets: ClassVar = {file.stem: file for file in sorted(Path(__file__).parent.glob("recipes/*.yaml"))}

    # fmt: off
    sparsity: float | None = _option("mask", None, "fraction of weights to prune", "X", "0.5", gt=0, lt=1)
    pattern: Annotated[Texts, BeforeValidator(pattern_texts)] = _option(
        "mask", [], "2:4, or by name: REGEX=2:4 REGEX=0.6 0.5", "PATTERN", "none")
    scope: Scope | None = _option("mask", None, "rank by row, group or layer", "NAME", "as published")
    allocation: Literal["uniform", "loss"] | None = _option(
        "mask", None, "uniform, loss", "NAME", "loss with objective loss")
    selector: Any = _option("mask", "optima", "mask selector, see below", "NAME")
    mask_from: Annotated[str | None, BeforeValidator(_path_text)] = _option(
        "mask", None, "masks for selector external", "PATH", "none")
    objective: Literal["loss", "sink", "plain"] | None = _option(
        "objective", None, "loss, sink, plain", "NAME", "loss; plain unsolved")
    solver: Literal["auto", "low-rank-cg", "cholesky", "none"] = _option(
        "solve", "auto", "auto, low-rank-cg, cholesky, none", "NAME")
    gap: float = _option("solve", 1e-4, "certified relative gap to the optimum", "X", gt=0)
    targets: Texts = _option("model", [".*"], "linears to prune", "REGEX")
    ignore: Texts = _option("model", ["lm_head", "embed"], "linears to leave dense", "REGEX")
    # fmt: on

    @field_validator("selector")
    @classmethod
    def _is_selector(cls, value: Any) -> Any:
        if isinstance(value, str):
            if ":" not in value and value not in SELECTOR_NAMES:
                names = ", ".join(SELECTOR_NAMES)
                raise ValueError(f"unknown selector {value!r}: choose {names}, or your own package.module:Class")
        elif isinstance(value, type) or not all(hasattr(value, part) for part in ("select", "published_scope")):
            raise ValueError(
                "selector must be a name, package.module:Class, or an object with published_scope and select(task, "
                f"pattern), got {reprlib.repr(value)}"
            )
        return value

    @field_validator("targets", "ignore")
    @classmethod
    def _are_regexes(cls, regexes: list[str]) -> list[str]:
        for regex in regexes:
            try:
                re.compile(regex)
            except re.error as error:
                raise ValueError(f"{regex!r} is not a regular expression: {error}") from error
        return regexes

    @model_validator(mode="after")
    def _agrees(self) -> Recipe:
        if self.sparsity is not None and self.pattern:
            hint = "" if any("=" not in each for each in self.pattern) else f": write --pattern ... {self.sparsity:g}"
            raise ValueError(f"give either sparsity or pattern, not both{hint}")
        table = self.table(SCOPES[0])
        if self.selector == "external" and self.mask_from is None:
            raise ValueError("selector external needs mask_from: name a checkpoint or a file of masks")
        if self.selector != "external" and self.mask_from is not None:
            raise ValueError("mask_from is for selector external: leave out one of them")
        if self.tuning_epochs and self.resolved_objective != "loss":
            raise ValueError(f"tuning needs objective loss, not {self.resolved_objective}: add --objective loss")
        if self.allocation == "loss":
            if self._external or len(table.patterns) != 1 or not isinstance(table.default, Unstructured):
                raise ValueError(
                    "allocation loss needs one unstructured sparsity: use --sparsity, or --allocation uniform"
                )
            if self.resolved_objective != "loss":
                raise ValueError(
                    f"allocation loss needs objective loss, not {self.resolved_objective}: add --objective loss, or "
                    "--allocation uniform"
                )
        return self

    def table(self, scope: Scope) -> PatternTable:
        """The patterns, the unstructured ones with ``scope``; empty if external masks are taken as they are."""
        if self.any_pattern:
            return PatternTable()
        sparsity = DEFAULT_SPARSITY if self.sparsity is None else self.sparsity
        return parse_table(self.pattern or [str(sparsity)], scope)

    @property
    def _external(self) -> bool:
        return self.selector == "external" or getattr(self.selector, "takes_any_mask", False) is True

    @property
    def any_pattern(self) -> bool:
        """True if external masks are taken as they are, whatever their pattern."""
        return self._external and self.sparsity is None and not self.pattern

    @property
    def resolved_objective(self) -> str:
        """The objective; where none is named, methods without a solver are as published."""
        return self.objective or ("plain" if self.solver == "none" else "loss")

    def resolved(self, scope: Scope) -> Recipe:
        """The recipe with its open defaults filled in, so that a file of it means the same in later versions.

        The number of samples and the batch size, which depend on the model and the device, stay open.

        Args:
            scope: for a recipe that names none, see ``optima.plan.default_scope``.
        """
        table, by_loss = self.table(scope), self.resolved_objective == "loss"
        one_sparsity = len(table.patterns) == 1 and isinstance(table.default, Unstructured) and not self._external
        ranked = any(isinstance(pattern, Unstructured) for pattern in table.patterns)
        defaults = {
            "sparsity": None if self.pattern or self.any_pattern else DEFAULT_SPARSITY,
            "scope": scope if ranked else None,
            "allocation": "loss" if by_loss and one_sparsity else "uniform",
            "objective": self.resolved_objective,
            "tuning_epochs": DEFAULT_EPOCHS if by_loss and self.solver != "none" else 0,
        }
        return self.replace(**{name: value for name, value in defaults.items() if getattr(self, name) is None})

    @property
    def one_sparsity(self) -> float:
        """The sparsity that an allocation distributes."""
        default = self.table(SCOPES[0]).default
        if default is None:
            raise RecipeError("allocation loss needs one sparsity for all linears")
        return default.sparsity

    def to_dict(self) -> dict[str, Any]:
        """See ``RunOptions``; a selector object is named by its class."""
        values = super().to_dict()
        if not isinstance(self.selector, str):
            values["selector"] = f"{type(self.selector).__module__}:{type(self.selector).__qualname__}"
        return values


class Shrink(RunOptions):
    """What to remove from a model, and how to repair the rest: MLP neurons of every block, whole blocks, or both."""

    presets: ClassVar = {file.stem: file for file in sorted(Path(__file__).parent.glob("recipes/shrink/*.yaml"))}
    objective: ClassVar = "loss"

    # fmt: off
    neurons: float | None = _option("size", None, "fraction of the MLP neurons of every block", "X", "none", gt=0, lt=1)
    blocks: int | None = _option("size", None, "whole blocks", "N", "none", ge=1)
    multiple: int = _option("size", 64, "the number of neurons that stay is a multiple of this", "N", ge=1)
    # fmt: on

    @model_validator(mode="after")
    def _removes(self) -> Shrink:
        if self.neurons is None and self.blocks is None:
            raise ValueError("nothing to remove: give neurons (--neurons 0.25), blocks (--blocks 2), or both")
        return self


def _message(error: Any) -> str:
    name = ".".join(map(str, error["loc"]))
    if error["type"] == "value_error":  # of a rule above, which names the field itself
        text = str(error["ctx"]["error"])
        return text if name in ("", "selector", "pattern") else f"{name}: {text}"
    return f"{name}: {error['msg']}, got {reprlib.repr(error['input'])}"


def recipe_text(name: str | Path, kind: type[RunOptions] = Recipe) -> str:
    """The text of a preset, or else of a file.

    Raises:
        RecipeError: if the file cannot be read.
    """
    try:
        return kind.presets.get(str(name), Path(name)).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        known = ", ".join(kind.presets)
        raise RecipeError(f"recipe {name} cannot be read ({error}): name a file, or one of {known}") from error


def load_options(kind: type[Options], name: str | Path, **changes: Any) -> Options:
    """Read options from a preset, by its name, or from a YAML file; ``changes`` override what it says.

    Raises:
        RecipeError: if the file cannot be read, is not YAML, or holds unknown keys or impossible values.
    """
    text = recipe_text(name, kind)
    try:
        values = yaml.safe_load(text)
        if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
            raise RecipeError("it must hold keys and values, such as 'sparsity: 0.5'")
        if changes.keys() & {"sparsity", "pattern"}:  # two ways to say how sparse: the later one counts
            values = {key: value for key, value in values.items() if key not in ("sparsity", "pattern")}
        return kind(**values | changes)
    except (yaml.YAMLError, ValueError) as error:  # as a RecipeError is
        raise RecipeError(f"recipe {name}: {error}") from error


def load_recipe(name: str | Path, **changes: Any) -> Recipe:
    """A recipe, see ``load_options``."""
    return load_options(Recipe, name, **changes)
