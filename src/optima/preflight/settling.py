"""What a recipe's open settings come to, for this model and this machine: by memory, and by what the model can do.

Nothing here goes by what is free now: a run that goes on must do as it did.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from optima.data.generate import can_continue
from optima.device import card_memory, is_there, named_device
from optima.main_memory import total_memory
from optima.memory import GIB
from optima.models.blocks import count_parameters
from optima.recipe import Recipe

# Shares of the main and the device memory that the whole model may take while it generates.
MAIN_SHARE, CARD_SHARE = 0.5, 0.8


def untuned(recipe: Recipe) -> Recipe:
    """Without tuning."""
    return recipe.replace(tuning_epochs=0)


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
    main, device = total_memory(), named_device(recipe.device)
    card = card_memory(device) if device.type == "cuda" and is_there(device) else None
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
    return recipe.replace(self_generated=0.0), f"no calibration data is self-generated: {reason}"
