"""From a recipe to what carries it out, built once a run: the one place where names become methods."""

from __future__ import annotations

from optima.core import make_solver
from optima.linear import Methods
from optima.models.masks import MaskFiles
from optima.patterns import SCOPES, PatternTable, Scope
from optima.recipe import Recipe
from optima.selectors.base import Selector, load_foreign, make_selector, needs_of
from optima.selectors.external import External
from optima.selectors.optima import Optima
from optima.tune import Tuning


def build(recipe: Recipe) -> Methods:
    """What is done to every linear.

    Raises:
        RecipeError: if a method of the user's own cannot be loaded, or asks for what nothing can give.
    """
    selector = _selector(recipe)
    return Methods(
        selector=selector,
        solver=make_solver(recipe.solver, recipe.gap),
        needs=needs_of(selector) - (set() if recipe.resolved_objective == "loss" else {"coupling"}),
    )


def _selector(recipe: Recipe) -> Selector:
    name = recipe.selector
    if not isinstance(name, str):
        own: Selector = name
        return own
    if name == "external":
        assert recipe.mask_from is not None, "a recipe checks it"
        return External(MaskFiles(recipe.mask_from, recipe.trust_remote_code))
    # A recipe allows code of the user's own only where it is trusted.
    return load_foreign(name) if ":" in name else make_selector(name)


def default_scope(objective: str, selector: Selector) -> Scope:
    """The published scope; but rows compete where the loss says what each is worth, and those of ours only there."""
    published = selector.published_scope
    if objective == "loss":
        return "layer" if published == "row" else published
    return "row" if isinstance(selector, Optima) else published


def pattern_table(recipe: Recipe, selector: Selector) -> PatternTable:
    """The patterns; unstructured ones take the default scope unless the recipe names one."""
    return recipe.table(recipe.scope or default_scope(recipe.resolved_objective, selector))


def build_tuning(recipe: Recipe) -> Tuning | None:
    """How blocks are tuned; None if they are not."""
    epochs = recipe.tuning_epochs
    return Tuning(epochs, recipe.learning_rate, recipe.tuning_fraction, recipe.seed) if epochs else None


def sparsity_of(recipe: Recipe) -> float:
    """The one sparsity that an allocation shares out."""
    default = recipe.table(SCOPES[0]).default
    assert default is not None, "a recipe checks it"
    return default.sparsity
