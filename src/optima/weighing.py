"""What tokens and rows weigh in a run: by the model's loss, or, where it has no gradients, by the attention sink."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from optima.build import default_scope
from optima.calibration.loss_weights import WORDS, loss_weights
from optima.calibration.streams import Streams
from optima.calibration.tempering import LossWeights
from optima.device import full_precision
from optima.errors import NotDifferentiableError, RecipeError
from optima.models.stacks import Stack
from optima.models.weights import Weights
from optima.patterns import Pattern, Unstructured
from optima.pipeline import Job
from optima.recipe import SINK_WEIGHT, Recipe
from optima.selectors.base import Selector


def weigh(
    network: PreTrainedModel,
    stack: Stack,
    streams: Streams,
    device: torch.device,
    weights: Weights,
    recipe: Recipe,
    coupled: bool,
    told: Callable[[float], None],
) -> tuple[LossWeights | None, str]:
    """What the loss feels of each token and row, None if there are no gradients; and what a report must tell of it.

    Args:
        network: has ``stack``.
        stack: with the linears to prune.
        streams: what enters its first block.
        device: where to compute.
        weights: gives each block its own.
        recipe: as resolved.
        coupled: see ``loss_weights``.
        told: see ``loss_weights``.
    """
    try:
        tuned = recipe.tuning_epochs > 0
        share = recipe.swept_share
        found = loss_weights(network, stack, streams, device, recipe.seed, tuned, weights, share, told, coupled)
    except NotDifferentiableError as error:
        where = "" if stack.part == "whole" else f" in the {stack.part}"
        return None, f"objective sink took the place of objective loss{where}, for there are no gradients: {error}"
    if found.loss == WORDS:
        return found, found.told
    return found, f"objective loss is {found.loss}: the model has no head that predicts words"


def sweep(job: Job, network: PreTrainedModel, stack: Stack, streams: Streams, recipe: Recipe) -> str:
    """Give ``job`` what ``weigh`` finds, or the sink weight where there are no gradients; what a report must tell."""
    job.progress.start(len(stack.blocks), 1, stage="sweep")
    with job.clock("sweep"), full_precision():
        coupled = "coupling" in job.methods.needs
        job.loss, told = weigh(network, stack, streams, job.device, job.weights, recipe, coupled, job.progress.share)
    if job.loss is None:
        job.sink_weight = SINK_WEIGHT
    return told


def rank_without_loss(
    stack: Stack, patterns: dict[str, Pattern], recipe: Recipe, selector: Selector, scope_named: bool
) -> str:
    """Let weights of ``stack`` compete as by ``objective: sink``, and return what a report must tell of it.

    By the loss rows compete, each worth what the loss feels of it. Without, rows of little energy would be starved:
    unless the scope was named, its ``patterns``, by names of linears, get that of objective sink.

    Raises:
        RecipeError: if ``keep_dense`` is to choose linears by the loss.
    """
    if recipe.keep_dense is not None:
        raise RecipeError(
            "keep_dense chooses linears by the model's loss, and this model has no gradients: leave it out, and add "
            "objective sink"
        )
    text, scope = "", default_scope("sink", selector)
    if not scope_named and recipe.scope not in (None, scope):  # None: masks from elsewhere, taken as they are
        names = [linear.name for block in stack.blocks for linear in block.linears]
        ranked = {name: each for name in names if isinstance(each := patterns.get(name), Unstructured)}
        patterns.update({name: replace(pattern, scope=scope) for name, pattern in ranked.items()})
        text += f"; weights are ranked by {scope}" if ranked else ""
    return text + ("; all linears have the same sparsity" if recipe.allocation == "loss" else "")
