"""Hessians of a block's linears, from hooks on one forward pass of the block.

*Attention sinks.* Most heads of most language models attend to the first token of a sequence when they have nothing
better to attend to (Xiao et al., arXiv 2309.17453; massive activations: Sun et al., arXiv 2402.17762). An error there
reaches every later token, so it may count as more than one token (cf. IntactKV, arXiv 2403.01241).

*Experts.* The Hessian of n tokens in D dimensions is off by about sqrt(D/n), relative to its norm, as any sample
covariance (Ledoit and Wolf, J. Multivariate Anal. 2004). So that of the tokens routed to an expert is shrunk towards
that of all tokens of the block, as though D more had been drawn from those: H = (n H_expert + D H_all) / (n + D). At an
expert's second linear, H_all is of a sample of all tokens that runs through the expert's first one. All Hessians of a
block may be far more than fit (114 GB in DeepSeek-V3): the block runs once for each group of experts whose Hessians do.

Shapes: B sequences, L tokens in a sequence, T tokens, D inputs, N tokens of a sample.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from optima.calibration.accumulator import Accumulator, owners_of, reduce_to
from optima.calibration.activations import Activations, moved
from optima.calibration.weights import FisherWeights
from optima.core.hessian import Hessian
from optima.core.products import all_finite
from optima.core.statistics import Statistics, sampling_step
from optima.device import Stopwatch, full_precision
from optima.errors import OTHER_DTYPE, CalibrationError
from optima.models.blocks import DOWN, Block, FusedExperts, Linear
from optima.models.inputs import rows_of
from optima.recipe import EXPERT_BYTES

Group = tuple[Linear, ...]
# Tokens whose inputs are kept, where tokens have weights, to report the error with uniform weights.
SAMPLE = 512
# Tokens of a block that stand for all of them at an expert's second linear.
COMMON_TOKENS = 2048


@dataclass(frozen=True)
class Found:
    """The statistics of linears that share their input.

    Attributes:
        statistics: of the input; None if no token reached the linears, or on other ranks than the owner.
        linears: the linears.
        weighted: False if the weights of tokens do not count, since it is not known which tokens reached the linears.
        owner: the rank that prunes them; None: all ranks together.
    """

    statistics: Statistics | None
    linears: Group
    weighted: bool = True
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
        onward: the last pass advances ``acts`` to the block's outputs. Else they stay as they are.

    Raises:
        CalibrationError: on NaN or Inf, naming the linear.
    """
    experts = [group for group in acts.groups(block) if group[0].expert is not None]
    plain = [group for group in acts.groups(block) if group[0].expert is None]
    hessians = _Hessians(block, acts, sink_weight, damping, stopwatch or Stopwatch(acts.device), weights)
    *earlier, last = _portions(experts)
    for portion in earlier:
        hessians.accumulate(portion)
        yield from hessians.of_experts(portion)
    hessians.accumulate([*plain, *last], whole=True, onward=onward)
    yield from hessians.of_plain(plain)
    yield from hessians.of_experts(last)


def _by_expert(groups: Sequence[Group]) -> dict[tuple[FusedExperts, int], list[Group]]:
    found: defaultdict[tuple[FusedExperts, int], list[Group]] = defaultdict(list)
    for group in groups:
        assert group[0].expert is not None
        found[group[0].expert.experts, group[0].expert.expert].append(group)
    return found


def _portions(groups: Sequence[Group]) -> list[list[Group]]:
    """Groups of experts whose Hessians are accumulated in one pass; without experts one empty list."""
    portions: list[list[Group]] = [[]]
    size = 0
    for own in _by_expert(groups).values():
        more = sum(8 * group[0].shape[1] ** 2 for group in own)
        if size and size + more > EXPERT_BYTES:
            portions.append([])
            size = 0
        portions[-1] += own
        size += more
    return portions


class _AllSeen(Exception):  # noqa: N818 - not an error
    """Stops a block's forward pass before the product of its last linear, which nobody needs."""


