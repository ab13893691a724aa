"""Keep the zeros of a sparse model while it is fine-tuned.

Two hooks hold a weight at zero. Its gradient is zeroed as it arrives, so that clipping, momentum and Adam's moments
know nothing of it. And after each step of any optimizer of torch it is set to zero again, whatever that step did.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback

from optima.errors import ModelError, RecipeError
from optima.models.blocks import Linear, linears_of

_Place = tuple[int, str]  # a module's id, and the name of one of its parameters


class HeldZeros:
    """The zeros that are held: what ``hold_zeros`` returns.

    Args:
        linears: those that are held, by name.
        keep: the mask of each, see ``hold_zeros``.
    """

    def __init__(self, linears: Mapping[str, Linear], keep: Mapping[str, Tensor]) -> None:
        self._linears = dict(linears)
        self._zeros = _Zeros(linears.values())
        for name, mask in keep.items():
            self._part(name).copy_(mask)
        # A frozen weight takes no hook; should it be thawed, the step's hook still holds its zeros.
        parameters = {_place(linear): linear.parameter for linear in linears.values()}
        self._hooks: list[RemovableHandle] = [
            parameter.register_hook(partial(self._zeros.masked, place))
            for place, parameter in parameters.items()
            if parameter.requires_grad
        ]
        zeros = self._zeros  # not self: torch keeps such a hook for ever
        self._hooks.append(register_optimizer_step_post_hook(lambda *_: zeros.apply()))
        self.apply()

    @property
    def keep(self) -> dict[str, Tensor]:
        """By the name of each held linear its mask, bool, True = survives; shaped as ``hold_zeros`` says."""
        return {name: self._part(name) for name in self._linears}

    def apply(self) -> None:
        """Set to zero what is not kept: needed after changes outside an optimizer, such as merging an adapter."""
        self._zeros.apply()

    def remove(self) -> None:
        """Hold nothing any more; the weights stay as they are."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _part(self, name: str) -> Tensor:
        linear = self._linears[name]
        return part_of(linear, self._zeros.masks[_place(linear)])


class _Zeros:
    """The masks of parameters, by their places. It keeps no module alive, and no masks when all of them are gone."""

    def __init__(self, linears: Collection[Linear]) -> None:
        self._modules = {_place(linear): ref(_home(linear)[0]) for linear in linears}
        # Experts of one parameter have one mask together.
        self.masks = {_place(each): torch.ones_like(each.parameter, dtype=torch.bool) for each in linears}

    def masked(self, place: _Place, tensor: Tensor) -> Tensor:
        if self.masks[place].device != tensor.device:  # the model has moved
            self.masks[place] = self.masks[place].to(tensor.device)
        return torch.where(self.masks[place], tensor, 0.0)

    @torch.no_grad()
    def apply(self) -> None:
        there = {place: module for place, known in self._modules.items() if (module := known()) is not None}
        for place, module in there.items():
            parameter = getattr(module, place[1])
            parameter.copy_(self.masked(place, parameter))
        if not there:
            self.masks.clear()


def _home(linear: Linear) -> tuple[nn.Module, str]:
    """The module that has its weights, and their name there."""
    if linear.expert is not None:
        return linear.expert.experts.module, linear.expert.parameter
    return linear.module, "weight"


def _place(linear: Linear) -> _Place:
    module, name = _home(linear)
    return id(module), name


def part_of(linear: Linear, stored: Tensor) -> Tensor:
    """A linear's part of a tensor like its parameter: all of it, or an expert's, outputs x inputs; a view."""
    return stored if stored.ndim == 2 else linear.orient(stored)


def hold_zeros(model: nn.Module, keep: Mapping[str, Tensor] | None = None) -> HeldZeros:
    """Hold the zeros of the model's linears from now on, through training by any optimizer of torch.

    The masks cost a byte a weight. Training in one process, or in several that each hold the whole model, is covered;
    training that splits or flattens weights (FSDP, DeepSpeed's third stage) is not.

    Args:
        model: a sparse model; its parameters must stay the same objects, as they do in ``model.to``.
        keep: masks by the name of their linear, with or without ``.weight``: bool, shaped as the model stores the
            weight (of an expert in a fused parameter: outputs x inputs), True = survives; what does not survive
            becomes zero at once. Without it a mask is inferred, on
            purpose: weights of linears that are exactly zero now. A linear of nothing but zeros (an adapter before
            training) is left alone, and so is one that shares the weight of an embedding.

    Returns:
        A handle; its ``remove()`` ends the holding.

    Raises:
        ModelError: if there are no zeros to hold.
        RecipeError: if a mask fits no linear.
    """
    linears = {linear.name: linear for linear in linears_of(model, "")}
    parts = {name: part_of(linear, linear.parameter.detach()) for name, linear in linears.items()}
    if keep is None:
        embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
        own = [name for name, linear in linears.items() if id(linear.parameter) not in embeddings]
        zeros = {name: int((parts[name] == 0).sum()) for name in own if parts[name].is_floating_point()}
        found = {name: parts[name] != 0 for name, count in zeros.items() if 0 < count < parts[name].numel()}
    else:
        if not isinstance(keep, Mapping):
            raise RecipeError(f"keep is a {type(keep).__name__}: give masks by the names of their linears")
        found = {name.removesuffix(".weight"): mask for name, mask in keep.items()}
        if len(found) < len(keep):
            raise RecipeError("keep has two masks of one linear, with and without .weight: keep one")
        _check(found, parts)
    if not found:
        raise ModelError(f"no linear of this {type(model).__name__} has zeros to hold: prune it first, or give masks")
    return HeldZeros({name: linears[name] for name in found}, found)


def _check(keep: Mapping[str, Tensor], parts: Mapping[str, Tensor]) -> None:
    for name, mask in keep.items():
        if name not in parts:
            raise RecipeError(f"keep names {name}, and the model has no such linear: it has {', '.join(parts)}")
        shape = tuple(parts[name].shape)
        if not isinstance(mask, Tensor):
            raise RecipeError(f"the mask of {name} is a {type(mask).__name__}: give a tensor of torch")
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
