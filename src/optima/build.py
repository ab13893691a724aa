"""From a recipe to the objects that carry it out."""

from __future__ import annotations

from optima.allocation import Allocation, make_allocation
from optima.models.masks import MaskFiles
from optima.patterns import PatternTable
from optima.qp.base import RowSolver, make_solver
from optima.recipe import DEFAULT_SPARSITY, Recipe
from optima.selectors.base import Selector, make_selector
from optima.selectors.external import External
from optima.swaps.search import SwapRefinement

PROOF_ROUNDS = 1000  # of swaps in a chunk of rows: more than it takes until every row is proven


def selector_of(recipe: Recipe) -> Selector:
    """The mask selector."""
    if not isinstance(recipe.selector, str):
        chosen: Selector = recipe.selector
        return chosen
    if recipe.selector == "external":
        assert recipe.mask_from is not None, "a recipe checks it"
        return External(MaskFiles(recipe.mask_from))
    return make_selector(recipe.selector)


def refinement_of(recipe: Recipe) -> SwapRefinement | None:
    """What improves the selector's mask; None if nothing does."""
    if recipe.swaps == "all":
        return SwapRefinement(PROOF_ROUNDS)
    return SwapRefinement(candidates=recipe.swaps, most_candidates=recipe.swaps) if recipe.swaps else None


def solver_of(recipe: Recipe) -> RowSolver | None:
    """The row solver, None if the selector's weights are kept."""
    return make_solver(recipe.solver, recipe.gap)


def patterns_of(recipe: Recipe, selector: Selector) -> PatternTable:
    """The patterns; unstructured ones take the selector's published scope unless the recipe names one."""
    if isinstance(selector, External) and recipe.as_given:
        return selector.table()
    return recipe.table(recipe.scope or selector.published_scope)


def allocation_of(recipe: Recipe) -> Allocation | None:
    """What shares out the sparsity over the linears; None if all have the same."""
    default = recipe.table("row").default
    sparsity = default.sparsity if default else DEFAULT_SPARSITY
    return make_allocation(recipe.allocation, sparsity, recipe.allocation_spread, recipe.outlier_multiple)


def resolved(recipe: Recipe) -> Recipe:
    """The recipe with its open defaults filled in as applied."""
    return recipe.resolved(scope=selector_of(recipe).published_scope)
