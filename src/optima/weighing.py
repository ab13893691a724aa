"""What tokens and rows weigh in a run: by the model's loss, or, where it has no gradients, by the attention sink."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from transformers import PreTrainedModel

from optima.build import default_scope
from optima.calibration.activations import Activations
from optima.calibration.fisher import LOGITS, fisher_weights
from optima.calibration.lm_head import LmHead
from optima.device import full_precision
from optima.errors import NotDifferentiableError
from optima.models.blocks import Stack
from optima.patterns import Pattern, Unstructured
from optima.pipeline import Job
from optima.recipe import FISHER_FRACTION, SINK_WEIGHT, Recipe
from optima.selectors.base import Selector


def sweep(job: Job, network: PreTrainedModel, stack: Stack, acts: Activations, recipe: Recipe) -> str:
    """Give ``job`` the Fisher weights, or the sink weight where there are no gradients.

    Args:
        job: of the run.
        network: has ``stack``.
        stack: with the linears to prune.
        acts: what enters its first block.
        recipe: as resolved.

    Returns:
        A note for the report.
    """
    job.progress.stage("gradients", len(stack.blocks))
    try:
        with job.clock("sweep"), full_precision():
            job.loss = fisher_weights(
                network,
                stack,
                acts,
                recipe.seed,
                residual=job.tuning is not None,
                weights=job.weights,
                share=FISHER_FRACTION,
                progress=job.progress.progress,
                coupled="coupling" in job.methods.needs,
            )
    except NotDifferentiableError as error:
        job.sink_weight = SINK_WEIGHT
        part = "" if stack.part == "whole" else f" in the {stack.part}"
        untuned, job.tuning = "" if job.tuning is None else ", and blocks are not tuned", None
        return f"objective sink took the place of objective loss{part}{untuned}, for there are no gradients: {error}"
    if job.loss.loss == LOGITS:
        # Of an encoder and its decoder, a call of the head would run the other one.
        job.words = LmHead(network, stack, job.weights) if stack.part == "whole" else None
        return job.loss.note
    return f"objective loss is {job.loss.loss}: the model has no LM head"


def rank_without_loss(
    stack: Stack, patterns: Mapping[str, Pattern], recipe: Recipe, selector: Selector, scope_named: bool
) -> tuple[dict[str, Pattern], str]:
    """Patterns by which weights of ``stack`` compete as with ``objective: sink``, and a note for the report.

    By the loss rows compete, each by its Fisher weight. Without, rows of little energy would be starved:
    unless the scope was named, its ``patterns``, by names of linears, get that of objective sink.
    """
    found, text, scope = dict(patterns), "", default_scope("sink", selector)
    if not scope_named and recipe.scope not in (None, scope):  # None: masks from elsewhere, taken as they are
        names = [linear.name for block in stack.blocks for linear in block.linears]
        ranked = {name: each for name in names if isinstance(each := patterns.get(name), Unstructured)}
        found |= {name: replace(pattern, scope=scope) for name, pattern in ranked.items()}
        text += f"; weights are ranked by {scope}" if ranked else ""
    return found, text + ("; all linears have the same sparsity" if recipe.allocation == "loss" else "")
