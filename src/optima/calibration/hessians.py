"""Hessians of a block's linears, from hooks on one forward pass of the block.

*Attention sinks.* Most heads of most language models attend to the first token of a sequence when they have nothing
better to attend to (Xiao et al., arXiv 2309.17453; massive activations: Sun et al., arXiv 2402.17762). An error there
reaches every later token, so it may count as more than one token (cf. IntactKV, arXiv 2403.01241).

*Experts.* The Hessian of n tokens in D dimensions is off by about sqrt(D/n), relative to its norm, as any sample
covariance (Ledoit and Wolf, J. Multivariate Anal. 2004). So that of the tokens routed to an expert is shrunk towards
that of all tokens of the block, as though D more had been drawn from those: H = (n H_expert + D H_all) / (n + D). At an
expert's second linear, H_all is of a sample of all tokens that runs through the expert's first one.

Shapes: B sequences, L tokens in a sequence, T tokens, D inputs, O outputs, N tokens of a sample.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from optima.calibration.activations import Activations, moved
from optima.calibration.weights import FisherWeights
from optima.core.hessian import Hessian
from optima.core.problem import chunk_rows
from optima.core.products import ROUND_ROWS, add_gram, all_finite, mirror, sampling_step
from optima.device import Stopwatch, bfloat16_products, full_precision
from optima.distributed import Ranks
from optima.errors import OTHER_DTYPE, CalibrationError
from optima.models.blocks import Block, Linear
from optima.models.forward import rows_of
from optima.models.moe import DOWN, ExpertLinear, FusedExperts

Group = tuple[Linear, ...]
COMMON_TOKENS = 2048  # of a block, that stand for all of them at an expert's second linear
# A group costs so many products of O x D x D, for select, solve and rounding, and D^3 for its Hessian.
PRODUCTS = 10


@dataclass(frozen=True)
class Found:
    """The statistics of linears that share their input.

    Attributes:
        hessian: of the input; None if no token reached the linears, or on other ranks than the owner.
        linears: the linears.
        owner: the rank that prunes them; None: all ranks together.
    """

    hessian: Hessian | None
    linears: Group
    owner: int | None = 0


def observe(
    block: Block,
    acts: Activations,
    sink_weight: float,
    damping: float,
    stopwatch: Stopwatch | None = None,
    weights: FisherWeights | None = None,
    onward: bool = False,
) -> Iterator[Found]:
    """Run ``block`` over ``acts``, and yield the statistics of each group of its linears that share their input.

    Every rank gets all groups; see ``Found.owner``. A linear may be pruned as soon as its group is there.

    Args:
        block: on the device of ``acts``, with the linears to prune.
        acts: what enters the block.
        sink_weight: without ``weights``, of the first token of each sequence, relative to all tokens of the sequence
            together: it counts as ``max(1, sink_weight * L)`` tokens. 0: it counts as one.
        damping: of the Hessians.
        stopwatch: for the stages ``forward``, ``hessian`` and ``reduce``.
        weights: Fisher weights of the tokens.
        onward: the pass advances ``acts`` to the block's outputs. Else they stay as they are.

    Raises:
        CalibrationError: on NaN or Inf, naming the linear.
    """
    hessians = _Hessians(block, acts, sink_weight, stopwatch or Stopwatch(acts.device), weights)
    hessians.accumulate(onward)
    yield from hessians.finish(damping)


def _leads(group: Group) -> bool:
    """Whether these are first linears of an expert: they are pruned after the second ones, which need them dense."""
    return group[0].expert is not None and group[0].expert.parameter != DOWN


class Accumulator:
    """X^T S X over the tokens seen so far, S their weights: float32 products of each batch, summed in float64.

    Where X is of bfloat16, so is S^1/2 X.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self.sum_DD = torch.zeros(size, size, dtype=torch.float64, device=device)
        self.tokens = 0
        self.weight: float | Tensor = 0.0  # tr S; a tensor stays on the device, and is not waited for

    def add(self, inputs_TD: Tensor, weight_T: Tensor | None = None) -> None:
        """Add tokens that weigh 1 each, or ``weight_T``. Out of memory, it adds nothing at all."""
        tokens = len(inputs_TD)
        weight = tokens if weight_T is None else weight_T.sum(dtype=torch.float64)
        if weight_T is not None:
            weighted_TD = inputs_TD.float() * weight_T.sqrt()[:, None]
            # Rounded as the model rounds its inputs, for bfloat16 multiplies faster.
            inputs_TD = weighted_TD.bfloat16() if inputs_TD.dtype == torch.bfloat16 else weighted_TD
        # oneDNN compiles a product for each number of tokens: zeros make the numbers at experts repeat.
        if missing := -tokens % ROUND_ROWS:
            inputs_TD = nn.functional.pad(inputs_TD, (0, 0, 0, missing))
        with bfloat16_products() if inputs_TD.dtype == torch.bfloat16 else nullcontext():
            add_gram(self.sum_DD, inputs_TD)
        self.tokens, self.weight = self.tokens + tokens, self.weight + weight

    def mean(self) -> Tensor:
        """X^T S X / tr S, (D, D), float64. The sum is used up."""
        return mirror(self.sum_DD).div_(float(self.weight))


