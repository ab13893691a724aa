"""Keep the zeros of a sparse model while it is fine-tuned.

Two hooks hold a weight at zero. Its gradient is zeroed as it arrives, so that clipping, momentum and Adam's moments
know nothing of it. And after each step of any optimizer of torch it is set to zero again, whatever that step did.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback

from optima.errors import ModelError, RecipeError
from optima.models.stacks import linears_of


class HeldZeros:
    """The zeros that are held: what ``hold_zeros`` returns.

    Attributes:
        keep: by the name of each held linear its mask, bool, shaped as the model stores the weight, True = survives.
    """

    def __init__(self, parameters: Mapping[str, Tensor], keep: Mapping[str, Tensor]) -> None:
        self.keep = dict(keep)
        self._parameters = dict(parameters)
        # A frozen weight takes no hook; should it be thawed, the step's hook still holds its zeros.
        trained = (name for name in self.keep if self._parameters[name].requires_grad)
        self._hooks: list[RemovableHandle] = [
            self._parameters[name].register_hook(lambda gradient, name=name: self._masked(name, gradient))
            for name in trained
        ]
        self._hooks.append(register_optimizer_step_post_hook(lambda *_: self.apply()))
        self.apply()

    @torch.no_grad()
    def apply(self) -> None:
        """Set to zero what is not kept: needed after changes outside an optimizer, such as merging an adapter."""
        for name in self.keep:
            parameter = self._parameters[name]
            parameter.copy_(self._masked(name, parameter))

    def remove(self) -> None:
        """Hold nothing any more; the weights stay as they are."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _masked(self, name: str, tensor: Tensor) -> Tensor:
        if self.keep[name].device != tensor.device:  # the model has moved
            self.keep[name] = self.keep[name].to(tensor.device)
        return torch.where(self.keep[name], tensor, 0.0)


def hold_zeros(model: nn.Module, keep: Mapping[str, Tensor] | None = None) -> HeldZeros:
    """Hold the zeros of the model's linears from now on, through training by any optimizer of torch.

    The masks cost a byte a weight. Training in one process, or in several that each hold the whole model, is covered;
    training that splits or flattens weights (FSDP, DeepSpeed's third stage) is not.

    Args:
        model: a sparse model; its parameters must stay the same objects, as they do in ``model.to``.
        keep: masks by the name of their linear, with or without ``.weight``: bool, shaped as the model stores the
            weight, True = survives; what does not survive becomes zero at once. Without it a mask is inferred, on
            purpose: weights of linears that are exactly zero now. A linear of nothing but zeros (an adapter before
            training) is left alone, and so is one that shares the weight of an embedding.

    Returns:
        A handle; its ``remove()`` ends the holding.

    Raises:
        ModelError: if there are no zeros to hold.
        RecipeError: if a mask fits no linear.
    """
    parameters = {linear.name.removeprefix("."): linear.parameter for linear in linears_of(model, "")}
    if keep is None:
        embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
        own = {name: p for name, p in parameters.items() if id(p) not in embeddings and p.is_floating_point()}
        masks = {name: parameter.detach() != 0 for name, parameter in own.items()}
        found = {name: mask for name, mask in masks.items() if mask.any() and not mask.all()}
        if not found:
            raise ModelError(
                f"no linear of this {type(model).__name__} has zeros to hold: prune it first, or give masks"
            )
    else:
        found = {name.removesuffix(".weight"): mask for name, mask in keep.items()}
        _check(found, parameters)
    return HeldZeros(parameters, found)


def _check(keep: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
    for name, mask in keep.items():
        if name not in parameters:
            raise RecipeError(f"keep names {name}, and the model has no such linear: it has {', '.join(parameters)}")
        shape = tuple(parameters[name].shape)
        if mask.dtype != torch.bool or tuple(mask.shape) != shape:
            raise RecipeError(
                f"the mask of {name} is {mask.dtype} of shape {tuple(mask.shape)}: give bool of shape {shape}, True "
                "where the weight survives"
            )


class HoldZeros(TrainerCallback):
    """Hold the zeros of the model that a ``transformers.Trainer`` trains, from its first step to its last.

    Args:
        keep: see ``hold_zeros``.
    """

    def __init__(self, keep: Mapping[str, Tensor] | None = None) -> None:
        self.keep = keep
        self.held: HeldZeros | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Begin to hold."""
        self.on_train_end(args, state, control)  # of a training that was broken off
        self.held = hold_zeros(others["model"], self.keep)

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """For optimizers that are not torch's."""
        if self.held is not None:
            self.held.apply()

    def on_train_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Let go."""
        if self.held is not None:
            self.held.remove()
            self.held = None
