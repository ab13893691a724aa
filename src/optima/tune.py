"""Block tuning (block-wise reconstruction): Adam on the kept weights of a block, towards the dense block's output.

Adam (Kingma & Ba, arXiv 1412.6980) updates float32 masters of the block's weights, norms and biases. Each forward pass
rounds them to the checkpoint's dtype, so the weights that are tuned are the weights that are written. Masks stay:
masters are zero off keep, and their gradients are masked. One sequence of eight is held out, and the weights of the
epoch with the least held-out error are kept: the initial ones, if no epoch improves on them.

Tuning is data-parallel. The sequences of a step depend on the seed alone. Each rank runs those of them that it has;
gradients and held-out errors are all-reduced, and every rank takes the same step. So any number of ranks takes the same
steps up to rounding. With more than ``STEP`` ranks some are idle in each step.

Shapes: T tokens, E hidden size, S hidden states of a token.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, pairwise, zip_longest

import torch
from torch import Tensor, nn
from torch.func import functional_call

from optima.calibration.activations import Activations, Microbatch
from optima.calibration.fisher import chosen_batches
from optima.calibration.lm_head import LmHead, LogitsError
from optima.calibration.weights import FisherWeights
from optima.core.products import all_finite
from optima.device import GRADIENT, Stopwatch, backward_explained, full_precision, one_memory_error
from optima.distributed import Ranks
from optima.errors import ModelError
from optima.models.blocks import Block, Linear, routing_module
from optima.models.forward import differentiable, hidden_of, rows_of
from optima.models.offload import Weights
from optima.recipe import RunOptions

HELD_OUT = 8  # one sequence of so many is held out
STEP = 4  # sequences of a step, over all ranks
# Rate and betas of Adam for one sequence a step, scaled to STEP of them (Malladi et al., arXiv 2205.10287)
STEP_RATE = math.sqrt(STEP)
BETAS = (1.0 - STEP * 0.1, 1.0 - STEP * 0.05)
BACKTRACK = 0.25  # what is left of the learning rate after an epoch that made it worse
LOGITS_RATE = 1.0 / 6.0  # of the learning rate, where the cost is KL of the logits, which overfits sooner
ALIKE = 0.1  # by which the metric's diagonal is raised: what the sampled gradients did not show is not free
SEEDS = 2**20  # blocks of a run have generators of their own
ONE_SEQUENCE = "blocks are not tuned: tuning needs at least two sequences; give more calibration sequences"
OUT_OF_MEMORY = "block tuning ran out of device memory: such a block keeps the weights of its solve"


@dataclass(frozen=True)
class Tuning:
    """How blocks are tuned.

    Attributes:
        epochs: passes over the sequences that are not held out.
        learning_rate: of Adam with one sequence a step, relative to the root mean square of each tensor; it falls to 0
            along a cosine. An epoch that increases the held-out error is undone, and the rate is cut to a quarter.
        seed: of the order of the sequences, with the index of the block.
    """

    epochs: int
    learning_rate: float
    seed: int = 0


@dataclass(frozen=True)
class Tuned:
    """The outcome of tuning a block.

    Attributes:
        held_out: mean error on the held-out sequences of all ranks, before the first epoch and after each.
        best: the epoch whose weights the block has; 0: those from before the first.
        problem: why the block was not tuned, for the report; empty if it was.
        on_logits: whether the error is the KL divergence of the model's logits.
    """

    held_out: tuple[float, ...]
    best: int
    problem: str = ""
    on_logits: bool = False


@dataclass(frozen=True)
class BlockError:
    """The cost of a change of a block's outputs, in a metric.

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

    def gradient_scale(self, cost: float, tokens: int) -> float:
        """What brings the gradient at the outputs near ``GRADIENT``, for microbatches of ``tokens`` that cost ``cost``.

        Adam does not care, but float16 would lose it, and Adam's epsilon outweigh it. A power of two, which rounds
        nothing.
        """
        trace = float(self.metric_EE.trace())
        change = math.sqrt(cost / trace) if cost > 0.0 < trace else 0.0  # root mean square, were all channels alike
        gradient = 2.0 * change * float(self.metric_EE.diagonal().mean()) / tokens
        return 2.0 ** round(math.log2(GRADIENT / gradient)) if 0.0 < gradient < math.inf else 1.0

    def __call__(self, found: Tensor, target: Tensor, microbatch: Microbatch | None = None, epoch: int = 0) -> Tensor:
        """The mean cost over the tokens of ``found`` and ``target``, (..., E), each times its weight.

        A token with several hidden states counts with their mean.

        Args:
            found: the block's outputs.
            target: those of the dense block.
            microbatch: the sequences of ``found`` and ``target``; None: all tokens weigh the same.
            epoch: unused.
        """
        change_TE = (found.float() - target.float()).flatten(0, -2)
        fixed_TE = change_TE.detach()
        pull_TE = fixed_TE @ self.metric_EE.to(fixed_TE)
        cost_T = ((2.0 * change_TE - fixed_TE) * pull_TE).sum(dim=-1)  # M is symmetric: one product, not one more back
        if microbatch is None or self.weights is None:
            return cost_T.mean()
        weight_T = rows_of(self.weights[microbatch.batch], microbatch.rows, microbatch.samples)
        cost_TS = cost_T.reshape(len(weight_T), -1)
        return (cost_TS * weight_T.to(cost_T)[:, None]).mean()


