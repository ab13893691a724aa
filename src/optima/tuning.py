"""Block tuning: gradient steps on the kept weights of a block, towards the dense block's outputs on dense inputs.

Adam (Kingma & Ba, arXiv 1412.6980) on float32 masters of the block's parameters; every forward pass rounds them to the
checkpoint's dtype, so that what is tuned is what is written. Masks stay: masters are zero off keep and get no gradient.

Shapes: B sequences in a batch, L tokens, E hidden size.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.func import functional_call

from optima.calibration.probe import hidden_of
from optima.calibration.streams import Streams
from optima.device import Stopwatch
from optima.models.stacks import Block

KIND = os.environ.get("T_KIND", "relative")
MIX = float(os.environ.get("T_MIX", "0.1"))
SPOW = float(os.environ.get("T_SPOW", "0.5"))
NORMS = os.environ.get("T_NORMS", "1") == "1"
ONE = os.environ.get("T_ONE", "0") == "1"


@dataclass(frozen=True)
class Tuning:
    """How a block is tuned.

    Attributes:
        epochs: passes over the calibration sequences.
        learning_rate: of Adam, at the start; it falls to 0 along a cosine.
        held_out: every so many-th batch is held out, to stop where its error is least.
    """

    epochs: int = 4
    learning_rate: float = 1e-4
    held_out: int = 8


@dataclass(frozen=True)
class Tuned:
    """What tuning did to a block.

    Attributes:
        held_out: the error on the held-out batches before the first epoch and after each.
        best: the epoch whose weights were kept; 0 for those before.
    """

    held_out: tuple[float, ...]
    best: int


def tune(
    block: Block,
    keeps: Mapping[str, Tensor],
    streams: Streams,
    targets: Sequence[Tensor],
    tuning: Tuning,
    device: torch.device,
    metric: Metric,
) -> Tuned:
    """Tune ``block`` in place."""
    dtype_of = {name: parameter.dtype for name, parameter in block.module.named_parameters()}
    linears = {id(linear.parameter): linear for linear in block.linears if linear.name in keeps}
    masters: dict[str, Tensor] = {}
    hooks = []
    for name, parameter in block.module.named_parameters():
        linear = linears.get(id(parameter))
        if linear is None and (parameter.ndim > 1 or not NORMS):
            continue
        masters[name] = parameter.detach().float().clone().requires_grad_(True)
        if linear is not None:
            keep = linear.orient(keeps[linear.name]) if keeps[linear.name].shape != parameter.shape else keeps[linear.name]
            hooks.append(masters[name].register_hook(partial(_masked, keep)))
    batches = range(len(streams.hidden))
    held = [batch for batch in batches if batch % tuning.held_out == tuning.held_out - 1]
    train = [batch for batch in batches if batch not in held]

    def error(batch: int) -> Tensor:
        values = {name: master.to(dtype_of[name]) for name, master in masters.items()}
        found = hidden_of(streams.run(block, batch, device, call=partial(functional_call, block.module, values)))
        return metric(found.float() - targets[batch].to(device).float(), targets[batch].to(device).float(), batch)

    def held_out() -> float:
        with torch.no_grad():
            return sum(float(error(batch)) for batch in held) / max(len(held), 1)

    optimizer = torch.optim.Adam(masters.values(), lr=tuning.learning_rate, fused=True, betas=(0.9, 0.95))
    steps = tuning.epochs * len(train)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / steps)))
    history, best = [held_out()], 0
    kept = {name: master.detach().clone() for name, master in masters.items()}
    generator = torch.Generator().manual_seed(0)
    for epoch in range(tuning.epochs):
        for index in torch.randperm(len(train), generator=generator).tolist():
            with torch.enable_grad():
                loss = error(train[index])
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        history.append(held_out())
        if history[-1] < min(history[:-1]):
            best = epoch + 1
            kept = {name: master.detach().clone() for name, master in masters.items()}
    parameters = dict(block.module.named_parameters())
    with torch.no_grad():
        for name, master in kept.items():
            parameters[name].copy_(master)
    return Tuned(tuple(history), best)


def _masked(keep: Tensor, gradient: Tensor) -> Tensor:
    return gradient * keep


Metric = Callable[[Tensor, Tensor, int], Tensor]


def make_metric(residual: Tensor | None, tokens: Sequence[Tensor] | None, device: torch.device) -> Metric:
    """experimental"""
    if KIND == "relative" or residual is None:
        return lambda error, target, batch: (
            error.square().sum(-1) / target.square().sum(-1).clamp_min(1e-12)
        ).mean()
    F = residual.to(device).double()
    weights = [t.pow(SPOW) for t in tokens]
    mean = sum(float(w.sum()) for w in weights) / sum(w.numel() for w in weights)
    weights = [(w / mean).to(device) for w in weights]
    if KIND == "diag":
        r = F.diagonal()
        r = (r / r.mean()).pow(float(os.environ.get("T_RPOW", "1"))).float()
        return lambda error, target, batch: ((error.square() * r).sum(-1) * weights[batch]).mean()
    ev, V = torch.linalg.eigh(F)
    ev = (ev.clamp_min(0) / ev.mean()).pow(float(os.environ.get("T_RPOW", "1"))) + MIX
    root = (V * ev.sqrt()).float()
    return lambda error, target, batch: ((error @ root).square().sum(-1) * weights[batch]).mean() / 100
