"""Mask-preserving fine-tuning: pruned weights stay zero.

The gradient of a pruned weight is zeroed as it arrives, so that clipping, momentum and Adam's moments do not see it,
and the weight is set to zero again after each step of any optimizer of torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from optima.errors import ModelError, RecipeError
from optima.models.blocks import Linear, linears_of


class PreservedMasks:
    """What ``preserve_masks`` returns.

    Attributes:
        keep: by the name of each linear its mask, bool, True = survives; shaped as ``preserve_masks`` says.
    """

    def __init__(self, linears: Mapping[str, Linear], keep: Mapping[str, Tensor]) -> None:
        # parameter -> [mask], which moves with the model; experts of one parameter have one mask together. The keys are
        # weak, for torch keeps the hook of the step for ever.
        masks = self._masks = WeakTensorKeyDictionary()
        self.keep: dict[str, Tensor] = {}
        for name, mask in keep.items():
            parameter = linears[name].parameter
            if parameter not in masks:
                masks[parameter] = [torch.ones_like(parameter, dtype=torch.bool)]
            self.keep[name] = _part_of(linears[name], masks[parameter][0])
            self.keep[name].copy_(mask)
        # A frozen weight takes no hook; if it is trained later, the hook of the step still keeps its zeros.
        trained = [parameter for parameter in masks if parameter.requires_grad]
        self._hooks: list[RemovableHandle] = [each.register_hook(partial(_masked, masks[each])) for each in trained]
        self._hooks.append(register_optimizer_step_post_hook(lambda *_: _apply(masks)))
        self.apply()

    def apply(self) -> None:
        """Set pruned weights to zero: needed after changes outside an optimizer, such as merging an adapter."""
        _apply(self._masks)

    def remove(self) -> None:
        """Remove the hooks; the weights stay as they are."""
        for hook in self._hooks:
            hook.remove()


def _masked(masks: list[Tensor], tensor: Tensor) -> Tensor:
    masks[0] = masks[0].to(tensor.device)
    return torch.where(masks[0], tensor, 0.0)


@torch.no_grad()
def _apply(masks: WeakTensorKeyDictionary) -> None:
    for parameter, own in masks.items():
        parameter.copy_(_masked(own, parameter))


def _part_of(linear: Linear, stored: Tensor) -> Tensor:
    """A linear's part of a tensor like its parameter: all of it, or an expert's, outputs x inputs; a view."""
    return stored if stored.ndim == 2 else linear.orient(stored)


def preserve_masks(model: nn.Module, keep: Mapping[str, Tensor] | None = None) -> PreservedMasks:
    """Keep pruned weights at zero from now on, through training by any optimizer of torch.

    The masks cost a byte a weight. Training in one process, or in several that each have the whole model, is covered;
    training that splits or flattens weights (FSDP, DeepSpeed's third stage) is not.

    Args:
        model: a sparse model; its parameters must stay the same objects, as they do in ``model.to``.
        keep: masks by the name of their linear, with or without ``.weight``: bool, shaped as the model stores the
            weight (of an expert in a fused parameter: outputs x inputs), True = survives; what does not survive
            becomes zero at once. Without it, weights of linears that are exactly zero now are pruned, except in
            linears of nothing but zeros (adapters before training) and those that share the weight of an embedding.

    Returns:
        A handle; its ``remove()`` ends it.

    Raises:
        ModelError: if there are no zeros.
        RecipeError: if a mask fits no linear.
    """
    linears = {linear.name: linear for linear in linears_of(model, "")}
    stored = {name: _part_of(linear, linear.parameter.detach()) for name, linear in linears.items()}
    if keep is None:
        embeddings = {module.weight.data_ptr() for module in model.modules() if isinstance(module, nn.Embedding)}
        masks = {name: weight != 0 for name, weight in stored.items() if weight.data_ptr() not in embeddings}
        masks = {name: mask for name, mask in masks.items() if mask.any() and not mask.all()}
    else:
        masks = {name.removesuffix(".weight"): mask for name, mask in keep.items()}
    if not masks:
        raise ModelError(f"no linear of this {type(model).__name__} has zeros: prune it first, or pass masks")
    for name, mask in masks.items():
        if name not in stored:
            raise RecipeError(f"keep names {name}, and the model has no such linear: it has {', '.join(stored)}")
        shape = tuple(stored[name].shape)
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or tuple(mask.shape) != shape:
            raise RecipeError(f"the mask of {name} must be a bool tensor of shape {shape}, True = survives")
    return PreservedMasks(linears, masks)