@dataclass
class Tuner:
    """Tunes the blocks of a stack towards the dense blocks' outputs.

    Attributes:
        tuning: how.
        batches: those that blocks are tuned on.
        dense: dense inputs of these batches.
        fisher: gives the metric at each block's outputs, and the weights of tokens.
        head: the LM head, by whose logits the last block is tuned; None: it is tuned as the others.
        skipped, weights: see ``skip``.
        at: the dense block that gives the targets.
    """

    tuning: Tuning
    batches: list[int]
    dense: Activations
    fisher: FisherWeights
    head: LmHead | None
    skipped: list[Block] = field(default_factory=list)
    weights: Weights = field(default_factory=Weights)
    at: str = ""

    def skip(self, blocks: Sequence[Block], weights: Weights) -> None:
        """The smaller model lacks ``blocks``: the block before them is tuned to the output of the last of them."""
        self.skipped, self.weights = list(blocks), weights

    def forward(self, block: Block, clock: Stopwatch) -> None:
        """Advance the dense inputs to the outputs of the dense ``block``, which are the targets."""
        with clock("forward"):
            self.dense.forward(block)
        self.at, last = block.name, block.index
        for each in self.skipped:
            if each.index == last + 1:
                with self.weights.on(each, self.dense.device, clock), clock("forward"):
                    self.dense.forward(each)
                self.at, last = each.name, each.index

    def tune(
        self,
        block: Block,
        keeps: Mapping[str, Tensor | None],
        solutions: dict[str, Tensor],
        acts: Activations,
        clock: Stopwatch,
    ) -> Tuned:
        """Tune a block with the inputs ``acts``; a block that is out of memory stays as it is. See ``tune``."""
        head = self.head if self.head is not None and block.name == self.head.stack.blocks[-1].name else None
        tuning, part, targets = self.tuning, acts.part(self.batches), self.dense.hidden
        cost: BlockError | LogitsError
        try:
            with clock("tune" if head is None else "logits"), full_precision(), ExitStack() as stack:
                stack.enter_context(one_memory_error())
                with acts.ranks.raised_on_all(torch.OutOfMemoryError), one_memory_error():
                    if head is not None:
                        tuning = replace(tuning, learning_rate=LOGITS_RATE * tuning.learning_rate)
                        cost = stack.enter_context(head.error(part))
                    else:
                        tokens = self.fisher.tokens.get(self.at)
                        weights = None if tokens is None else [tokens[batch] for batch in self.batches]
                        cost = BlockError.by_loss(self.fisher.residual[self.at].to(acts.device), weights)
                tuned = tune(block, keeps, part, targets, cost, tuning, solutions)
        except torch.OutOfMemoryError:  # nothing of the block has changed yet
            return Tuned((), 0, OUT_OF_MEMORY)
        return replace(tuned, on_logits=head is not None and bool(tuned.held_out))


def make_tuner(
    acts: Activations, fisher: FisherWeights | None, head: LmHead | None, options: RunOptions
) -> Tuner | None:
    """A tuner of the stack that ``acts`` enters; None if its blocks are not tuned."""
    if not options.tuning_epochs or fisher is None:
        return None
    tuning = Tuning(options.tuning_epochs, options.learning_rate, options.seed)
    batches = chosen_batches(acts, options.tuning_fraction, tuned=True)
    return Tuner(tuning, batches, acts.part(batches), fisher, head)


