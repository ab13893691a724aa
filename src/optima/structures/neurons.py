"""MLP neurons: where a block has them, what they cost, and its tensors with fewer of them.

Shapes: W neurons, C copies of a neuron in one linear (gate and up), O outputs, D inputs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from optima.errors import ModelError
from optima.models.blocks import Block, Linear, is_expert, linears_of
from optima.models.channels import Channels, find_channels


def find_neurons(block: Block) -> Channels:
    """The neurons of the block's MLP.

    Raises:
        ModelError: if the block has experts, or no MLP whose neurons are its reader's inputs one by one.
    """
    if any(is_expert(linear) for linear in linears_of(block.module, block.name)):
        raise ModelError(f"{block.name} is a mixture of experts: --neurons removes those of one MLP in each block")
    found = [channels for group in find_channels(block, None) for channels in group if channels.kind == "mlp"]
    if len(found) != 1:
        raise ModelError(f"{block.name} has {len(found)} MLPs with known linears, and --neurons needs one")
    return found[0]


def smaller_tensors(
    block: Block, neurons: Channels, keep_W: Tensor, weight_OD: Tensor | None = None
) -> dict[str, Tensor]:
    """The tensors of the MLP without the other neurons, by their names in the block.

    Args:
        block: dense.
        neurons: of its MLP.
        keep_W: boolean, True = the neuron survives.
        weight_OD: new weights of the reader; None: its own.
    """
    linears = {linear.name: linear for linear in linears_of(block.module, block.name)}
    found, kept_A = dict[str, Tensor](), keep_W.cpu().nonzero()[:, 0]
    for name, index_HCW in neurons.writers.items():
        linear = linears[name]
        rows = index_HCW[0][:, kept_A].flatten().to(linear.parameter.device)
        weight = linear.read()[rows]
        found |= _named(block, linear, weight)
        bias = linear.module.bias
        if isinstance(bias, Tensor):
            found[f"{name.removeprefix(f'{block.name}.')}.bias"] = bias.detach()[rows]
    reader = linears[neurons.reader]
    weight_OD = reader.read() if weight_OD is None else weight_OD
    return found | _named(block, reader, weight_OD[:, kept_A.to(weight_OD.device)])


def _named(block: Block, linear: Linear, weight_OD: Tensor) -> dict[str, Tensor]:
    name = f"{linear.name.removeprefix(f'{block.name}.')}.weight"
    return {name: linear.orient(weight_OD).contiguous()}


def metric_root(rows_O: Tensor | None, coupling_OO: Tensor | None, outputs: int) -> Tensor:
    """R of the metric of a linear's rows, G = R^T R, float64: their Fisher weights and correlations."""
    root_O = torch.ones(outputs, dtype=torch.float64) if rows_O is None else rows_O.double().cpu().clamp_min(0.0).sqrt()
    if coupling_OO is None:
        return root_O.diag()
    factor_OO = torch.linalg.cholesky(coupling_OO.double().cpu())
    root_OO: Tensor = factor_OO.mT * root_O
    return root_OO


def energy_removed(second_D: Tensor, weight_OD: Tensor, root_OO: Tensor, keep_D: Tensor) -> float:
    """The share of sum_j H_jj w_j^T G w_j at the removed inputs."""
    energy_D = (root_OO.to(weight_OD.device) @ weight_OD.double()).square().sum(dim=0) * second_D.to(weight_OD.device)
    total = float(energy_D.sum())
    return float(energy_D[~keep_D].sum()) / total if total and math.isfinite(total) else 0.0
