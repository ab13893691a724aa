"""Whether a model that is given in memory is one that can be pruned, and loaded again from what is written."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel

from optima.errors import ModelError
from optima.models.blocks import Linear
from optima.recipe import Recipe

NUMBERED = re.compile(r"\.\d+\.")  # in the names of what is in a list, as blocks are


def check_in_memory(model: PreTrainedModel, written: bool) -> None:
    """Raise ``ModelError`` unless all weights are there as numbers of their own, and the model's code is its class's.

    Args:
        model: as the caller gives it.
        written: whether a checkpoint will be: what loads it has other parameters if modules were wrapped.
    """
    _check_weights(model)
    # What every kind of adapter of PEFT calls the linear that it is put around.
    if any(name.endswith(".base_layer") for name, _ in model.named_modules()):
        raise ModelError("the model has adapters, which are not written: merge them into its weights first")
    if "_original_forward" in vars(model):  # autocast, and casts, that only its own code can take off
        raise ModelError(
            "accelerate wrapped the model's forward pass for mixed precision: take that off by "
            "accelerator.unwrap_model(model, keep_fp32_wrapper=False)"
        )
    if written:
        _check_names(model)


def check_changeable(model: PreTrainedModel, linears: Iterable[Linear], recipe: Recipe) -> None:
    """Raise ``ModelError`` if what is written into ``linears`` would not last, or blocks cannot be tuned as asked."""
    for linear in linears:
        if linear.expert is None and "weight" not in linear.module._parameters:
            raise ModelError(
                f"the weight of {linear.name} is computed from other parameters: make it one of its own first, by "
                "torch.nn.utils.prune.remove or torch.nn.utils.parametrize.remove_parametrizations"
            )
    by_loss = recipe.objective == "loss"  # which tells, and goes on without, where there are no gradients
    if recipe.tuning_epochs and not by_loss and any(parameter.is_inference() for parameter in model.parameters()):
        raise ModelError(
            "the model was made inside torch.inference_mode(), and has no gradients: make it outside, or leave out "
            "tuning_epochs"
        )


def _check_weights(model: PreTrainedModel) -> None:
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ModelError("the model has weights that are not in memory (offloaded, or on meta): load it whole")
    if len(places := {str(parameter.device) for parameter in model.parameters()}) > 1:
        raise ModelError(f"the model is spread over {', '.join(sorted(places))}: load it on one device, or the CPU")
    if getattr(model, "is_quantized", False) or any(parameter.itemsize < 2 for parameter in model.parameters()):
        raise ModelError(
            "the model is quantized, and its weights are codes: load it unquantized, prune it, then quantize the result"
        )
    for name, parameter in model.named_parameters():
        if is_traceable_wrapper_subclass(parameter):
            raise ModelError(
                f"{name} is a {type(parameter).__name__}, not a plain tensor: load the model without quantization, and "
                "whole in each process"
            )


def _check_names(model: PreTrainedModel) -> None:
    try:
        with torch.device("meta"):
            fresh = type(model)(copy.deepcopy(model.config))
    except (RuntimeError, TypeError):  # a class of the caller's, that takes other arguments, or reads its weights
        return
    own, wanted = ({name for name, _ in each.named_parameters(remove_duplicate=False)} for each in (model, fresh))
    # Some classes leave parts out by an argument (BERT its pooler): of what is not there, blocks alone would be missed.
    if odd := sorted((own - wanted) | {name for name in wanted - own if NUMBERED.search(name)}):
        which = "has" if odd[0] in own else "lacks"
        raise ModelError(
            f"what is written could not be loaded: the model {which} {odd[0]}, unlike {type(model).__name__} made from "
            f"its configuration ({len(odd)} names differ): unwrap its modules (torch.compile, adapters), or let its "
            "configuration say what was changed"
        )
