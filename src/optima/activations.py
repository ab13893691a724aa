"""How much of the activations a run keeps at once, by the model's configuration: an upper bound."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from optima.calibration.correlation import coupling_bytes
from optima.calibration.fisher import fisher_share, sensitivity_share, tuned_share
from optima.models.blocks import Block, has_experts
from optima.models.inspect import is_encoder_decoder, stream_numbers
from optima.recipe import FISHER_FRACTION, Recipe

# Bytes of each of the E x E numbers that tell what a change of a block's outputs costs.
METRIC_BYTES = 4


class Shares(NamedTuple):
    """Of the sequences: those that are swept for the loss, surveyed for sparsities, and tuned on."""

    swept: float
    surveyed: float
    tuned: float


class Activations(NamedTuple):
    """What a run keeps of them.

    Attributes:
        shares: of the sequences.
        inputs: bytes of all block inputs of one block; 0 if the configuration does not tell.
        stored: bytes of all that is kept at once, in main memory, as far as there is room, and in files.
        known: whether the configuration tells the size of the block inputs.
    """

    shares: Shares
    inputs: int
    stored: int
    known: bool


def activations(
    model: PreTrainedModel, blocks: Sequence[Block], recipe: Recipe, needs: Collection[str], dtype: torch.dtype
) -> Activations:
    """Of a run, by a recipe with its number of sequences; ``needs``: of its selector.

    A survey and tuning carry the dense model's block inputs beside those of the pruned one; a sweep for the loss keeps
    those of all blocks, up to a limit.
    """
    assert recipe.num_calibration_samples is not None
    text = model.config.get_text_config()
    hidden, beside = _numbers(text)
    tokens = recipe.num_calibration_samples * recipe.max_seq_length
    linears = [linear for block in blocks for linear in block.linears]
    own = tokens // 2 if is_encoder_decoder(model) else tokens  # of a stack
    swept = fisher_share(FISHER_FRACTION, own) if recipe.objective == "loss" else 0.0
    surveyed = (recipe.allocation == "loss") * (
        sensitivity_share(FISHER_FRACTION, own, has_experts(linears)) if swept else 1.0
    )
    tuned = tuned_share(recipe.tuning_fraction, own) if recipe.tuning_epochs else 0.0
    inputs = tokens * (hidden or 0) * dtype.itemsize
    coupled = coupling_bytes(blocks, needs)
    width = (getattr(text, "hidden_size", None) or 0) * (getattr(text, "hc_count", None) or 1)  # of what counts as one
    metrics = METRIC_BYTES * width**2 * len(blocks) if swept and tuned else 0
    kept = (inputs + (len(blocks) + 1) * inputs * swept if swept else 0) + coupled + metrics
    carried = int(inputs * (1 + max(surveyed, tuned))) + coupled // 2 + metrics
    stored = max(carried, int(kept)) + tokens * beside * dtype.itemsize
    return Activations(Shares(swept, surveyed, tuned), inputs, stored, hidden is not None)


def _numbers(text: Any) -> tuple[int | None, int]:
    """What blocks hand on for a token, None if that is unknown, and what they are called with besides (Gemma 3n)."""
    hidden, versions = getattr(text, "hidden_size", None), getattr(text, "altup_num_inputs", None) or 1
    handed = hidden and (stream_numbers(text) or versions * hidden)
    beside = getattr(text, "hidden_size_per_layer_input", None) or 0
    return handed, beside * (getattr(text, "num_hidden_layers", None) or 0)