def tune(
    block: Block,
    keeps: Mapping[str, Tensor | None],
    acts: Activations,
    targets: Sequence[Tensor],
    cost: BlockError | LogitsError,
    tuning: Tuning,
    solutions: dict[str, Tensor] | None = None,
) -> Tuned:
    """Tune a block in place. All ranks of ``acts`` call it, and end with the same weights.

    Args:
        block: pruned, on the device of ``acts``.
        keeps: of the linears to tune, by their full names: keep_OD, or None where all weights are tuned.
        acts: inputs of the pruned block, for the sequences of this rank.
        targets: of each batch, the output of the dense block on dense inputs.
        cost: what is minimised.
        tuning: how.
        solutions: weights of linears before rounding, where they were solved: masters start there. It is emptied.

    Raises:
        ModelError: if the block has no gradients.
    """
    count = sum(acts.counts)  # sequences are numbered over all ranks
    if count < 2:
        return Tuned((), 0, ONE_SEQUENCE)
    held_out = [*range(HELD_OUT - 1, count, HELD_OUT)] or [count - 1]
    trained = [number for number in range(count) if number not in held_out]
    numbered, masters = acts.numbered(), _masters(block, keeps, solutions or {})

    def error(number: int, epoch: int = 0) -> Tensor:
        batch, rows, samples = microbatch = numbered[number]
        rounded = {name: master.to(block.module.get_parameter(name).dtype) for name, master in masters.items()}
        found = hidden_of(acts.run(block, batch, rows, partial(functional_call, block.module, rounded)))
        return cost(found, rows_of(targets[batch], rows, samples).to(acts.device), microbatch, epoch)

    def held_out_error() -> float:
        with torch.no_grad(), acts.ranks.raised_on_all(torch.OutOfMemoryError), one_memory_error():
            errors = [float(error(number)) for number in held_out if number in numbered]
        return sum(chain(*acts.ranks.gather(errors))) / len(held_out)

    rate = tuning.learning_rate * STEP_RATE
    best, kept = 0, {name: master.detach().clone() for name, master in masters.items()}
    optimizer = _adam(masters)
    generator = torch.Generator().manual_seed(tuning.seed * SEEDS + block.index)
    epochs = [_steps(trained, generator) for _ in range(tuning.epochs)]
    history, steps, step = [held_out_error()], sum(map(len, epochs)), 0
    scale = cost.gradient_scale(history[0], acts.length)
    for epoch, chosen in enumerate(epochs):
        for numbers in chosen:
            for group in optimizer.param_groups:
                group["lr"] = group["size"] * rate * 0.5 * (1.0 + math.cos(math.pi * step / steps))
            own = (error(number, epoch) * scale for number in numbers if number in numbered)
            with acts.ranks.raised_on_all(torch.OutOfMemoryError), one_memory_error():
                _backward(own, block)
            _all_reduce_gradients(masters, len(numbers), acts.ranks)
            if all_finite(*(master.grad for master in masters.values() if master.grad is not None)):
                optimizer.step()  # without one that overflowed, which would spoil Adam's moments
            optimizer.zero_grad()
            step += 1
        history.append(held_out_error())
        if history[-1] < min(history[:-1]) and all_finite(*masters.values()):
            best = epoch + 1
            _copy(masters, kept)
        else:
            _copy(kept, masters)
            optimizer, rate = _adam(masters), rate * BACKTRACK
    if best:
        _copy(kept, {name: parameter for name, parameter in block.module.named_parameters() if name in kept})
    return Tuned(tuple(history), best)


