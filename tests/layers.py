"""Layers that tests of selectors are run on."""

from __future__ import annotations

import torch
from torch import Tensor

from optima.qp import Hessian
from optima.selectors.base import Layer

DAMPING = 0.01


def make_layer(
    outputs: int = 20, inputs: int = 48, dead: tuple[int, ...] = (), dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """(weight_OD, inputs_TD): correlated inputs on scales that differ a hundredfold."""
    generator = torch.Generator().manual_seed(outputs * inputs)
    mixing_DD = torch.randn(inputs, inputs, generator=generator, dtype=torch.float64) / inputs**0.5
    inputs_TD = torch.randn(200, inputs, generator=generator, dtype=torch.float64) @ (torch.eye(inputs) + mixing_DD)
    inputs_TD *= torch.logspace(-1, 1, inputs, dtype=torch.float64)[torch.randperm(inputs, generator=generator)]
    inputs_TD[:, list(dead)] = 0
    weight_OD = torch.randn(outputs, inputs, generator=generator, dtype=torch.float64)
    return weight_OD.to(dtype), inputs_TD


def hessian_of(inputs_TD: Tensor, damping: float = DAMPING) -> Hessian:
    return Hessian(inputs_TD.T @ inputs_TD / len(inputs_TD), damping)


def layer_of(weight_OD: Tensor, inputs: Tensor | Hessian, damping: float = DAMPING, name: str = "linear") -> Layer:
    """A layer from its weight and its inputs (T x D), or their Hessian."""
    return Layer(name, weight_OD, inputs if isinstance(inputs, Hessian) else hessian_of(inputs, damping))
