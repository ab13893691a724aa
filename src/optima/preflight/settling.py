"""What a recipe's open settings come to, for this model and this machine: by memory, and by what the model can do.

Nothing here goes by what is free now: a run that goes on must do as it did.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from optima.data.generate import can_continue
from optima.device import card_memory, is_there, named_device
from optima.main_memory import total_memory
from optima.memory import (
    GIB,
    on_cpu,
    tuning_bytes,
)
from optima.models.blocks import Block, count_parameters
from optima.recipe import Recipe

# Shares of the main and the device memory that the whole model may take while it generates.
MAIN_SHARE, CARD_SHARE = 0.5, 0.8


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
    sizes = [count_parameters(block.module) * dtype.itemsize for block in blocks]
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


def settle_self_generated(
    model: PreTrainedModel, recipe: Recipe, dtype: torch.dtype, given: bool
) -> tuple[Recipe, str]:
    """``recipe`` with ``self_generated`` 0 and a note, where the model cannot generate calibration data.

    Not by what memory is free now: a resumed run must do as it did.

    Args:
        model: with its weights, or its skeleton.
        recipe: what is asked for.
        dtype: of the weights.
        given: whether the caller gave token ids or batches.
    """
    if not recipe.self_generated:
        return recipe, ""
    whole = count_parameters(model) * dtype.itemsize
    main, card = recipe.memory_budget or total_memory(), None if on_cpu(recipe) else _memory_at_work(recipe, None)
    if given:
        reason = "the caller gave the calibration data"
    elif not can_continue(model):
        reason = f"{type(model).__name__} does not generate text"
    elif whole > MAIN_SHARE * main:
        reason = f"its weights take {whole / GIB:.1f} GiB, more than {MAIN_SHARE:.0%} of the main memory"
    elif card is not None and whole > CARD_SHARE * card:
        reason = f"its weights take {whole / GIB:.1f} GiB, more than {CARD_SHARE:.0%} of the device memory"
    else:
        return recipe, ""
    return replace(recipe, self_generated=0.0), f"no calibration data is self-generated: {reason}"
