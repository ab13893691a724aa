"""Block tuning: gradient steps on the kept weights of a block, towards the dense block's outputs on dense inputs.

Adam (Kingma & Ba, arXiv 1412.6980) works on float32 masters of the block's weights, norms and biases. Each forward pass
rounds them to the checkpoint's dtype: what is tuned is what will be written. Masks stay, for masters are zero off keep
and get no gradient there. Some sequences are held out, and the weights of the epoch that is best on them are kept:
those from before the first one, if tuning does not help.

Shapes: L tokens in a sequence, T tokens, E hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.func import functional_call

from optima.calibration.streams import Piece, Streams
from optima.models.stacks import Block

HELD_OUT = 8  # one sequence of so many is held out
SMALLEST_ENERGY = 1e-12


@dataclass(frozen=True)
class Tuning:
    """How blocks are tuned.

    Attributes:
        epochs: passes over the sequences that are not held out.
        learning_rate: of Adam, at the start, relative to the root mean square of each tensor; it falls to 0 along a
            cosine. A step is one sequence.
    """

    epochs: int
    learning_rate: float


@dataclass(frozen=True)
class Tuned:
    """What became of a block.

    Attributes:
        held_out: mean error on the sequences that were held out, before the first epoch and after each.
        best: the epoch whose weights the block has; 0 for those before the first.
    """

    held_out: tuple[float, ...]
    best: int


def relative_error(found: Tensor, target: Tensor, weight_T: Tensor | None = None) -> Tensor:
    """The mean over tokens of ||found - target||^2 / ||target||^2, both (..., E), each times its weight."""
    target = target.float()
    error_T = ((found.float() - target).square().sum(dim=-1) / energy(target)).flatten()
    return error_T.mean() if weight_T is None else (error_T * weight_T.to(error_T)).mean()


def energy(target: Tensor) -> Tensor:
    """||target||^2 of each token, (...) for (..., E), and never 0."""
    return target.float().square().sum(dim=-1).clamp_min(SMALLEST_ENERGY)


def tune(
    block: Block,
    keeps: Mapping[str, Tensor],
    streams: Streams,
    targets: Sequence[Tensor],
    weights: Sequence[Tensor] | None,
    tuning: Tuning,
    device: torch.device,
) -> Tuned:
    """Tune a block in place.

    Args:
        block: pruned, on ``device``.
        keeps: keep_OD of its pruned linears by their full names.
        streams: what enters the pruned block.
        targets: of each batch, what the dense block makes of dense inputs.
        weights: of each batch's tokens in the error, (T,), of mean 1; None: all alike.
        tuning: how.
        device: where to compute.
    """
    with torch.inference_mode(False):
        masters = _masters(block, keeps)
    dtypes = {name: parameter.dtype for name, parameter in block.module.named_parameters()}
    pieces = streams.pieces(block)
    held = pieces[HELD_OUT - 1 :: HELD_OUT] or pieces[-1:]
    trained = [piece for piece in pieces if piece not in held]

    def error(piece: Piece) -> Tensor:
        batch, sample = piece
        if streams.sizes[batch][0] == 1:
            sample = None
        rounded = {name: master.to(dtypes[name]) for name, master in masters.items()}
        found = streams.run_piece(block, piece, device, partial(functional_call, block.module, rounded))
        target, weight_T = targets[batch], None if weights is None else weights[batch]
        if sample is not None:
            target = target[sample : sample + 1]
            weight_T = None if weight_T is None else weight_T.reshape(streams.sizes[batch])[sample]
        return relative_error(found, target.to(device), weight_T)

    def on_held_out() -> float:
        return sum(float(error(piece)) for piece in held) / len(held)

    kept, history, best = dict[str, Tensor](), [on_held_out()], 0
    groups = [{"params": [master], "lr": tuning.learning_rate * _size(master)} for master in masters.values()]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95), fused=True)
    steps = max(tuning.epochs * len(trained), 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 * (1.0 + math.cos(math.pi * step / steps)))
    generator = torch.Generator().manual_seed(0)
    for epoch in range(tuning.epochs if trained else 0):
        for index in torch.randperm(len(trained), generator=generator).tolist():
            with torch.inference_mode(False), torch.enable_grad():
                error(trained[index]).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        history.append(on_held_out())
        if history[-1] < min(history[:-1]):
            best, kept = epoch + 1, {name: master.detach().clone() for name, master in masters.items()}
    for name, parameter in block.module.named_parameters():
        if name in kept:
            parameter.detach().copy_(kept[name])
    return Tuned(tuple(history), best)


@torch.no_grad()
def _size(master: Tensor) -> float:
    """Root mean square of what is not zero: models differ by much in the size of their weights."""
    return math.sqrt(float(master.square().sum()) / max(int(master.count_nonzero()), 1))


def _masters(block: Block, keeps: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Float32 copies of what is tuned, by name: pruned weights, and vectors such as norms and biases."""
    pruned = {id(linear.parameter): linear for linear in block.linears if linear.name in keeps}
    masters = {}
    for name, parameter in block.module.named_parameters():
        linear = pruned.get(id(parameter))
        if linear is None and (parameter.ndim != 1 or not parameter.is_floating_point()):
            continue
        master = masters[name] = parameter.detach().float().clone().requires_grad_(True)
        if linear is not None:
            keep_like = torch.zeros_like(parameter, dtype=torch.bool)
            linear.orient(keep_like).copy_(keeps[linear.name])
            master.register_hook(partial(torch.mul, keep_like))
    return masters
