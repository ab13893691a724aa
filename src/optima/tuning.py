"""Block tuning: gradient steps on the kept weights of a block, towards the dense block's outputs on dense inputs.

Adam (Kingma & Ba, arXiv 1412.6980) works on float32 masters of the block's weights, norms and biases. Each forward pass
rounds them to the checkpoint's dtype: what is tuned is what will be written. Masks stay, for masters are zero off keep
and get no gradient there. Some sequences are held out, and the weights of the epoch that is best on them are kept:
those from before the first one, if tuning does not help.

Shapes: L tokens in a sequence, T tokens, E hidden size.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol, Self

import torch
from torch import Tensor, nn
from torch.func import functional_call

from optima.calibration.halving import rows_of
from optima.calibration.probe import hidden_of
from optima.calibration.reduction import Sequences, at_first
from optima.calibration.streams import Look, Piece, Streams
from optima.calibration.tempering import LossWeights
from optima.calibration.words import Words
from optima.device import GRADIENT, backward_explained, differentiable, full_precision, one_memory_error
from optima.distributed import Ranks
from optima.errors import ModelError
from optima.linalg.finite import all_finite
from optima.models.routers import module_around
from optima.models.stacks import Block, Linear

HELD_OUT = 8  # one sequence of so many is held out
BACKTRACK = 0.25  # what is left of the learning rate after an epoch that made it worse
WORDS_RATE = 1.0 / 6.0  # of the learning rate, where the cost is the words of the model: they are overfitted sooner
ALIKE = 0.1  # by which the metric's diagonal is raised: what the sampled gradients did not show is not free
SMALLEST_ENERGY = 1e-12
BYTES_PER_TUNED = 28  # of a weight that is tuned: master, gradient, two moments, a copy
ONE_PIECE = (
    "blocks are not tuned: one sequence, or one batch that cannot be taken apart, is all that tuning takes; give more "
    "sequences, or a larger --tuning-share"
)
OUT_OF_MEMORY = "a block for which the device has no memory in tuning keeps the weights of its solve"


@dataclass(frozen=True)
class Tuning:
    """How blocks are tuned.

    Attributes:
        epochs: passes over the sequences that are not held out.
        learning_rate: of Adam, at the start, relative to the root mean square of each tensor; it falls to 0 along a
            cosine. A step is one sequence, or a batch that cannot be taken apart. An epoch that makes it worse is
            undone, and a quarter of the rate left.
        share: of the sequences that are taken, see ``calibration.swept.tuned_batches``.
    """

    epochs: int
    learning_rate: float
    share: float = 1.0


@dataclass(frozen=True)
class Tuned:
    """What became of a block.

    Attributes:
        held_out: mean error on the sequences that were held out, before the first epoch and after each.
        best: the epoch whose weights the block has; 0 for those before the first.
        problem: why it was not tuned although it was to be, as a report must tell it; else empty.
        words: whether that error is the divergence of the model's words.
        told: what else a report must tell of it.
    """

    held_out: tuple[float, ...]
    best: int
    problem: str = ""
    words: bool = False
    told: str = ""


class Cost(Protocol):
    """What it costs that a block's outputs are not those of the dense block."""

    def __call__(self, found: Tensor, target: Tensor, look: Look) -> Tensor:
        """The mean cost of what the block makes of a piece, where the dense block makes ``target`` of dense inputs."""

    def on(self, device: torch.device) -> Self:
        """The same, for what is on ``device``."""

    def gradient_scale(self, cost: float, tokens: int) -> float:
        """By what to multiply the cost of a piece of so many ``tokens``, about ``cost``, before its gradient is taken.

        Adam does not care, but float16 would lose it, and Adam's epsilon outweigh it. A power of two, which rounds
        nothing.
        """