def _steps(sequences: Sequence[int], generator: torch.Generator) -> list[list[int]]:
    """The sequences of each step of an epoch, in random order.

    They are split into ``STEP`` contiguous parts, and a step has one of each: so two or four ranks, which have
    contiguous parts of them too, share each step evenly.
    """
    count = len(sequences)
    bounds = [part * count // STEP for part in range(STEP + 1)]
    parts = [(start + torch.randperm(stop - start, generator=generator)).tolist() for start, stop in pairwise(bounds)]
    order = [sequences[place] for places in zip_longest(*parts) for place in places if place is not None]
    return [order[first : first + STEP] for first in range(0, count, STEP)]


def _backward(errors: Iterable[Tensor], block: Block) -> None:
    with torch.enable_grad(), differentiable(block.module):
        for error in errors:
            if not error.requires_grad:
                raise ModelError(
                    f"{block.name} cannot be tuned: its output does not depend on its weights by a gradient. "
                    "Set --tuning-epochs to 0"
                )
            with backward_explained(block.name):
                error.backward()


def _all_reduce_gradients(masters: Mapping[str, Tensor], count: int, ranks: Ranks) -> None:
    if ranks.size > 1:
        gradients = [torch.zeros_like(each) if each.grad is None else each.grad for each in masters.values()]
        flat = ranks.all_reduce_(torch.cat([gradient.flatten() for gradient in gradients]))
        for master, part in zip(masters.values(), flat.split([each.numel() for each in gradients]), strict=True):
            master.grad = part.view_as(master).to(master.dtype)
    for master in masters.values():
        if master.grad is not None:
            master.grad.div_(count)


@torch.no_grad()
def _copy(source: Mapping[str, Tensor], destination: Mapping[str, Tensor]) -> None:
    for name, tensor in destination.items():
        tensor.detach().copy_(source[name]).add_(0.0)  # what is rounded to -0 becomes 0, as pruned weights are


def _adam(masters: Mapping[str, Tensor]) -> torch.optim.Adam:
    groups = [{"params": [master], "size": size_of(master)} for master in masters.values()]
    return torch.optim.Adam(groups, betas=BETAS, fused=True)


@torch.no_grad()
def size_of(master: Tensor) -> float:
    """Root mean square of the nonzero weights: the size of weights differs much between models."""
    return math.sqrt(float(master.square().sum()) / max(int(master.count_nonzero()), 1))


def changed(block: Block, pruned: Collection[str], tuned: bool = True) -> dict[str, nn.Parameter]:
    """What a run changes in a block, by its name there: ``pruned`` linears, and if it is ``tuned`` norms and biases.

    But for those of other blocks too, whose dense outputs would change as well, for biases of what is left dense, and
    for what else is in a router that is: its choice has no gradient.
    """
    routers = (routing_module(router) for router in block.routers if router not in pruned)
    routing = tuple(f"{router}.".removeprefix(f"{block.name}.") for router in routers)
    weights = {id(linear.parameter) for linear in block.linears if linear.name in pruned}
    named = dict(block.module.named_parameters())

    def is_own_vector(name: str, parameter: nn.Parameter) -> bool:
        matrix = named.get(f"{name.removesuffix('bias')}weight", parameter) if name.endswith("bias") else parameter
        left_dense = matrix.ndim > 1 and id(matrix) not in weights
        own = name not in block.common and not name.startswith(routing)
        return parameter.ndim == 1 and parameter.is_floating_point() and own and not left_dense

    return {name: each for name, each in named.items() if id(each) in weights or (tuned and is_own_vector(name, each))}


def changed_names(block: Block, pruned: Collection[str], tuned: bool) -> list[str]:
    """Full names of the tensors of ``changed``."""
    places = {each.data_ptr() for each in changed(block, pruned, tuned).values()}  # one may have several names
    state = block.module.state_dict(prefix=f"{block.name}.")
    return [name for name, tensor in state.items() if tensor.data_ptr() in places]


def _masters(block: Block, keeps: Mapping[str, Tensor | None], solutions: dict[str, Tensor]) -> dict[str, Tensor]:
    pruned: defaultdict[int, list[Linear]] = defaultdict(list)  # one parameter may hold many experts
    for linear in block.linears:
        if linear.name in keeps:
            pruned[id(linear.parameter)].append(linear)
    masters = {}
    for name, parameter in changed(block, keeps).items():
        linears = pruned.get(id(parameter), [])
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        master = masters[name] = parameter.detach().to(dtype, copy=True).requires_grad_(True)
        for linear in linears:
            if linear.name in solutions:  # before it was rounded; its memory is needed next
                linear.orient(master.detach()).copy_(solutions.pop(linear.name))
        if any(keeps[linear.name] is not None for linear in linears):
            keep_like = torch.zeros_like(master)  # a CPU multiplies by floats eight times as fast as by booleans
            for linear in linears:
                keep_OD = keeps[linear.name]
                linear.orient(keep_like).copy_(torch.ones(()) if keep_OD is None else keep_OD)
            master.register_post_accumulate_grad_hook(partial(_mask_gradient, keep_like))
    return masters


def _mask_gradient(keep_like: Tensor, master: Tensor) -> None:
    assert master.grad is not None
    master.grad.mul_(keep_like)  # in place: there is no memory for another gradient
