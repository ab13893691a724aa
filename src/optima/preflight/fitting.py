"""A recipe made to fit a model: all checks that need neither weights, text nor the device, for a run and for a plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from optima.build import build, default_scope
from optima.linear import Methods
from optima.memory import batch_size
from optima.models.inspect import check_forward
from optima.models.load import Source, dtype_as_read
from optima.preflight.checks import Preflight, check_order, preflight, sequence_length, sized, taken
from optima.preflight.in_memory import check_changeable
from optima.recipe import Recipe


@dataclass(frozen=True)
class Fitted:
    """What a recipe comes to on a model.

    Attributes:
        structure: the model, or its skeleton.
        recipe: with its open settings filled in, as this model and this machine have it.
        methods: as built from it.
        found: stacks, linears and patterns, and what stays dense.
        dtype: of the weights as read: a skeleton is made in float32.
        calibration: what is taken of what the caller gave.
    """

    structure: PreTrainedModel
    recipe: Recipe
    methods: Methods
    found: Preflight
    dtype: torch.dtype
    calibration: Any


def fit(source: Source | None, structure: PreTrainedModel, recipe: Recipe, calibration: object = None) -> Fitted:
    """Check ``recipe`` against a model and a text.

    Args:
        source: where the model is from; None if it is in memory.
        structure: the model, or its skeleton.
        recipe: what to do.
        calibration: as of ``optima.prune``.

    Raises:
        OptimaError: for what cannot be done.
    """
    check_forward(structure)
    methods = build(recipe)
    recipe = recipe.resolved(scope=default_scope(recipe.resolved_objective, methods.selector))
    check_order(source, structure, recipe)
    found = preflight(structure, recipe, methods)
    calibration = taken(structure, calibration, recipe, found)
    if (length := sequence_length(structure, recipe, calibration)) is not None:
        recipe = recipe.replace(batch_size=batch_size(recipe, length))
    dtype = structure.dtype if source is None else dtype_as_read(structure.config, recipe.dtype)
    recipe, found = sized(structure, recipe, found, dtype, calibration)
    check_changeable(structure, found.linears, recipe)
    return Fitted(structure, recipe, methods, found, dtype, calibration)