@dataclass(frozen=True)
class BlockError:
    """A cost by the change of the outputs, in a metric.

    Not their relative change: in some models a few channels that hardly matter hold nearly all of the energy.

    Attributes:
        metric_EE: a token's change d costs d^T M d.
        weights: of the tokens of each batch, (T,), relative to each other; None: all alike.
    """

    metric_EE: Tensor
    weights: Sequence[Tensor] | None = None

    @classmethod
    def by_loss(cls, residual_EE: Tensor, weights: Sequence[Tensor] | None) -> BlockError:
        """To second order the loss: M = E g g^T, g its gradient at the outputs, the diagonal a little raised."""
        metric_EE = residual_EE + ALIKE * residual_EE.diag().diag()
        return cls(metric_EE / metric_EE.diagonal().mean(), weights)

    @classmethod
    def by_channel(cls, targets: Sequence[Tensor]) -> BlockError:
        """Each channel's change relative to its own energy."""
        energy_E = sum(target.float().square().flatten(0, -2).sum(dim=0) for target in targets)
        assert isinstance(energy_E, Tensor)
        count = sum(target.numel() for target in targets) / len(energy_E)
        return cls((count / len(energy_E) / energy_E.clamp_min(SMALLEST_ENERGY)).diag())

    def on(self, device: torch.device) -> BlockError:
        """See ``Cost``."""
        return replace(self, metric_EE=self.metric_EE.to(device))

    def gradient_scale(self, cost: float, tokens: int) -> float:
        """See ``Cost``: the gradient at the outputs, which goes as 1 / ``tokens``, is near ``GRADIENT`` then."""
        change = math.sqrt(cost / float(self.metric_EE.trace()))  # root mean square, were all channels alike
        gradient = 2.0 * change * float(self.metric_EE.diagonal().mean()) / tokens
        return 2.0 ** round(math.log2(GRADIENT / gradient)) if gradient > 0.0 else 1.0

    def __call__(self, found: Tensor, target: Tensor, look: Look | None = None) -> Tensor:
        """The mean cost over the tokens of ``found`` and ``target``, (..., E), each times its weight.

        Of a token that has several streams it is their mean. ``look``: whose they are; None: they all weigh the same.
        """
        weight_T = None
        if look is not None and self.weights is not None:
            weight_T = rows_of(self.weights[look.batch], look.part, look.samples)
        change_TE = (found.float() - target.float()).flatten(0, -2)
        fixed_TE = change_TE.detach()
        pull_TE = fixed_TE @ self.metric_EE.to(fixed_TE)
        cost_T = ((2.0 * change_TE - fixed_TE) * pull_TE).sum(dim=-1)  # M is symmetric: one product, not one more back
        if weight_T is None:
            return cost_T.mean()
        cost_TS = cost_T.reshape(len(weight_T), -1)
        return (cost_TS * weight_T.to(cost_T)[:, None]).mean()


def tune(
    block: Block,
    keeps: Mapping[str, Tensor],
    streams: Streams,
    targets: Sequence[Tensor],
    cost: Cost,
    tuning: Tuning,
) -> Tuned:
    """Tune a block in place.

    Args:
        block: pruned, on the device of ``streams``.
        keeps: keep_OD of its pruned linears by their full names.
        streams: what enters the pruned block.
        targets: of each batch, what the dense block makes of dense inputs.
        cost: what is minimised.
        tuning: how.

    Raises:
        ModelError: if the block has no gradients.
    """
    pieces = streams.pieces(block)
    held = pieces[HELD_OUT - 1 :: HELD_OUT] or pieces[-1:]
    trained = [piece for piece in pieces if piece not in held]
    if not trained:
        return Tuned((), 0, ONE_PIECE)
    with torch.inference_mode(False):
        masters = _masters(block, keeps)
    if any(other.is_inference() for name, other in block.module.named_parameters() if name not in masters):
        raise ModelError(f"{block.name} was made inside torch.inference_mode(), and has no gradients: make it outside")
    cost = cost.on(streams.device)
    error = _Error(block, streams, targets, cost, masters)
    history, best, rate = [error.mean(held)], 0, tuning.learning_rate
    kept = {name: master.detach().clone() for name, master in masters.items()}
    optimizer = _adam(masters)
    steps, step = tuning.epochs * len(trained), 0
    generator = torch.Generator().manual_seed(0)
    scale = cost.gradient_scale(history[0], _tokens(streams, trained[0]))
    for epoch in range(tuning.epochs):
        for index in torch.randperm(len(trained), generator=generator).tolist():
            for group in optimizer.param_groups:
                group["lr"] = group["size"] * rate * 0.5 * (1.0 + math.cos(math.pi * step / steps))
            with torch.inference_mode(False), torch.enable_grad(), differentiable(block.module):
                lost = error(trained[index], epoch)
                if not lost.requires_grad:
                    raise ModelError(
                        f"{block.name} cannot be tuned, for its output does not depend on its weights by a gradient: "
                        "set --tuning-epochs to 0"
                    )
                with backward_explained(block.name):
                    (lost * scale).backward()
            gradients = (master.grad for master in masters.values() if master.grad is not None)
            if all_finite(*gradients):  # one overflow would be in all later steps
                optimizer.step()
            optimizer.zero_grad()
            step += 1
        history.append(error.mean(held))
        if history[-1] < min(history[:-1]) and all_finite(*masters.values()):
            best = epoch + 1
            _copy(masters, kept)
        else:  # undone, and tried again in smaller steps
            _copy(kept, masters)
            optimizer, rate = _adam(masters), rate * BACKTRACK
    if best:
        _copy(kept, {name: parameter for name, parameter in block.module.named_parameters() if name in kept})
    return Tuned(tuple(history), best)


