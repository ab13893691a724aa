"""What a recipe's open settings come to, for this model and this machine: by memory, and by what the model can do.

Nothing here goes by what is free now: a run that goes on must do as it did.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn
from transformers import PreTrainedModel

from optima.data.generate import CARD_SHARE, keys_bytes, writes
from optima.device import card_memory, is_there, named_device
from optima.errors import RecipeError
from optima.main_memory import total_memory
from optima.memory import (
    GIB,
    HELD_SHARE,
    attention_numbers,
    held_bytes,
    on_cpu,
    streamed_parameters,
    tuning_bytes,
)
from optima.models.stacks import Block, count_parameters
from optima.options import OWN_SHARE
from optima.patterns import SCOPES, Unstructured
from optima.recipe import Recipe

# By ``auto`` main memory holds at most so many times the weights that are there at a time: a run's memory stays low.
# At most this share of weights may go, and not by n:m: behind such linears others do better on dense ones' outputs.
AUTO_WEIGHTS, AUTO_SPARSITY = 2, 0.5
# Share of the main memory that may hold the whole model while it writes, by ``auto``: there may be several processes.
WHOLE_SHARE = 0.25


def settle_in_turn(
    model: PreTrainedModel, blocks: Sequence[Block], recipe: Recipe, dtype: torch.dtype
) -> tuple[bool, str]:
    """What becomes of the recipe's ``true_sequential``, and a note if there is no room for it."""
    attention = attention_numbers(model, recipe.max_seq_length)
    held = max((held_bytes(block, recipe, dtype, attention) for block in blocks), default=0)
    if recipe.true_sequential == "auto" and not _auto_in_turn(model, blocks, recipe, held / dtype.itemsize):
        return False, ""
    room = _memory_at_work(recipe, recipe.memory_budget)
    if room is None or held <= int(HELD_SHARE * room):
        return bool(recipe.true_sequential), ""
    return False, (
        "true_sequential was left out, and a block takes two forward passes: what all sequences need inside one, "
        f"{held / GIB:.1f} GiB, is more than {HELD_SHARE:.0%} of the memory"
    )


def _memory_at_work(recipe: Recipe, budget: int | None) -> int | None:
    """Bytes of memory where blocks run, in main memory the ``budget``; None for a plan for a device elsewhere."""
    if on_cpu(recipe):
        return budget or total_memory()
    device = named_device(recipe.device)
    return card_memory(device) if is_there(device) else None


def settle_tuning(
    model: PreTrainedModel, blocks: Sequence[Block], recipe: Recipe, dtype: torch.dtype
) -> tuple[Recipe, str]:
    """``recipe`` with its epochs as applied, and a note if blocks are not tuned because there is no room for one."""
    settled = replace(recipe, tuning_epochs=recipe.applied_epochs)
    if recipe.tuning_epochs is not None or not settled.tuning_epochs:
        return settled, ""
    room = _memory_at_work(recipe, None)  # work may pass a budget, and a run that goes on may have another
    sizes = [block.placed_parameters * dtype.itemsize for block in blocks]
    taken = max(size + tuning_bytes(model, block, recipe, dtype) for size, block in zip(sizes, blocks, strict=True))
    if room is None or taken <= room:
        return settled, ""
    return untuned(recipe), (
        f"blocks are not tuned: one takes up to {taken / GIB:.1f} GiB then, and the memory has {room / GIB:.1f} GiB; "
        f"--tuning-epochs {settled.tuning_epochs} tries"
    )


def untuned(recipe: Recipe) -> Recipe:
    """Without tuning, and with the defaults of its other options, for what would do nothing is refused."""
    share, rate = Recipe.tuning_share, Recipe.learning_rate
    return replace(recipe, tuning_epochs=0, tuning_share=share, learning_rate=rate)


def settle_own(model: PreTrainedModel, recipe: Recipe, dtype: torch.dtype, given: bool) -> tuple[Recipe, str]:
    """``recipe`` with its ``own_share`` as applied, and a note if ``auto`` comes to none.

    Args:
        model: with its weights, or its skeleton.
        recipe: what is asked for.
        dtype: of the weights.
        given: whether the caller brought the text.

    Raises:
        RecipeError: if the model is to write a share of what the caller brought.
    """
    if recipe.own_share != "auto":
        if given and recipe.own_share:
            raise RecipeError("own_share is for text that is read, and calibration text was given: leave out one")
        return recipe, ""
    if given or not recipe.read:
        return replace(recipe, own_share=0.0), ""
    reason = _why_silent(model, recipe, dtype)
    note = f"all of the text is read, and the model writes none: {reason}" if reason else ""
    return replace(recipe, own_share=0.0 if reason else OWN_SHARE), note


def _why_silent(model: PreTrainedModel, recipe: Recipe, dtype: torch.dtype) -> str:
    """Why ``auto`` lets a model write nothing; not by what is free, for a run that goes on must do as it did."""
    if not writes(model):
        return f"{type(model).__name__} does not go on with a text"
    whole, tries = count_parameters(model) * dtype.itemsize, f"; --own-share {OWN_SHARE} tries"
    if whole > WHOLE_SHARE * (recipe.memory_budget or total_memory()):
        return f"its weights take {whole / GIB:.1f} GiB, more than {WHOLE_SHARE:.0%} of the main memory{tries}"
    card = None if on_cpu(recipe) else _memory_at_work(recipe, None)
    if card is not None and whole + keys_bytes(model, recipe.max_seq_length) > CARD_SHARE * card:
        return f"it takes {whole / GIB:.1f} GiB, more than {CARD_SHARE:.0%} of the device{tries}"
    return ""


def _auto_in_turn(model: nn.Module, blocks: Sequence[Block], recipe: Recipe, held: float) -> bool:
    """Whether ``auto`` means yes, if so many numbers are held."""
    patterns = recipe.table(SCOPES[0]).patterns
    gentle = all(isinstance(each, Unstructured) and each.sparsity <= AUTO_SPARSITY for each in patterns)
    few = not on_cpu(recipe) or held <= AUTO_WEIGHTS * streamed_parameters(model, blocks)
    return held > 0 and few and bool(patterns) and gentle and not recipe.tuning_epochs  # which saves no pass
