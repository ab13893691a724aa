"""Run the 2:4 linears of a model on the sparse tensor cores of an NVIDIA GPU, through PyTorch's own kernels.

Shapes: O outputs, D inputs, G groups of four inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.sparse import to_sparse_semi_structured

from optima.errors import ModelError
from optima.models.blocks import linears_of

DTYPES = (torch.float16, torch.bfloat16)
# Multiples that both of PyTorch's backends (CUTLASS, cuSPARSELt) take in these types.
OUTPUTS, INPUTS = 32, 64
CAPABILITY = (8, 0)  # Ampere, the first with sparse tensor cores
NO_MODULE = "is no nn.Linear but part of another module: the kernels take none"


@dataclass(frozen=True)
class Accelerated:
    """What ``accelerate`` did: the linears on sparse tensor cores, and of every other one why it stays dense."""

    linears: tuple[str, ...]
    skipped: dict[str, str]

    def __str__(self) -> str:
        return f"{len(self.linears)} linears on sparse tensor cores, {len(self.skipped)} stay dense"


def accelerate(model: nn.Module) -> Accelerated:
    """Convert every linear that really is 2:4 to PyTorch's semi-structured format, in place, for inference.

    Large batches and prompts gain; a single token does not. The model cannot be saved or trained afterwards.

    Args:
        model: on a CUDA device of compute capability 8.0 or later, in float16 or bfloat16.

    Raises:
        ModelError: without such a device, or where no linear fits; nothing has been changed then.
    """
    check_device(next(model.parameters(), None))
    linears = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    skipped = {name: reason for name, module in linears.items() if (reason := why_not(module.weight)) is not None}
    fitting = [name for name in linears if name not in skipped]
    skipped |= {linear.name: NO_MODULE for linear in linears_of(model, "") if linear.name not in linears}
    if not fitting:
        first = {reason: f"{name} {reason}" for name, reason in reversed(skipped.items())}  # of each reason
        reasons = "; ".join(reversed(first.values())) or "it has none"
        raise ModelError(f"no linear of this {type(model).__name__} can run on sparse tensor cores: {reasons}")
    for name in fitting:
        weight_OD = linears[name].weight.detach().contiguous()
        linears[name].weight = nn.Parameter(to_sparse_semi_structured(weight_OD), requires_grad=False)
    return Accelerated(tuple(fitting), skipped)


def why_not(weight_OD: Tensor) -> str | None:
    """Why a weight cannot be converted, as a predicate of its name; None if it can."""
    outputs, inputs = weight_OD.shape
    if weight_OD.dtype not in DTYPES:
        return f"is {weight_OD.dtype}: load the model in bfloat16 or float16"
    if outputs % OUTPUTS or inputs % INPUTS:
        return f"is {outputs} x {inputs}: the kernels take multiples of {OUTPUTS} x {INPUTS}"
    if not is_two_of_four(weight_OD):
        return "is not 2:4: prune it with --pattern 2:4"
    return None


def is_two_of_four(weight_OD: Tensor) -> bool:
    """Whether at most two of every four consecutive inputs of each row are not zero."""
    if weight_OD.shape[1] % 4:
        return False
    kept_OG = (weight_OD.detach() != 0).unflatten(1, (-1, 4)).sum(dim=2)
    return bool((kept_OG <= 2).all())


def check_device(parameter: Tensor | None) -> None:
    """Raise ``ModelError`` unless the model of this parameter is on a device with sparse tensor cores."""
    where = None if parameter is None else parameter.device
    if where is None or where.type != "cuda":
        there = "" if torch.cuda.is_available() else ", and PyTorch sees none here"
        raise ModelError(
            f"sparse tensor cores are on a CUDA device and the model is on {where}: move it there first{there}"
        )
    capability = torch.cuda.get_device_capability(where)
    if capability < CAPABILITY:
        raise ModelError(
            f"{torch.cuda.get_device_name(where)} has compute capability {capability[0]}.{capability[1]}: sparse "
            f"tensor cores come with {CAPABILITY[0]}.{CAPABILITY[1]} (Ampere) and later"
        )
