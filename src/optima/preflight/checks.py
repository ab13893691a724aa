"""Does this recipe fit this model and this text? Every check that needs no long work, made once, before any."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from optima.build import pattern_table
from optima.core.shifted import MOST_EIGENVALUES
from optima.data.batches import Calibration, read_calibration
from optima.distributed import Ranks
from optima.errors import RecipeError
from optima.linear import Methods
from optima.models.blocks import Block, Linear, Stack, dense_notes, find_stacks, select_linears
from optima.models.inspect import check_length
from optima.models.load import Source, orders_of
from optima.models.masks import MaskFiles
from optima.models.ordered import ORDERING_NAME, orders_in_memory, read_orders
from optima.patterns import Pattern
from optima.preflight.settling import settle_self_generated
from optima.recipe import Recipe
from optima.selectors.alps import ALPS
from optima.selectors.external import External


@dataclass(frozen=True)
class Preflight:
    """What a recipe prunes in a model.

    Attributes:
        stacks: with the linears to prune.
        patterns: the pattern of each of them, by its full name.
        notes: what stays dense and why.
    """

    stacks: tuple[Stack, ...]
    patterns: dict[str, Pattern]
    notes: tuple[str, ...]

    @property
    def blocks(self) -> list[Block]:
        """Of all stacks, in order."""
        return [block for stack in self.stacks for block in stack.blocks]

    @property
    def linears(self) -> list[Linear]:
        """To prune, in order."""
        return [linear for block in self.blocks for linear in block.linears]


def preflight(model: nn.Module, recipe: Recipe, methods: Methods) -> Preflight:
    """Check ``recipe`` against ``model``, or its skeleton.

    Args:
        model: the model; its weights are not looked at.
        recipe: what to prune.
        methods: as built from the recipe.

    Raises:
        ModelError: if nothing matches.
        RecipeError: if a linear has no pattern, one that does not divide its inputs, or no external mask that fits.
    """
    stacks = chosen_stacks(model, recipe)
    found = Preflight(tuple(stacks), {}, (*dense_notes(model, stacks), *_idle(recipe, stacks)))
    if not recipe.any_pattern:
        table = pattern_table(recipe, methods.selector)
        found.patterns.update(table.assign({linear.name: linear.shape[1] for linear in found.linears}))
    if isinstance(methods.selector, External):
        if isinstance(masks := methods.selector.masks, MaskFiles):
            known = [name for name, parameter in model.named_parameters() if parameter.ndim == 3]
            known += [name for name, module in model.named_modules() if hasattr(module, "weight")]
            masks.check_names(
                [*known, *(each.name for block in found.blocks for each in (*block.linears, *block.excluded))]
            )
        found.patterns.update(methods.selector.check(found.linears, found.patterns, recipe.ignore))
    if isinstance(methods.selector, ALPS):
        _check_eigenvalues(found.linears)
    return found


def _check_eigenvalues(linears: Iterable[Linear]) -> None:
    for linear in linears:
        if linear.shape[1] > MOST_EIGENVALUES:
            raise RecipeError(
                f"selector alps needs the eigenvalues of the hessian of {linear.name}, and its {linear.shape[1]:,} "
                f"inputs are more than the {MOST_EIGENVALUES:,} that can be had: take another selector, or --ignore it"
            )


def known_orders(source: Source | None, model: PreTrainedModel) -> Any:
    """The orders of the model's channels, read from disk or in memory; None if it has its own."""
    return orders_of(source) if source is not None else orders_in_memory(model)


def check_order(source: Source | None, model: PreTrainedModel, recipe: Recipe) -> None:
    """Masks speak of weights by their places: they must be of the model with its channels in this order."""
    if recipe.mask_from is None:
        return
    masks = Path(recipe.mask_from).expanduser()
    if read_orders(masks if masks.is_dir() else masks.parent) != known_orders(source, model):
        name = "the model in memory" if source is None else source.name
        raise RecipeError(
            f"mask_from {recipe.mask_from} and {name} have their channels in different orders ({ORDERING_NAME}): prune "
            "the model that the masks were made for; a file of masks has its orders beside it"
        )


def chosen_stacks(model: nn.Module, recipe: Recipe) -> list[Stack]:
    """The stacks of ``model`` with the linears that ``recipe`` prunes."""
    return select_linears(find_stacks(model), recipe.targets, recipe.ignore)


def _idle(recipe: Recipe, stacks: Sequence[Stack]) -> list[str]:
    """A note for each regex of ``ignore`` that was asked for and leaves nothing alone: it may be misspelt."""
    names = [linear.name for stack in stacks for block in stack.blocks for linear in (*block.linears, *block.excluded)]
    default = Recipe().ignore
    asked = (regex for regex in recipe.ignore if regex not in default)
    return [f"ignore {each!r} matches no linear" for each in asked if not any(re.search(each, name) for name in names)]


def check_shared(count: int | None, ranks: Ranks) -> None:
    """Raise ``RecipeError`` unless each process has one of ``count`` sequences, as far as their number is known."""
    if count is not None and count < ranks.size:
        raise RecipeError(
            f"{ranks.size} processes share {count} calibration sequences: start {count} at most, or raise "
            "--num-calibration-samples"
        )


def taken(model: nn.Module, calibration: object, recipe: Recipe, found: Preflight) -> Any:
    """What is taken of what the caller gave: batches of a processor's outputs, one tensor of token ids, or documents.

    Raises:
        CalibrationError: if batches hold something else, or do not fit each other.
    """
    return read_calibration(model, calibration, partial(_samples, recipe, found))


def _samples(recipe: Recipe, found: Preflight, length: int) -> int:
    """How many calibration sequences of ``length`` tokens are wanted: of two stacks each reads a half."""
    inputs = max(linear.shape[1] for linear in found.linears)
    return recipe.replace(max_seq_length=length).samples(len(found.stacks) * inputs)


def sequence_length(model: nn.Module, recipe: Recipe, calibration: object) -> int | None:
    """Tokens in a calibration sequence; None if batches of a processor's outputs are given instead.

    Raises:
        ModelError: if the model does not read token sequences as long as these.
    """
    if isinstance(calibration, Calibration):
        return None
    length = calibration.shape[1] if isinstance(calibration, Tensor) else recipe.max_seq_length
    check_length(model, length)
    return length


def sized(
    model: PreTrainedModel, recipe: Recipe, found: Preflight, dtype: torch.dtype, calibration: object = None
) -> tuple[Recipe, Preflight]:
    """``recipe`` with what depends on the widths: the number of sequences, and what there is room for.

    Args:
        model: with its weights, or its skeleton.
        recipe: to complete.
        found: it gets a note if there is no room to tune blocks, to calibrate linears in turn, or to write text.
        dtype: of activations.
        calibration: what the caller gave; of token ids and a processor's outputs the size is known.

    Raises:
        OptimaError: if that cannot be.
    """
    recipe, all_read = settle_self_generated(model, recipe, dtype, calibration is not None)
    if isinstance(calibration, Tensor):
        recipe = recipe.replace(num_calibration_samples=len(calibration), max_seq_length=calibration.shape[1])
    if isinstance(calibration, Calibration):
        length, samples = calibration.longest or recipe.max_seq_length, calibration.size[0]
        recipe = recipe.replace(num_calibration_samples=samples, max_seq_length=length, batch_size=calibration.largest)
    recipe = recipe.replace(num_calibration_samples=_samples(recipe, found, recipe.max_seq_length))
    return recipe, replace(found, notes=(*found.notes, *filter(None, (all_read,))))