@dataclass(frozen=True)
class _Error:
    """The cost of what the block makes of a piece, its weights the masters rounded to their dtypes."""

    block: Block
    streams: Streams
    targets: Sequence[Tensor]
    cost: Cost
    masters: Mapping[str, Tensor]

    def __call__(self, piece: Piece, turn: int = 0) -> Tensor:
        module = self.block.module
        rounded = {name: master.to(module.get_parameter(name).dtype) for name, master in self.masters.items()}
        (batch, part), call = piece, partial(functional_call, module, rounded)
        found = hidden_of(self.streams.run(self.block, batch, part, call, looks=True))
        samples = self.streams.sizes[batch][0]
        target = rows_of(self.targets[batch], part, samples).to(self.streams.device)
        return self.cost(found, target, Look(batch, part, samples, turn))

    def mean(self, pieces: Sequence[Piece]) -> float:
        """Over several pieces, without gradients."""
        with torch.no_grad():
            return sum(float(self(piece)) for piece in pieces) / len(pieces)


def tune_at_first(
    block: Block,
    keeps: Mapping[str, Tensor],
    own: Sequences,
    tuning: Tuning,
    loss: LossWeights | None,
    words: Words | None = None,
) -> Tuned:
    """Tune a block in the first process, with the sequences of all, for what comes out must not depend on their number.

    Args:
        block: pruned, on its device in every process, which all have what came out behind it.
        keeps: see ``tune``.
        own: of this process.
        tuning: how.
        loss: what the loss feels of the block's outputs; None: channels count by their energy.
        words: who has the head, if that reads what leaves the block.
    """
    ranks, tuned = own.streams.ranks, None
    if words is not None:
        tuning = replace(tuning, learning_rate=WORDS_RATE * tuning.learning_rate)
        own = own._replace(streams=words.given(own.streams))
    every, told = at_first(block, own, given=words is not None), ""
    if every is not None:
        try:
            # Gradients are taken through the metric.
            with torch.inference_mode(False), full_precision(), one_memory_error():
                cost: AbstractContextManager[Cost]
                if words is not None:
                    beside = BYTES_PER_TUNED * sum(math.prod(linear.shape) for linear in block.linears)
                    place, told = words.place(every.streams, beside)
                    cost = words.error(every.streams, place)
                elif loss is not None:
                    cost = nullcontext(BlockError.by_loss(loss.residual[block.name], every.weights))
                else:
                    cost = nullcontext(BlockError.by_channel(every.targets))
            with full_precision(), one_memory_error(), cost as found:
                tuned = tune(block, keeps, every.streams, every.targets, found, tuning)
                tuned = replace(tuned, words=words is not None and bool(tuned.held_out), told=told)
        except torch.OutOfMemoryError:  # nothing of the block has changed yet
            tuned = Tuned((), 0, OUT_OF_MEMORY)
    tuned = ranks.share(tuned, 0)
    if tuned.best:
        share_tuned(block, keeps, ranks)
    return tuned