def reduce_to(owners: Mapping[str, int | None], sums: dict[str, Accumulator], ranks: Ranks) -> None:
    """Add up the sums of all ranks at their owners, or at all ranks where the owner is None. All ranks call it.

    They are removed elsewhere, and where no rank has tokens.
    """
    every = ranks.gather({name: (sums[name].tokens, float(sums[name].weight)) for name in owners})
    for name, owner in owners.items():
        tokens, weights = zip(*(counts[name] for counts in every), strict=True)
        sums[name].tokens, sums[name].weight = sum(tokens), sum(weights)
        if sum(tokens):
            ranks.all_reduce_(sums[name].sum_DD, owner)
        if not sum(tokens) or owner not in (None, ranks.rank):
            del sums[name]


def owners_of(groups: Sequence[Sequence[Linear]], ranks: int, device: torch.device) -> dict[str, int | None]:
    """The rank that prunes each group of linears, by its first linear; None: all ranks together."""
    costs, chunked = [], []
    for group in groups:
        outputs, size = [linear.shape[0] for linear in group], group[0].shape[1]
        costs.append(float(size**3 + PRODUCTS * sum(outputs) * size**2))
        chunked.append(any(chunk_rows(size, count, device) < count for count in outputs))
    owners = share_out(costs, ranks, chunked) if ranks > 1 else [0] * len(groups)
    return {group[0].name: owner for group, owner in zip(groups, owners, strict=True)}


def share_out(costs: Sequence[float], ranks: int, divisible: Sequence[bool] = ()) -> list[int | None]:
    """The owner of each task: the largest task first, each to the rank with the least work.

    None, for a task above a fair share that is ``divisible`` (all are, if it is empty): all ranks do it together.
    """
    load, fair = [0.0] * ranks, sum(costs) / ranks
    owners: list[int | None] = [None] * len(costs)
    for index in sorted(range(len(costs)), key=lambda index: -costs[index]):
        together = ranks > 1 and costs[index] > fair and (not divisible or divisible[index])
        if not together:
            least = min(range(ranks), key=load.__getitem__)
            owners[index] = least
            load[least] += costs[index]
    return owners


class _AllSeen(Exception):  # noqa: N818 - not an error
    """Stops a block's forward pass before the product of its last linear, which nobody needs."""


class _Common(NamedTuple):
    """All tokens at the input of a mixture: their Hessian, and a sample of them with weights."""

    mean_DD: Tensor
    rows_ND: Tensor
    weight_N: Tensor