@dataclass
class _Common:
    """The Hessian of all tokens at the input of a mixture, and a sample of them; of all ranks once it is reduced."""

    sum: Accumulator = field(default_factory=Accumulator)
    samples: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    mean_DD: Tensor = field(default_factory=lambda: torch.zeros(0))


@dataclass
class _Hessians:
    """Accumulates the inputs of a block's linears; arguments as of ``observe``."""

    block: Block
    acts: Activations
    sink_weight: float
    damping: float
    stopwatch: Stopwatch
    fisher: FisherWeights | None

    def __post_init__(self) -> None:
        self.sums: dict[str, Accumulator] = {}
        self.common: dict[FusedExperts, _Common] = {}
        self.unweighted: set[str] = set()
        self._batch, self._rows = -1, slice(0)
        self._calls: list[str] = []  # in this pass over a microbatch
        # The samples of this batch that each call has added: a pass that ran out of memory runs again in parts.
        self._added: dict[tuple[str, int], int] = {}
        self._last = ""  # where such a pass may end

    def accumulate(self, groups: Sequence[Group], whole: bool = False, onward: bool = False) -> None:
        """Sum over all tokens at ``groups``. The other experts run if the ``whole`` block does."""
        self.sums, self._batch, self._last = {group[0].name: Accumulator() for group in groups}, -1, ""
        new = {}
        with ExitStack() as stack:
            for group in groups:
                stack.callback(group[0].observe(partial(self._see, group[0])).remove)
                if group[0].expert is not None and (experts := group[0].expert.experts) not in self.common:
                    new[experts] = self.common[experts] = _Common()
                    hook = partial(self._see_all, experts)
                    stack.callback(experts.module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            stack.enter_context(self.block.linearized(only_hooked=not whole))
            stack.enter_context(self.stopwatch("forward"))
            stack.enter_context(full_precision())
            if onward:
                self.acts.forward(self.block, self._watch)
            for batch in range(0 if onward or not groups else len(self.acts.sizes)):
                self.acts.map_microbatches(batch, partial(self._run, batch))
                if not new and sorted(self._calls) == sorted(self.sums):
                    self._last = self._calls[-1]
        ranks, device = self.acts.ranks, self.acts.device
        self.unweighted.update(*ranks.gather(self.unweighted))
        _check({**self.sums, **{experts.name: common.sum for experts, common in new.items()}})
        for experts, common in new.items():
            reduce_to({experts.name: None}, {experts.name: common.sum}, ranks, device)
            common.samples = [each for own in ranks.all_gather(common.samples) for each in own]
            if common.samples:
                common.mean_DD = common.sum.mean()

    def _run(self, batch: int, rows: slice) -> None:
        with self._watch(batch, rows), torch.no_grad(), suppress(_AllSeen):
            self.acts.run(self.block, batch, rows)

    @contextmanager
    def _watch(self, batch: int, rows: slice) -> Iterator[None]:
        """Inside, samples of a batch run."""
        if batch != self._batch:
            self._added.clear()
        self._batch, self._rows = batch, rows
        self._calls.clear()
        yield

    @contextmanager
    def _call(self, name: str) -> Iterator[bool]:
        """Whether this call of ``name`` is new; it counts if nothing is raised inside."""
        key = name, self._calls.count(name)
        self._calls.append(name)
        yield self._added.get(key, 0) < self._rows.stop
        self._added[key] = max(self._added.get(key, 0), self._rows.stop)

    def _see(self, linear: Linear, inputs: Tensor) -> None:
        name = linear.name
        with self._call(name) as new:
            if new and inputs.numel() and linear.expert is not None:
                self._add_routed(name, inputs, linear.expert.tokens_T)
            elif new and inputs.numel():
                with self.stopwatch("hessian"):
                    self._add(name, inputs)
        if name == self._last and len(self._calls) == len(self.sums):
            raise _AllSeen

    def _add(self, name: str, inputs: Tensor) -> None:
        (samples, length), count = self.acts.sizes[self._batch], self._rows.stop - self._rows.start
        inputs_TD = inputs.reshape(-1, inputs.shape[-1])
        weight_T, heavy_ND, sample_ND, more = None, None, None, self.sink_weight * length - 1.0
        if self.fisher is not None:
            own = self.fisher.tokens.get(name)
            if own is None or len(inputs_TD) != count * length:
                self.unweighted.add(name)
            else:
                weight_T = moved(rows_of(own[self._batch], self._rows, samples), inputs_TD.device)
                sample_ND = self._sampled(inputs_TD, SAMPLE)
        elif more > 0.0:
            heavy_ND = self.acts.probe.first_tokens(inputs, name, count, length)
            if heavy_ND is None:
                self.unweighted.add(name)
        self.sums[name].add(inputs_TD, weight_T, heavy_ND, 0.0 if heavy_ND is None else more, sample_ND)

    def _sampled(self, rows: Tensor, wanted: int) -> Tensor:
        """Of the rows of this pass, those of a sample of about ``wanted`` tokens of all passes and ranks."""
        sizes = self.acts.sizes
        before = self.acts.before[1] + sum(math.prod(size) for size in sizes[: self._batch])
        before += self._rows.start * sizes[self._batch][1]
        return sampled(rows, before, sampling_step(self.acts.tokens, wanted))

    def _block_weights(self) -> Tensor:
        """Weights of all tokens of the batch, (T,), for its experts."""
        samples, length = self.acts.sizes[self._batch]
        if self.fisher is not None and self.block.name in self.fisher.tokens:
            return self.fisher.tokens[self.block.name][self._batch]
        weight_T = torch.ones(samples * length)
        if self.fisher is None:
            weight_T[::length] = max(1.0, self.sink_weight * length)
        return weight_T

    def _add_routed(self, name: str, inputs_TD: Tensor, tokens_T: Tensor) -> None:
        """Inputs of an expert, and which tokens of the pass they are of."""
        size, length = math.prod(self.acts.sizes[self._batch]), self.acts.sizes[self._batch][1]
        weight_T = None
        if name.rpartition(".")[0].rpartition(".")[0] in self.unweighted:
            self.unweighted.add(name)
        elif self.fisher is not None:
            weight_T = self.fisher.of_routed(name, self._batch, size)
        else:
            weight_T = self._block_weights()
        if weight_T is not None:
            weight_T = moved(weight_T, inputs_TD.device)[tokens_T + self._rows.start * length]
        wanted = -(-SAMPLE // (len(self.acts.sizes) * self.acts.ranks.size))
        offset = self.acts.before[0] + self._batch + self._rows.start  # each sequence begins with a sink
        self.sums[name].add(inputs_TD, weight_T, sample_ND=thinned(inputs_TD, wanted, offset))

    def _see_all(self, experts: FusedExperts, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Add all tokens at the input of a mixture, whatever they are routed to."""
        with self._call(experts.name) as new:
            if not new:
                return
            hidden = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
            hidden_TD, (samples, length) = hidden.flatten(0, -2), self.acts.sizes[self._batch]
            tokens = (self._rows.stop - self._rows.start) * length
            if len(hidden_TD) % tokens:
                self.unweighted.add(experts.name)
                weight_T = torch.ones(len(hidden_TD))
            else:
                weight_T = rows_of(self._block_weights(), self._rows, samples).repeat(len(hidden_TD) // tokens)
            weight_T = moved(weight_T, hidden_TD.device)
            if not experts.routed:  # zeros are routed elsewhere
                used_T = hidden_TD.ne(0).any(dim=1)
                hidden_TD, weight_T = hidden_TD[used_T], weight_T[used_T]
            common = self.common[experts]
            common.sum.add(hidden_TD, weight_T)
            pair = self._sampled(hidden_TD, COMMON_TOKENS).clone(), self._sampled(weight_T, COMMON_TOKENS).clone()
            common.samples.append(pair)

    def of_plain(self, groups: Sequence[Group]) -> Iterator[Found]:
        """The statistics of linears that are not experts; those that all ranks solve together come first."""
        ranks, device = self.acts.ranks, self.acts.device
        owners = owners_of(groups, ranks.size, device)
        with self.stopwatch("reduce") if ranks.size > 1 else nullcontext():
            reduce_to(owners, self.sums, ranks, device)
        for group in sorted(groups, key=lambda group: owners[group[0].name] is not None):
            name = group[0].name
            yield Found(self.sums.pop(name).finish(self.damping), group, name not in self.unweighted, owners[name])

    def of_experts(self, groups: Sequence[Group]) -> Iterator[Found]:
        """The statistics of experts; those of an expert are complete when its first group is yielded."""
        ranks, by_expert = self.acts.ranks, _by_expert(groups)
        owners = {key: place % ranks.size for place, key in enumerate(by_expert)}
        names = {group[0].name: owners[key] for key, own in by_expert.items() for group in own}
        reduce_to(names, self.sums, ranks, self.acts.device)
        for key, own in by_expert.items():
            mine = owners[key] == ranks.rank and self.common[key[0]].sum.tokens
            found = {group[0].name: self._shrunk(group[0]) for group in own} if mine else {}
            for group in own:
                name = group[0].name
                yield Found(found.pop(name, None), group, name not in self.unweighted, owners[key])

    def _shrunk(self, linear: Linear) -> Statistics:
        """The statistics of an expert's linear, whose first linear is still dense."""
        assert linear.expert is not None
        experts = linear.expert.experts
        common = self.common[experts]
        rows_ND, weight_N = (torch.cat(parts) for parts in zip(*common.samples, strict=True))
        mean_DD = common.mean_DD
        if linear.expert.parameter == DOWN:
            with torch.no_grad(), full_precision():
                rows_ND = experts.hidden(linear.expert.expert, rows_ND)
            inner = Accumulator()
            inner.add(rows_ND, weight_N)
            _check({linear.name: inner})
            mean_DD = inner.mean()
        weighted = self.fisher is not None or self.sink_weight > 0.0
        sample_ND = thinned(rows_ND, SAMPLE).float() if weighted else None
        return shrunk(self.sums.pop(linear.name), mean_DD, sample_ND, self.damping)


def _check(sums: Mapping[str, Accumulator]) -> None:
    """One look at the device for all sums. NaN and Inf show on the diagonal, wherever in a column they are."""
    known = {name: each.sum_DD.diagonal() for name, each in sums.items() if each.sum_DD is not None}
    if not all_finite(*known.values()):
        name = next(name for name, diagonal_D in known.items() if not all_finite(diagonal_D))
        raise CalibrationError(f"the inputs of {name} contain NaN or Inf: {OTHER_DTYPE}")


def shrunk(own: Accumulator, mean_DD: Tensor, sample_ND: Tensor | None, damping: float) -> Statistics:
    """An expert's statistics, as though D tokens had been drawn from all of the block besides its own.

    Args:
        own: of the tokens routed to it, if there are any; used up.
        mean_DD: the Hessian of all tokens.
        sample_ND: some of these; None: all tokens weigh alike, and no sample is needed.
        damping: of the Hessian.
    """
    tokens = own.tokens
    if not tokens:
        return Statistics(Hessian(mean_DD.clone(), damping), sample_ND=sample_ND)
    share = tokens / (tokens + len(mean_DD))
    hessian = Hessian(own.mean().mul_(share).add_(mean_DD, alpha=1.0 - share), damping)
    return Statistics(hessian, tokens, sample_ND=None if sample_ND is None else torch.cat(own.sample))


def sampled(rows: Tensor, before: int, step: int) -> Tensor:
    """Every ``step``-th row, counted over all batches, of which there were ``before`` in earlier ones."""
    return rows[-before % step :: step]


def thinned(rows: Tensor, count: int, offset: int = 0) -> Tensor:
    """At most ``count`` of the rows, evenly spaced, starting ``offset`` rows later."""
    step = max(-(-len(rows) // count), 1)
    return rows[offset % step :: step]


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
