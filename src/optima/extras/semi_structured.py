"""Run the 2:4 linears of a model on the sparse tensor cores of an NVIDIA GPU, through PyTorch's own kernels.

Shapes: O outputs, D inputs, G groups of four inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.sparse import to_sparse_semi_structured

from optima.errors import ModelError

DTYPES = (torch.float16, torch.bfloat16)
# Multiples that both of PyTorch's backends (CUTLASS, cuSPARSELt) take in these types.
OUTPUTS, INPUTS = 32, 64
CAPABILITY = (8, 0)  # Ampere, the first with sparse tensor cores


@dataclass(frozen=True)
class Accelerated:
    """What ``accelerate`` did: the linears on sparse tensor cores, and of every other one why it stays dense."""

    linears: tuple[str, ...]
    skipped: dict[str, str]

    def __str__(self) -> str:
        return f"{len(self.linears)} linears on sparse tensor cores, {len(self.skipped)} stay dense"


def accelerate(model: nn.Module) -> Accelerated:
    """Convert every ``nn.Linear`` that really is 2:4 to PyTorch's semi-structured format, in place, for inference.

    Large batches and prompts gain; a single token does not. The model cannot be saved or trained afterwards. Experts in
    fused parameters stay dense.

    Args:
        model: on a CUDA device of compute capability 8.0 or later, in float16 or bfloat16.

    Raises:
        ModelError: without such a device, or where no linear fits; nothing has been changed then.
    """
    check_device(next(model.parameters()).device)
    linears = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    skipped = {name: reason for name, module in linears.items() if (reason := _why_dense(module.weight))}
    if len(skipped) == len(linears):
        reasons = "; ".join(sorted(set(skipped.values()))) or "it has none"
        raise ModelError(f"no linear of this {type(model).__name__} can run on sparse tensor cores: {reasons}")
    converted = tuple(name for name in linears if name not in skipped)
    for name in converted:
        weight_OD = linears[name].weight.detach().contiguous()
        linears[name].weight = nn.Parameter(to_sparse_semi_structured(weight_OD), requires_grad=False)
    return Accelerated(converted, skipped)


def _why_dense(weight_OD: Tensor) -> str:
    """Why a weight cannot be converted; empty if it can."""
    outputs, inputs = weight_OD.shape
    if weight_OD.dtype not in DTYPES:
        return f"{weight_OD.dtype}: load the model in bfloat16 or float16"
    if outputs % OUTPUTS or inputs % INPUTS:
        return f"{outputs} x {inputs}: the kernels take multiples of {OUTPUTS} x {INPUTS}"
    return "" if is_two_of_four(weight_OD) else "not 2:4: prune it with --pattern 2:4"


def is_two_of_four(weight_OD: Tensor) -> bool:
    """Whether at most two of every four consecutive inputs of each row are not zero."""
    if weight_OD.shape[1] % 4:
        return False
    kept_OG = (weight_OD.detach() != 0).unflatten(1, (-1, 4)).sum(dim=2)
    return bool((kept_OG <= 2).all())


def check_device(device: torch.device) -> None:
    """Raise ``ModelError`` unless a device has sparse tensor cores."""
    if device.type != "cuda":
        raise ModelError(f"sparse tensor cores are on a CUDA device and the model is on {device}: move it there first")
    if torch.cuda.get_device_capability(device) < CAPABILITY:
        raise ModelError(f"{torch.cuda.get_device_name(device)} has no sparse tensor cores: Ampere and later GPUs do")