class _Hessians:
    """Accumulates the Hessians of a block's linears; see ``observe``."""

    def __init__(
        self, block: Block, acts: Activations, sink_weight: float, stopwatch: Stopwatch, fisher: FisherWeights | None
    ) -> None:
        self.block, self.acts, self.sink_weight = block, acts, sink_weight
        self.stopwatch, self.fisher, self.groups = stopwatch, fisher, acts.groups(block)
        self.sums = {group[0].name: Accumulator(group[0].shape[1], acts.device) for group in self.groups}
        mixtures = {group[0].expert.experts for group in self.groups if group[0].expert is not None}
        self.mixtures = sorted(mixtures, key=lambda experts: experts.name)
        self.samples: dict[str, list[tuple[Tensor, Tensor]]] = {experts.name: [] for experts in self.mixtures}
        self.common: dict[str, _Common] = {}
        self._stops = False
        self._batch, self._rows = -1, slice(0)
        self._seen: set[str] = set()  # in this pass over a microbatch
        # Samples of this batch that were added; a pass that ran out of memory runs again in parts, which skip them.
        self._added: dict[str, int] = {}
        self._skipped: set[str] = set()

    def accumulate(self, onward: bool) -> None:
        """Sum over all tokens."""
        acts, self._stops = self.acts, not onward
        commons = {each.name: Accumulator(Linear("", each.up[0]).shape[1], acts.device) for each in self.mixtures}
        with ExitStack() as stack:
            for group in self.groups:
                stack.callback(group[0].observe(partial(self._see, group[0])).remove)
            for experts in self.mixtures:
                hook = partial(self._see_all, experts, commons[experts.name])
                stack.callback(experts.module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            stack.enter_context(self.block.linearized())
            stack.enter_context(self.stopwatch("forward"))
            stack.enter_context(full_precision())
            if onward:
                acts.forward(self.block, self._start)
            for batch in range(0 if onward or not self.groups else len(acts.batches)):
                acts.map_microbatches(batch, partial(self._run, batch))
        _check(self.sums | commons)
        for name, samples in self.samples.items():
            reduce_to({name: None}, commons, acts.ranks)
            if every := [each for own in acts.ranks.all_gather(samples) for each in own]:
                self.common[name] = _Common(commons[name].mean(), *map(torch.cat, zip(*every, strict=True)))

    def _run(self, batch: int, rows: slice) -> None:
        self._start(batch, rows)
        with torch.no_grad(), suppress(_AllSeen):
            self.acts.run(self.block, batch, rows)

    def _start(self, batch: int, rows: slice) -> None:
        if batch != self._batch:
            self._added.clear()
        self._batch, self._rows = batch, rows
        self._seen.clear()
        self._skipped = {name for name, stop in self._added.items() if stop >= rows.stop}

    def _see(self, linear: Linear, inputs: Tensor) -> None:
        inputs_TD, name, expert = inputs.reshape(-1, inputs.shape[-1]), linear.name, linear.expert
        tokens = (self._rows.stop - self._rows.start) * self.acts.length
        all_tokens = name not in self.acts.probe.routed and len(inputs_TD) == tokens  # of this pass, in order
        if len(inputs_TD) and name not in self._skipped:
            with self.stopwatch("hessian"):
                weight_T = self._weights(name, inputs_TD.device)
                if weight_T is not None and expert is not None:
                    weight_T = weight_T[expert.tokens_T]
                elif not all_tokens:  # it is not known which they are
                    weight_T = None
                self.sums[name].add(inputs_TD, weight_T)
            self._added[name] = self._rows.stop
        if expert is not None or all_tokens:
            self._seen.add(name)
        if self._stops and self._seen == self.sums.keys():
            raise _AllSeen

    def _weights(self, name: str, device: torch.device) -> Tensor | None:
        """Weights of all tokens of this pass at a linear, or at the block; None if they weigh alike."""
        samples, length = len(self.acts.batches[self._batch]), self.acts.length
        weight_T = None
        if self.fisher is not None:
            weight_T = self.fisher.of(name, self._batch, samples * length)
        elif self.sink_weight * length > 1.0:
            weight_T = torch.ones(samples * length)
            weight_T[::length] = self.sink_weight * length
        return None if weight_T is None else moved(rows_of(weight_T, self._rows, samples), device)

    def _see_all(self, experts: FusedExperts, total: Accumulator, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Add all tokens at the input of a mixture, whatever they are routed to."""
        if experts.name in self._skipped:
            return
        hidden_TD = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)).flatten(0, -2)
        weight_T = self._weights(self.block.name, hidden_TD.device)
        if weight_T is None:
            weight_T = hidden_TD.new_ones(len(hidden_TD), dtype=torch.float32)
        weight_T = weight_T.repeat(len(hidden_TD) // len(weight_T))
        if not experts.routed:  # zeros are routed elsewhere
            used_T = hidden_TD.ne(0).any(dim=1)
            hidden_TD, weight_T = hidden_TD[used_T], weight_T[used_T]
        total.add(hidden_TD, weight_T)
        before = self.acts.before + sum(map(len, self.acts.batches[: self._batch])) + self._rows.start
        step = sampling_step(self.acts.tokens, COMMON_TOKENS)
        chosen = slice(
            -before * self.acts.length % step, None, step
        )  # every ``step``-th token, counted over all batches
        self.samples[experts.name].append((hidden_TD[chosen].clone(), weight_T[chosen].clone()))
        self._added[experts.name] = self._rows.stop

    def finish(self, damping: float) -> Iterator[Found]:
        """What was found at each group; groups that all ranks solve together come first."""
        ranks = self.acts.ranks
        owners = owners_of(self.groups, ranks.size, self.acts.device)
        with self.stopwatch("reduce") if ranks.size > 1 else nullcontext():
            reduce_to(owners, self.sums, ranks)
        for group in sorted(self.groups, key=lambda group: (_leads(group), owners[group[0].name] is not None)):
            name, expert, owner = group[0].name, group[0].expert, owners[group[0].name]
            total, hessian = self.sums.pop(name, None), None
            if expert is not None and owner in (None, ranks.rank):
                hessian = self._shrunk(name, expert, total, damping)
            elif total is not None:
                hessian = Hessian(total.mean(), damping, total.tokens)
            yield Found(hessian, group, owner)
            del hessian  # or it would be in memory with the next

    def _shrunk(self, name: str, expert: ExpertLinear, own: Accumulator | None, damping: float) -> Hessian | None:
        """An expert's Hessian, as though D tokens had been drawn from all of the block besides its own."""
        common = self.common.get(expert.experts.name)
        if common is None:
            return None
        mean_DD = common.mean_DD
        if expert.parameter == DOWN:
            with torch.no_grad(), full_precision():
                rows_ND = expert.experts.hidden(expert.expert, common.rows_ND)
            inner = Accumulator(rows_ND.shape[1], rows_ND.device)
            inner.add(rows_ND, common.weight_N)
            _check({name: inner})
            mean_DD = inner.mean()
        if own is None:
            return Hessian(mean_DD.clone(), damping)
        share = own.tokens / (own.tokens + len(mean_DD))
        return Hessian(own.mean().mul_(share).add_(mean_DD, alpha=1.0 - share), damping, own.tokens)


def _check(sums: Mapping[str, Accumulator]) -> None:
    """One look at the device for all sums. NaN and Inf show on the diagonal, wherever in a column they are."""
    if not all_finite(*(each.sum_DD.diagonal() for each in sums.values())):
        name = next(name for name, each in sums.items() if not all_finite(each.sum_DD.diagonal()))
        raise CalibrationError(f"the inputs of {name} contain NaN or Inf: {OTHER_DTYPE}")


def routing_notes(block: str, tokens: Mapping[str, int], least: int) -> list[str]:
    """A note of the report, if fewer than ``least`` tokens were routed to some experts' linears, by their names."""
    few = [name for name, count in tokens.items() if count < least]
    if not few:
        return []
    unreached = sum(not tokens[name] for name in few)
    none = f", none to {unreached}, which were pruned by the Hessian of all tokens" if unreached else ""
    return [
        f"{block}: fewer than {least} tokens were routed to {len(few)} of {len(tokens)} linears of experts "
        f"({', '.join(few[:3])}{' ...' if len(few) > 3 else ''}){none}: use more calibration data"
    ]
