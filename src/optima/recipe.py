"""The recipe: a complete, validated configuration of a run. Its fields are the CLI's options and a file's keys.

No torch is imported here: a recipe is checked, and the help printed, before the long start of the libraries.
"""

from __future__ import annotations

from dataclasses import Field as DataclassField
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NoReturn

import yaml

from optima.errors import IdleError, RecipeError
from optima.options import (
    ALLOCATION_NAMES,
    DEFAULT_SPARSITY,
    DTYPES,
    EPOCHS,
    EXPERT_TOKENS,
    LEARNING_RATE,
    LEAST_SAMPLES,
    OBJECTIVES,
    SELECTOR_NAMES,
    SINK_WEIGHT,
    SOLVER_NAMES,
    TOKENS_PER_INPUT,
    UNDAMPED,
    option,
)
from optima.patterns import NM, SCOPES, PatternTable, Unstructured, parse_table, pattern_texts
from optima.values import (
    Count,
    Device,
    Flag,
    Fraction,
    Names,
    PartialShare,
    Place,
    Positive,
    Ridge,
    Seed,
    Share,
    Size,
    Texts,
    Weight,
    check_regexes,
    checked,
    shown,
    unknown,
)


@dataclass(frozen=True)
class Recipe:
    """What to prune and how. Every field has a default; the metadata of each field is its documentation.

    ``selector`` may be an object (see ``optima.selectors.base.Selector``) instead of a name.

    Raises:
        RecipeError: on construction, for any value that cannot be carried out; the message names it.
    """

    # fmt: off
    sparsity: Fraction | None = option("mask", None, "fraction of weights to prune", shown="0.5")
    pattern: Texts = option(
        "mask", [], "instead of a sparsity: n:m keeps n of every m consecutive inputs (2:4); several, each for the "
        "linears whose name a regex finds: REGEX=2:4, REGEX=0.6, and one without a regex for all others; the first "
        "that matches counts", shown="none")
    scope: str | None = option(
        "mask", None, "what an unstructured sparsity is ranked over", SCOPES,
        "the selector's published one, but layer instead of row with objective loss; for optima row without")
    allocation: str | None = option(
        "mask", None, "how linears share one unstructured sparsity: all have the same, or by "
        "what the model's loss feels of them", ALLOCATION_NAMES, "loss with objective loss, else uniform")
    selector: Any = option(
        "mask", "optima", "mask selector, or your own as package.module:Class with --trust-remote-code", SELECTOR_NAMES)
    mask_from: Place | None = option(
        "mask", None, "for selector external: a pruned checkpoint, or a safetensors file of masks", shown="none")
    objective: str | None = option(
        "objective", None, "how tokens and outputs count: as the model's loss feels them (one backward pass over the "
        "dense model), every token alike but for each sequence's first (the attention sink), or plainly alike",
        OBJECTIVES, "loss; plain with solver none, as published")
    sink_weight: Weight | None = option(
        "objective", None, "for objective sink: weight of a sequence's first token, relative to all its tokens",
        shown=f"{SINK_WEIGHT}")
    swept_share: Share = option(
        "objective", 0.25, "for objective loss: the share of the sequences that the backward pass and a survey take, "
        "of at least 8192 tokens; other tokens weigh what those at their place do")
    damping: Ridge = option("objective", 0.01, "ridge, relative to the mean diagonal of the hessian")
    solver: str = option("solve", "auto", "row solver; none keeps the selector's weights", SOLVER_NAMES)
    gap: Positive = option("solve", 1e-4, "certified relative gap to the optimum at which a row stops")
    tuning_epochs: Seed | None = option(
        "tuning", None, "passes over calibration text in which each block is tuned towards the dense one; certificates "
        "speak of the weights before",
        shown=f"{EPOCHS} with objective loss and a solver, if there is room; else 0")
    tuning_share: Share = option(
        "tuning", 0.4, "the share of the sequences that blocks are tuned on, of at least 32768 tokens")
    learning_rate: Positive = option(
        "tuning", LEARNING_RATE, "of Adam, at the start, relative to the root mean square of each tensor")
    dataset: Names = option(
        "calibration", ["allenai/c4"], "local .txt, .jsonl, .json or .parquet files, or hub ids "
        "(NAME:CONFIG@REVISION)")
    num_calibration_samples: Count | None = option(
        "calibration", None, "number of calibration sequences",
        shown=f"{LEAST_SAMPLES}, more where the widest linear would get under {TOKENS_PER_INPUT} tokens an input")
    max_seq_length: Count = option("calibration", 2048, "tokens in each calibration sequence")
    self_generated: PartialShare = option(
        "calibration", 0.0, "share of the sequences that the model generates, as continuations of the dataset's text")
    expert_tokens: Seed = option(
        "calibration", EXPERT_TOKENS, "experts of a mixture that are given fewer tokens are named in the report")
    batch_size: Count | None = option(
        "calibration", None, "sequences in one forward pass", shown="8; on a CPU 2,048 tokens' worth")
    seed: Seed = option("calibration", 0, "seed of the choice of text")
    targets: Texts = option(
        "model", [".*"], "regexes; linears whose full name matches one are pruned; a router only by one that does not "
        "match the module around it too")
    ignore: Texts = option(
        "model", ["lm_head", "embed"], "regexes, in place of the default; linears whose full name matches one are left "
        "alone; none if given without a value")
    dtype: str = option("model", "auto", "load the model as this; auto: the checkpoint's own", DTYPES)
    revision: str | None = option("model", None, "commit, tag or branch of a hub model", shown="its newest")
    trust_remote_code: Flag = option(
        "model", False, "run code that comes with the checkpoint, or that --selector names")
    device: Device = option("run", "auto", "auto, cpu, cuda or cuda:N")
    memory_budget: Size | None = option(
        "run", None, "main memory that a process keeps to, such as 8GiB: what is more waits in files", shown="none")
    # fmt: on

    def __post_init__(self) -> None:
        for each in fields(self):
            object.__setattr__(self, each.name, _checked(each, getattr(self, each.name)))
        self._check_selector()
        self._check_mask(self.table(self.scope or SCOPES[0]))
        self._check_idle()
        if self.applied_objective != "loss":
            named = self.objective or "plain, as with solver none unless it is named"
            if self.allocation == "loss":
                raise RecipeError(
                    f"allocation loss needs objective loss, not {named}: say objective loss, or allocation uniform"
                )
        if not self.dataset:
            raise RecipeError("dataset is empty: name a hub id or a local text file")
        check_regexes("targets", self.targets)
        check_regexes("ignore", self.ignore)

    def table(self, scope: str) -> PatternTable:
        """The patterns that are asked for, the unstructured ones with ``scope``; external masks may ask for none."""
        if self.as_given:
            return PatternTable()
        sparsity = DEFAULT_SPARSITY if self.sparsity is None else self.sparsity
        return parse_table(self.pattern or [str(sparsity)], scope)  # type: ignore[arg-type]

    @property
    def as_given(self) -> bool:
        """True if external masks are taken as they are, whatever their pattern."""
        return self._external() and self.sparsity is None and not self.pattern

    def _external(self) -> bool:
        return self.selector == "external" or getattr(self.selector, "takes_given", False) is True

    @property
    def applied_objective(self) -> str:
        """The objective, or what it is where the recipe names none: methods without a solver are as published."""
        return self.objective or ("plain" if self.solver == "none" else "loss")

    @property
    def applied_allocation(self) -> str:
        """The allocation, or what it is where the recipe names none: by the loss, if there is one sparsity to share."""
        if self.allocation is not None:
            return self.allocation
        one = len(self.pattern) <= 1 and isinstance(self.table(SCOPES[0]).default, Unstructured)
        by_loss = self.applied_objective == "loss" and not self._external()
        return "loss" if one and by_loss else "uniform"

    @property
    def applied_epochs(self) -> int:
        """Epochs of tuning, or what they are where the recipe names none: it tunes if solved in units of the loss."""
        if self.tuning_epochs is not None:
            return self.tuning_epochs
        return EPOCHS if self.solver != "none" and self.applied_objective == "loss" else 0

    @property
    def surveys(self) -> bool:
        """True if a sensitivity pass over the dense model decides on each linear's sparsity."""
        return self.applied_allocation == "loss"

    def samples(self, inputs: int) -> int:
        """Calibration sequences, for a model whose widest linear has so many ``inputs``."""
        enough = -(-TOKENS_PER_INPUT * inputs // self.max_seq_length)
        return self.num_calibration_samples or max(LEAST_SAMPLES, enough)

    def resolved(self, *, scope: str) -> Recipe:
        """The recipe with its open defaults filled in as applied, so that a file of it means the same for ever.

        But for ``samples``, the batch and tuning, which depend on the model and the device.

        Args:
            scope: for a recipe that names none, see ``optima.build.default_scope``.
        """
        unstructured = any(isinstance(pattern, Unstructured) for pattern in self.table(SCOPES[0]).patterns)
        defaults: dict[str, Any] = {
            "sparsity": None if self.pattern or self.as_given else DEFAULT_SPARSITY,
            "scope": scope if unstructured else None,
            "allocation": self.applied_allocation,
            "objective": self.applied_objective,
            "sink_weight": SINK_WEIGHT if self.objective == "sink" else None,
        }
        values = {name: value for name, value in defaults.items() if getattr(self, name) is None}
        return replace(self, **values)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as written to YAML and to the report; a selector object is named by its class."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        values = {name: list(value) if isinstance(value, list) else value for name, value in values.items()}
        if not isinstance(self.selector, str):
            kind = type(self.selector)
            values["selector"] = f"{kind.__module__}:{kind.__qualname__}"
        return values

    def save(self, path: Path, about: str = "") -> None:
        """Write it as YAML behind a comment ``about`` it, without what does nothing, and leave to run code."""
        left_out = {*self._idle(), "trust_remote_code"}  # later defaults may be others; trust is each user's own
        values = {name: value for name, value in self.to_dict().items() if name not in left_out}
        path.write_text(f"# {about}\n" * bool(about) + yaml.safe_dump(values, sort_keys=False), encoding="utf-8")

    def _check_selector(self) -> None:
        chosen = self.selector
        if not isinstance(chosen, str):
            if isinstance(chosen, type) or not all(hasattr(chosen, part) for part in ("select", "published_scope")):
                raise RecipeError(
                    f"selector must be a name, package.module:Class, or an object with published_scope and "
                    f"select(task, pattern), got {shown(chosen)}"
                )
        elif ":" in chosen:
            if not self.trust_remote_code:
                raise RecipeError(
                    f"selector {chosen} loads and runs code: if you trust it, add --trust-remote-code; in Python, say "
                    "trust_remote_code=True, or give the object"
                )
        elif chosen not in SELECTOR_NAMES:
            raise RecipeError(f"{unknown('selector', chosen, SELECTOR_NAMES)}, or your own as package.module:Class")
        if chosen == "external" and self.mask_from is None:
            raise RecipeError("selector external takes its masks from mask_from: name a checkpoint or a file of masks")
        if chosen != "external" and self.mask_from is not None:
            raise RecipeError(f"mask_from is for selector external, not {shown(chosen)}: leave out one of them")

    def _check_mask(self, table: PatternTable) -> None:
        if self.sparsity is not None and self.pattern:
            self._refuse_both()
        if self.as_given and self.scope is not None:
            raise RecipeError("scope needs to know the pattern of the external masks: name their sparsity or pattern")
        if self.scope is not None and all(isinstance(pattern, NM) for pattern in table.patterns):
            raise RecipeError("scope is for unstructured sparsity: an n:m pattern has none")
        if self.allocation in (None, "uniform"):
            return
        if self._external():
            raise RecipeError(f"external masks have their own sparsities: leave out allocation {self.allocation}")
        if len(self.pattern) > 1 or not isinstance(table.default, Unstructured):
            raise RecipeError(
                f"allocation {self.allocation} shares out one unstructured sparsity, not pattern "
                f"{' '.join(self.pattern)}: use --sparsity, or allocation uniform"
            )

    def _refuse_both(self) -> NoReturn:
        if any("=" not in entry for entry in self.pattern):
            raise RecipeError("give either sparsity or pattern, not both")
        named, rest = " ".join(self.pattern), f"{self.sparsity:g}"
        raise RecipeError(
            f"give either sparsity or pattern, not both: pattern {named} {rest} prunes {rest} where no other "
            "entry matches"
        )

    def _check_idle(self) -> None:
        """What would do nothing is a misunderstanding, unless it spells out the default."""
        defaults = {each.name: each.default for each in fields(self)}
        for name, owner in self._idle().items():
            if getattr(self, name) != defaults[name]:
                raise IdleError(name, f"{name} is for {owner}: add that, or leave {name} out")

    def _idle(self) -> dict[str, str]:
        """Options that do nothing, and what they are for."""
        damped = self.solver != "none" or self.surveys or self.selector not in UNDAMPED
        used = {
            "sink_weight": ("objective sink", self.objective == "sink"),
            "swept_share": ("objective loss", self.applied_objective == "loss"),
            **dict.fromkeys(("learning_rate", "tuning_share"), ("tuning_epochs above 0", self.applied_epochs > 0)),
            "gap": ("a solver", self.solver != "none"),
            "damping": ("a solver, or a selector that looks at inverses", damped),
        }
        return {name: owner for name, (owner, applies) in used.items() if not applies}


def recipe_from_dict(values: dict[str, Any]) -> Recipe:
    """Build a recipe from plain values; missing keys take their defaults.

    Raises:
        RecipeError: on unknown keys, wrong types or values.
    """
    known = [each.name for each in fields(Recipe)]
    for key in values:
        plain = str(key).replace("-", "_")
        if key not in known and plain in known:
            raise RecipeError(f"{key}: write {plain}")
        if key not in known:
            raise RecipeError(unknown("key", str(key), known))
    return Recipe(**values)


def _checked(each: DataclassField[Any], value: Any) -> Any:
    """``value`` as the type of a field, and one of its choices."""
    name, choices = each.name, each.metadata["choices"]
    if name == "selector":
        return value
    if name == "pattern":
        value = pattern_texts(value)
    value = checked(Recipe, name, value, each.default)
    if choices and value is not None and value not in choices:
        raise RecipeError(unknown(name, value, choices))
    return value
