"""The recipe: a complete, validated configuration of a run. Its fields are the CLI's options and a file's keys."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from optima.allocation import ALLOCATION_NAMES, Allocation, LeastError, Owl, make_allocation
from optima.errors import RecipeError
from optima.models.masks import MaskFiles
from optima.patterns import GROUP_SIZE, NM, SCOPES, PatternTable, Unstructured, parse_table
from optima.qp import SOLVERS, RowSolver, make_solver
from optima.selectors.base import SELECTOR_NAMES, Selector, load_foreign, make_selector
from optima.selectors.external import External
from optima.swaps.search import SwapRefinement

DTYPES = ("auto", "float32", "bfloat16", "float16")
DEFAULT_SPARSITY = 0.5
REFINEMENTS = ("none", "swaps")
PROOF_ROUNDS = 1000  # of swaps in a chunk of rows: more than it takes until every row is proven
PATTERN_HELP = (
    "instead of a sparsity: n:m, keep n of every m consecutive inputs (2:4), a sparsity, or REGEX=2:4 and REGEX=0.6 "
    "for the linears whose full name matches; the first match counts, an entry without a regex is for all others"
)
SPREAD_HELP = (
    "how far a linear's sparsity may depart from the global one: lambda of owl (default "
    f"{Owl.spread}), the bound of error (default {LeastError.spread})"
)
SINK_WEIGHT = 0.04  # 0.2 is as good where all sequences begin with BOS; other first tokens are many vectors to fit
SINK_HELP = (
    "weight of a sequence's first token (the attention sink) in the hessian, relative to all its tokens together; 0: "
    f"that of any other (default {SINK_WEIGHT}; with solver none 0, as published)"
)


def _option(default: Any, text: str) -> Any:
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Recipe:
    """What to prune and how. Every field has a default; the metadata of each field is its documentation.

    Raises:
        RecipeError: on construction, for any value that cannot be carried out.
    """

    sparsity: float | None = _option(None, f"fraction of weights to prune (default {DEFAULT_SPARSITY})")
    pattern: list[str] = _option([], PATTERN_HELP)
    scope: str | None = _option(None, f"what a sparsity is ranked over: {', '.join(SCOPES)} (default: as published)")
    group_size: int = _option(GROUP_SIZE, "inputs in a group, for scope group")
    allocation: str = _option("uniform", f"how linears share one sparsity: {', '.join(ALLOCATION_NAMES)}")
    allocation_spread: float | None = _option(None, SPREAD_HELP)
    outlier_multiple: float = _option(5.0, "allocation owl: a weight is an outlier from this many times the mean score")
    selector: str = _option("wanda", f"mask selector: {', '.join(SELECTOR_NAMES)}, or package.module:Class")
    mask_from: str | None = _option(None, "for selector external: a pruned checkpoint, or a safetensors file of masks")
    refine: str = _option(
        "none", f"improve the selector's mask: {', '.join(REFINEMENTS)} of a kept and a pruned weight"
    )
    refine_candidates: int = _option(256, "weights of a row tried in a round of swaps; 0: as many as a proof takes")
    solver: str = _option("auto", f"row solver: {', '.join(SOLVERS)}, none (keep the selector's weights)")
    gap: float = _option(1e-4, "certified relative gap to the optimum at which a row stops")
    max_change: float | None = _option(None, "most a surviving weight may move, in root mean squares of its row")
    damping: float = _option(0.01, "ridge, relative to the mean diagonal of the hessian")
    sink_weight: float | None = _option(None, SINK_HELP)
    dataset: list[str] = _option(["allenai/c4"], "hub id or local .txt/.jsonl/.json/.parquet; several allowed")
    dataset_config: str | None = _option(None, "configuration of a hub dataset (default for allenai/c4: en)")
    split: str = _option("train", "split of the dataset")
    text_column: str = _option("text", "column that holds the text")
    num_calibration_samples: int = _option(128, "number of calibration sequences")
    max_seq_length: int = _option(2048, "tokens in each calibration sequence")
    batch_size: int = _option(8, "sequences in one forward pass")
    seed: int = _option(0, "seed of the choice of calibration text")
    targets: list[str] = _option([".*"], "regexes; linears whose full name matches one are pruned")
    ignore: list[str] = _option(["lm_head", "embed"], "regexes; linears whose name matches one are left alone")
    device: str = _option("auto", "auto, cpu, cuda or cuda:N")
    dtype: str = _option("auto", "load the model as auto (the checkpoint's own), float32, bfloat16 or float16")
    trust_remote_code: bool = _option(False, "run modelling code that comes with the checkpoint")

    def __post_init__(self) -> None:
        for option in dataclasses.fields(self):
            object.__setattr__(self, option.name, _typed(option, getattr(self, option.name)))
        if self.sparsity is not None and self.pattern:
            raise RecipeError(
                f"give either sparsity or pattern, not both: pattern {' '.join(self.pattern)} {self.sparsity:g} prunes "
                f"{self.sparsity:g} where no other entry matches"
            )
        if self.dtype not in DTYPES:
            raise RecipeError(f"unknown dtype {self.dtype!r}: known dtypes are {', '.join(DTYPES)}")
        if self.sink_weight is None:
            object.__setattr__(self, "sink_weight", 0.0 if self.make_solver() is None else SINK_WEIGHT)
        self._check_calibration()
        if not self.dataset:
            raise RecipeError("dataset is empty: name a hub id or a local text file")
        check_regexes("targets", self.targets)
        check_regexes("ignore", self.ignore)
        # Building them checks their names and values.
        _check_max_change(self.max_change, self.make_solver())
        table = self.make_patterns(self.make_selector())
        if self.scope is not None and all(isinstance(pattern, NM) for pattern in table.patterns):
            raise RecipeError("scope is for unstructured sparsity: an n:m pattern has none")
        self.make_allocation()
        self._check_refine()

    def _check_calibration(self) -> None:
        if not 0.0 <= self.damping <= 1.0:
            raise RecipeError(f"damping must be between 0 and 1, got {self.damping}: for example 0.01")
        assert self.sink_weight is not None
        if not 0.0 <= self.sink_weight < math.inf:
            raise RecipeError(f"sink_weight must be 0 or more, got {self.sink_weight}: for example {SINK_WEIGHT}")
        for name in ("num_calibration_samples", "max_seq_length", "batch_size"):
            if getattr(self, name) < 1:
                raise RecipeError(f"{name} must be at least 1, got {getattr(self, name)}")

    def make_selector(self) -> Selector:
        """The mask selector."""
        if self.selector == "external" and self.mask_from is not None:
            return External(MaskFiles(self.mask_from))
        if self.mask_from is not None:
            raise RecipeError(f"mask_from is for selector external, not {self.selector}: leave out one of them")
        if ":" in self.selector:
            return load_foreign(self.selector, current_directory=True)
        return make_selector(self.selector)

    def _check_refine(self) -> None:
        if self.refine not in REFINEMENTS:
            raise RecipeError(f"unknown refine {self.refine!r}: known ones are {', '.join(REFINEMENTS)}")
        if self.refine_candidates and self.refine_candidates < 2:
            raise RecipeError(
                f"refine_candidates must be 0 or at least 2, got {self.refine_candidates}: for example 256"
            )
        if self.refine != "none" and self.selector == "external" and self.sparsity is None and not self.pattern:
            raise RecipeError("refine needs to know what pattern to keep: name the sparsity or pattern of the masks")

    def make_refinement(self) -> SwapRefinement | None:
        """What improves the selector's mask; None if nothing does."""
        if self.refine == "none":
            return None
        if not self.refine_candidates:
            return SwapRefinement(PROOF_ROUNDS)
        return SwapRefinement(candidates=self.refine_candidates, most_candidates=self.refine_candidates)

    def make_solver(self) -> RowSolver | None:
        """The row solver, None if the selector's weights are kept."""
        return make_solver(self.solver, self.gap)

    def make_patterns(self, selector: Selector) -> PatternTable:
        """The patterns; unstructured ones take the selector's published scope unless the recipe names one."""
        if isinstance(selector, External) and self.sparsity is None and not self.pattern:
            if self.scope is not None:
                raise RecipeError("scope needs a sparsity or a pattern to check external masks against: leave it out")
            return selector.table()
        sparsity = DEFAULT_SPARSITY if self.sparsity is None else self.sparsity
        scope = self.scope or selector.published_scope
        return parse_table(self.pattern or [str(sparsity)], scope, self.group_size)  # type: ignore[arg-type]

    def make_allocation(self) -> Allocation | None:
        """What shares out the sparsity over the linears; None if all have the same."""
        if self.selector == "external" and self.allocation != ALLOCATION_NAMES[0]:
            raise RecipeError(f"external masks have their own sparsities: leave out allocation {self.allocation}")
        pattern = self.make_patterns(self.make_selector()).default
        if self.allocation in ALLOCATION_NAMES[1:] and (len(self.pattern) > 1 or not isinstance(pattern, Unstructured)):
            raise RecipeError(
                f"allocation {self.allocation} shares out one unstructured sparsity, not pattern "
                f"{' '.join(self.pattern)}: use --sparsity, or allocation uniform"
            )
        sparsity = pattern.sparsity if pattern else DEFAULT_SPARSITY
        return make_allocation(self.allocation, sparsity, self.allocation_spread, self.outlier_multiple)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as written to YAML and to the report."""
        return dataclasses.asdict(self)

    def save(self, path: Path) -> None:
        """Write the recipe as YAML."""
        path.write_text(yaml.safe_dump(self.to_dict(), sort_keys=False), encoding="utf-8")


def check_regexes(name: str, regexes: list[str]) -> None:
    """Raise ``RecipeError`` if one of the ``regexes`` of the option ``name`` is none."""
    for regex in regexes:
        try:
            re.compile(regex)
        except re.error as error:
            raise RecipeError(f"{name}: {regex!r} is not a regular expression: {error}") from error


def _check_max_change(max_change: float | None, solver: RowSolver | None) -> None:
    if max_change is None:
        return
    if not max_change > 0.0:
        raise RecipeError(f"max_change must be positive, got {max_change}: for example 0.5")
    if solver is None or not solver.supports_bounds:
        raise RecipeError("max_change needs a solver that holds bounds: use solver auto or bounded")


def recipe_from_dict(values: dict[str, Any], source: str | None = None) -> Recipe:
    """Build a recipe from plain values; missing keys take their defaults.

    Raises:
        RecipeError: on unknown keys, wrong types or values; the message names ``source``, if it is given.
    """
    known = [option.name for option in dataclasses.fields(Recipe)]
    unknown = [key for key in values if key not in known]
    try:
        if unknown:
            raise RecipeError(f"unknown key {', '.join(map(repr, unknown))}: known keys are {', '.join(known)}")
        return Recipe(**values)
    except RecipeError as error:
        raise RecipeError(f"{source}: {error}" if source else str(error)) from error


def load_recipe(path: str | Path) -> Recipe:
    """Read a YAML recipe.

    Raises:
        RecipeError: if the file cannot be read, is not YAML, or holds unknown keys or impossible values.
    """
    return recipe_from_dict(read_recipe(path), f"recipe {path}")


def read_recipe(path: str | Path) -> dict[str, Any]:
    """The keys and values of a YAML recipe as they stand in the file, unchecked.

    Raises:
        RecipeError: if the file cannot be read, is not YAML, or holds something else than keys and values.
    """
    path = Path(path)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"recipe {path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe {path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise RecipeError(f"recipe {path} must hold keys and values, such as 'sparsity: 0.5'")
    return values


def _typed(option: dataclasses.Field[Any], value: Any) -> Any:
    """``value`` as the type of a field: YAML reads 1e-4 as text, and one string may stand for a list of one."""
    kind = {bool: "true or false", int: "a whole number", float: "a number", str: "text", list: "a list of texts"}
    wanted = _plain_type(option)
    if option.name == "pattern":
        value = _pattern_texts(value)
    if value is None and option.default is None:
        return None
    if wanted is list and isinstance(value, (str, tuple)):
        value = [value] if isinstance(value, str) else list(value)
    if wanted is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        with contextlib.suppress(ValueError):
            return float(value)
    well_typed = isinstance(value, wanted) and (wanted is bool or not isinstance(value, bool))
    if wanted is list:
        well_typed = well_typed and all(isinstance(item, str) for item in value)
    if not well_typed:
        raise RecipeError(f"{option.name} must be {kind[wanted]}, got {value!r}")
    return value


def _pattern_texts(value: Any) -> Any:
    """A sparsity may be written as a number, and null means that there is none."""
    items = [] if value is None else value if isinstance(value, list | tuple) else [value]
    # 2:4 unquoted is a base-60 integer in YAML 1.1.
    if any(isinstance(item, int) for item in items):
        raise RecipeError('quote the pattern, as in pattern: "2:4" (YAML reads it as a number)')
    return [str(item) if isinstance(item, float) else item for item in items]


def _plain_type(option: dataclasses.Field[Any]) -> type:
    name = str(option.type)
    for word, kind in (("list", list), ("bool", bool), ("int", int), ("float", float)):
        if word in name:
            return kind
    return str