@torch.no_grad()
def _copy(source: Mapping[str, Tensor], destination: Mapping[str, Tensor]) -> None:
    for name, tensor in destination.items():
        tensor.detach().copy_(source[name]).add_(0.0)  # what is rounded to -0 becomes 0, as pruned weights are


def _tokens(streams: Streams, piece: Piece) -> int:
    batch, part = piece
    return len(range(part.start, part.stop)) * streams.sizes[batch][1]


def _adam(masters: Mapping[str, Tensor]) -> torch.optim.Adam:
    """A fresh optimizer; each group knows the size of its tensor."""
    groups = [{"params": [master], "size": size_of(master)} for master in masters.values()]
    return torch.optim.Adam(groups, betas=(0.9, 0.95), fused=True)


@torch.no_grad()
def size_of(master: Tensor) -> float:
    """Root mean square of what is not zero: models differ by much in the size of their weights."""
    return math.sqrt(float(master.square().sum()) / max(int(master.count_nonzero()), 1))


def changed(block: Block, pruned: Collection[str], tuned: bool = True) -> dict[str, nn.Parameter]:
    """What a run changes in a block, by its name there: ``pruned`` linears, and if it is ``tuned`` norms and biases.

    But for those of other blocks too, whose dense outputs would change as well, for biases of what is left dense, and
    for what else is in a router that is: no gradient tells how it would choose then.
    """
    routing = tuple(f"{root}." for root in _routers(block, pruned))
    weights = {id(linear.parameter) for linear in block.linears if linear.name in pruned}
    named = dict(block.module.named_parameters())

    def is_own_vector(name: str, parameter: nn.Parameter) -> bool:
        matrix = named.get(f"{name.removesuffix('bias')}weight", parameter) if name.endswith("bias") else parameter
        left_dense = matrix.ndim > 1 and id(matrix) not in weights
        own = name not in block.common and not name.startswith(routing)
        return parameter.ndim == 1 and parameter.is_floating_point() and own and not left_dense

    return {name: each for name, each in named.items() if id(each) in weights or (tuned and is_own_vector(name, each))}


def _routers(block: Block, pruned: Collection[str]) -> list[str]:
    """What routes in a block and is left dense, by its name there: a linear, or the module that it is a part of."""
    found = []
    for router in block.routers:
        around = module_around(router)
        root = f"{around}{router.removeprefix(around).partition('.')[0]}"
        found += [] if router in pruned else [root.removeprefix(f"{block.name}.")]
    return found


@torch.no_grad()
def share_tuned(block: Block, pruned: Collection[str], ranks: Ranks) -> None:
    """Bring what tuning changed in the first process to all."""
    if ranks.size > 1:
        own = {name: parameter.detach() for name, parameter in changed(block, pruned).items()}
        for name, tensor in ranks.from_first(lambda: own).items():
            own[name].copy_(tensor)


def _masters(block: Block, keeps: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of what is tuned, in float32 at least, by name."""
    pruned: defaultdict[int, list[Linear]] = defaultdict(list)  # one parameter may hold many experts
    for linear in block.linears:
        if linear.name in keeps:
            pruned[id(linear.parameter)].append(linear)
    masters = {}
    for name, parameter in changed(block, keeps).items():
        linears = pruned.get(id(parameter), [])
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        master = masters[name] = parameter.detach().to(dtype, copy=True).requires_grad_(True)
        if linears:
            keep_like = torch.zeros_like(master)  # a CPU multiplies by floats eight times as fast as by booleans
            for linear in linears:
                linear.orient(keep_like).copy_(keeps[linear.name])
            master.register_post_accumulate_grad_hook(partial(_mask_gradient, keep_like))
    return masters


def _mask_gradient(keep_like: Tensor, master: Tensor) -> None:
    assert master.grad is not None
    master.grad.mul_(keep_like)  # in place: a step is short, and memory for another gradient is a part of it
