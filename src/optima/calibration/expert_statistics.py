"""The statistics of experts: each from the tokens that are routed to it, some experts at a time.

*Routing* is that of the block's own router, whose weights stay dense, on what the pruned blocks before it hand it:
these are the tokens that the expert will be given in the pruned model. A token's weight is that of the dense model's
loss at this expert, where the dense model sent it there too; else the expert's mean.

*Few tokens.* The hessian of n tokens in D dimensions is off by about sqrt(D/n), relative to its norm (as of any sample
covariance: Ledoit and Wolf, J. Multivariate Anal. 2004). So an expert's is mixed with that of all tokens of the block,
as though D more tokens had been drawn from those: H = (n H_expert + D H_all) / (n + D). Behind the expert's first
product, H_all is of a sample of all tokens that is sent through the expert.

*Memory.* The hessians of all experts of a block may be far more than fit (114 GB in DeepSeek-V3). The inputs of the
module are kept, and experts run again for each portion of them whose hessians fit.

Shapes: T tokens, N tokens of a sample, D inputs, B sequences in a batch, L tokens in a sequence.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from optima.calibration.accumulator import SAMPLE, Accumulator, Found, sampled
from optima.calibration.fisher import FisherWeights
from optima.calibration.halving import Once, rows_of
from optima.calibration.reduction import reduce_to
from optima.calibration.routed import Group, Recorded
from optima.calibration.streams import Streams
from optima.device import Stopwatch, full_precision
from optima.errors import OTHER_DTYPE, CalibrationError, ModelError
from optima.linalg.hessian import Hessian
from optima.linalg.products import ROUND_ROWS, mirror
from optima.linalg.statistics import Statistics, sampling_step
from optima.models.blocks import Block
from optima.models.moe import Call, ExpertLinear, hidden_of_call

# Of the hessians of experts that are gathered at a time, in float64.
EXPERT_BYTES = 4 * 2**30
# Tokens of the block that stand for all of them behind an expert's first product.
COMMON_TOKENS = 2048


class TokenWeights:
    """How much each token of a batch counts at an expert.

    Args:
        block: whose experts.
        streams: what enters it.
        sink_weight: see ``optima.calibration.statistics.observe``.
        loss: weights by the model's loss, instead of the sink weight.
    """

    def __init__(self, block: Block, streams: Streams, sink_weight: float, loss: FisherWeights | None) -> None:
        self._sizes, self._loss = streams.sizes, loss
        self.weighs = loss is not None or sink_weight > 0.0
        self._all = None if loss is None else loss.of_tokens(block.name)
        if loss is None and sink_weight:
            self._all = []
            for samples, length in streams.sizes:
                weight_T = torch.ones(samples * length)
                weight_T[streams.probe.starts(samples, length)] = max(1.0, sink_weight * length)
                self._all.append(weight_T)

    def of_all(self, batch: int, part: slice) -> Tensor | None:
        """Of the block's tokens, (T,), in samples of a batch; None: all alike."""
        return None if self._all is None else rows_of(self._all[batch], part, self._sizes[batch][0])

    def at(self, name: str, batch: int, part: slice, tokens_T: Tensor | None) -> tuple[Tensor | None, bool]:
        """Of the tokens ``tokens_T`` of samples of a batch at an expert's linear; and False if they are not told."""
        length = self._sizes[batch][1]
        if not self.weighs:
            return None, True
        if tokens_T is None:
            return None, False
        at_T = tokens_T.cpu()  # a few numbers come here, instead of the weights of all tokens going to the device
        if len(at_T) and int(at_T.max()) >= (part.stop - part.start) * length:
            return None, False
        if self._loss is not None:
            routed_T = self._loss.of_routed(name, batch, math.prod(self._sizes[batch]))
        else:
            routed_T = None if self._all is None else self._all[batch]
        return None if routed_T is None else routed_T[at_T + part.start * length].to(tokens_T.device), True


def observe_experts(recorded: Recorded, weights: TokenWeights, damping: float, clock: Stopwatch) -> Iterator[Found]:
    """The statistics of every expert of a module; an expert is dense until its are given.

    Each process has calls of its own, and is given the statistics of the experts that it owns.

    Args:
        recorded: the module, which is on the device of its streams, and its inputs.
        weights: of tokens.
        damping: of the hessians.
        clock: told of the stage ``hessian``.

    Raises:
        CalibrationError: on NaN or Inf in an expert's inputs.
        ModelError: see ``Recorded.run_all``.
    """
    calls = recorded.streams.ranks.gather(len(recorded.calls))
    if not any(calls):
        yield from (Found(None, group) for group in recorded.groups)
        return
    if not all(calls):
        raise ModelError(
            f"{recorded.experts.name} is given tokens in some processes alone: mix the batches, so that each has some "
            "for all experts, or start one process"
        )
    everything = _Everything(recorded, weights, clock)
    by_expert: defaultdict[int, list[Group]] = defaultdict(list)
    for group in recorded.groups:
        assert isinstance(group[0], ExpertLinear)
        by_expert[group[0].expert].append(group)
    size = max(sum(8 * group[0].shape[1] ** 2 for group in groups) for groups in by_expert.values())
    numbers, step = list(by_expert), max(EXPERT_BYTES // size, 1)
    for start in range(0, len(numbers), step):
        portion = _Portion(
            recorded, everything, {number: by_expert[number] for number in numbers[start : start + step]}
        )
        yield from portion.observe(damping)


@dataclass(frozen=True)
class Common:
    """The hessian of all tokens of a block at one input, and some of them."""

    mean_DD: Tensor
    sample_ND: Tensor


class _Everything:
    """All tokens of the block at the module's input, whatever they are routed to."""

    def __init__(self, recorded: Recorded, weights: TokenWeights, clock: Stopwatch) -> None:
        self.weights, self.clock = weights, clock
        self.told = True  # whether the weights of tokens could be had
        ranks, device = recorded.streams.ranks, recorded.streams.device
        calls = ranks.gather(len(recorded.calls))
        self.calls, self.before = sum(calls), sum(calls[: ranks.rank])
        accumulator = Accumulator()
        sample, sample_weights = [], []
        used = [hidden_of_call(args, kwargs).flatten(0, -2).ne(0).any(dim=1) for _, _, args, kwargs in recorded.calls]
        counts = ranks.gather(sum(int(used_T.sum()) for used_T in used))
        before, step = sum(counts[: ranks.rank]), sampling_step(sum(counts), COMMON_TOKENS)
        for (batch, part, args, kwargs), used_T in zip(recorded.calls, used, strict=True):
            hidden_TD = hidden_of_call(args, kwargs).flatten(0, -2).to(device)
            weight_T = weights.of_all(batch, part)
            if weight_T is not None and len(hidden_TD) % len(weight_T):
                weight_T, self.told = None, False
            weight_T = torch.ones(len(hidden_TD)) if weight_T is None else weight_T
            # Where every expert is given all tokens, zeros for those routed elsewhere (Llama 4), they come in turn.
            weight_T = weight_T.repeat(len(hidden_TD) // len(weight_T))
            used_T = used_T.to(device)
            hidden_TD, weight_T = hidden_TD[used_T], weight_T.to(device)[used_T]
            with clock("hessian"), full_precision():
                _accumulate(accumulator, hidden_TD, weight_T)
            sample.append(sampled(hidden_TD, before, step).clone())  # a view would hold the whole batch
            sample_weights.append(sampled(weight_T, before, step).clone())
            before += len(hidden_TD)
        _check({recorded.experts.name: accumulator})
        every = ranks.all_gather((torch.cat(sample), torch.cat(sample_weights)))
        self.sample_ND, self.weight_N = (torch.cat(parts) for parts in zip(*every, strict=True))
        if ranks.size > 1:
            name = recorded.experts.name
            reduce_to({name: None}, {name: accumulator}, set(), recorded.streams)
        self.common = Common(_mean(accumulator), thinned(self.sample_ND, SAMPLE).float())


class _Portion:
    """Experts whose hessians are in memory together."""

    def __init__(self, recorded: Recorded, everything: _Everything, experts: Mapping[int, list[Group]]) -> None:
        self.recorded, self.everything, self.experts = recorded, everything, experts
        self.groups = [group for groups in experts.values() for group in groups]
        self.untold = set[str]() if everything.told else {group[0].name for group in self.groups}

    def observe(self, damping: float) -> Iterator[Found]:
        """The statistics of each group; those of an expert are complete when its first is given."""
        own = {group[0].name: Accumulator() for group in self.groups}
        for place in range(len(self.recorded.calls)):
            self.recorded.run(place, partial(self._part_watched, self.groups, own, Once()))
        _check(own)
        owners = self._reduce(own)
        for number, groups in self.experts.items():
            if owners[number] != self.recorded.streams.ranks.rank:
                yield from (Found(None, group, group[0].name not in self.untold, owners[number]) for group in groups)
                continue
            inner = [group for group in groups if self._inner(group)]
            behind = {group[0].name: Accumulator() for group in inner}
            if inner:
                with self._watched(inner, partial(self._add_sample, behind)):
                    self.recorded.run_all(self.everything.sample_ND, number)
            _check(behind)
            common = {name: Common(_mean(found), torch.cat(found.sample)) for name, found in behind.items()}
            for group in groups:
                name = group[0].name
                drawn, weighs = common.pop(name, self.everything.common), self.everything.weights.weighs
                # Held by whoever is given it alone, and let go before the next expert runs.
                yield Found(
                    mixed(own.pop(name), drawn, damping, weighs), group, name not in self.untold, owners[number]
                )

    def _reduce(self, own: dict[str, Accumulator]) -> dict[int, int]:
        """Each expert's sums of all processes at its owner; the owners by the expert's number."""
        ranks = self.recorded.streams.ranks
        owners = {number: place % ranks.size for place, number in enumerate(self.experts)}
        if ranks.size > 1:
            names = {group[0].name: owners[number] for number, groups in self.experts.items() for group in groups}
            reduce_to(names, own, self.untold, self.recorded.streams)
        return owners

    def _inner(self, group: Group) -> bool:
        """Whether the group is given what an earlier product of the expert made."""
        first = next(iter(self.recorded.experts.transposed))
        return not any(isinstance(linear, ExpertLinear) and linear.within == first for linear in group)

    @contextmanager
    def _watched(self, groups: list[Group], add: Callable[[str, Call], None]) -> Iterator[None]:
        """Inside, ``add`` is given every product of the groups with the name of their first linear.

        The pass is there for the hessians alone, and a clock inside it would wait for the device at each expert.
        """
        with self.everything.clock("hessian"), full_precision(), torch.no_grad(), ExitStack() as handles:
            for group in groups:
                assert isinstance(group[0], ExpertLinear)
                key = (group[0].within, group[0].expert)
                handles.callback(group[0].experts.add(key, partial(add, group[0].name)).remove)
            yield

    def _part_watched(
        self, groups: list[Group], into: dict[str, Accumulator], once: Once, batch: int, part: slice
    ) -> AbstractContextManager[None]:
        """Inside, samples of a batch go ``into`` accumulators, unless they are there."""
        once.start(batch, part)

        def add(name: str, call: Call) -> None:
            with once(name) as new:
                if new and len(call.inputs_TD):
                    weight_T, told = self.everything.weights.at(name, batch, part, call.tokens_T)
                    self.untold.update(() if told else (name,))
                    turn = self.everything.before + batch + part.start  # the same, however many processes there are
                    self._add(into, name, call, weight_T, -(-SAMPLE // self.everything.calls), turn)

        return self._watched(groups, add)

    def _add_sample(self, into: dict[str, Accumulator], name: str, call: Call) -> None:
        if len(call.inputs_TD):
            self._add(into, name, call, self.everything.weight_N, SAMPLE)

    def _add(
        self, into: dict[str, Accumulator], name: str, call: Call, weight_T: Tensor | None, count: int, turn: int = 0
    ) -> None:
        _accumulate(into[name], call.inputs_TD, weight_T, thinned(call.inputs_TD, count, turn))


def mixed(own: Accumulator, common: Common, damping: float, weighed: bool = True) -> Statistics:
    """An expert's statistics, as though D tokens had been drawn from all of the block's besides its own.

    Args:
        own: of the tokens that are routed to it, if there are any; used up.
        common: of all tokens of the block.
        damping: of the hessian.
        weighed: whether tokens have weights, and what is lost with all alike is told by a sample.
    """
    if own.sum_DD is None:
        return Statistics(Hessian(common.mean_DD.clone(), damping), sample_ND=common.sample_ND if weighed else None)
    share = own.tokens / (own.tokens + len(common.mean_DD))
    hessian_DD = _mean(own).mul_(share).add_(common.mean_DD, alpha=1.0 - share)
    return Statistics(Hessian(hessian_DD, damping), own.tokens, sample_ND=torch.cat(own.sample) if weighed else None)


def routing_notes(block: str, tokens: Mapping[str, int], least: int) -> list[str]:
    """What the report must say of experts of a block that were given few tokens.

    Args:
        block: its name.
        tokens: given to each expert's linears, by their names.
        least: fewer than this are too few.
    """
    notes, none = [], [name for name, count in tokens.items() if not count]
    if none:
        notes.append(
            f"{block}: no token was routed to {_some(none)} of {len(tokens)} linears of experts: they were pruned by "
            "the hessian of all tokens of the block"
        )
    few = [name for name, count in tokens.items() if 0 < count < least]
    if few:
        notes.append(
            f"{block}: fewer than {least} tokens were routed to {_some(few)} of {len(tokens)} linears of experts (the "
            f"fewest: {min(tokens[name] for name in few)}): give more text, or lower --expert-tokens"
        )
    return notes


def _some(names: list[str]) -> str:
    return f"{len(names)} ({', '.join(names[:3])}{' ...' if len(names) > 3 else ''})"


def _accumulate(
    accumulator: Accumulator, inputs_TD: Tensor, weight_T: Tensor | None, sample_ND: Tensor | None = None
) -> None:
    # Any number of tokens reaches an expert, and oneDNN compiles a product for each: zeros make numbers repeat.
    padding = -len(inputs_TD) % ROUND_ROWS
    padded_TD = torch.nn.functional.pad(inputs_TD, (0, 0, 0, padding))
    padded_T = None if weight_T is None else torch.nn.functional.pad(weight_T, (0, padding))
    accumulator.add(padded_TD, padded_T, sample_ND=sample_ND, padding=padding)


def _check(accumulators: Mapping[str, Accumulator]) -> None:
    """Raise ``CalibrationError`` naming the first linear with NaN or Inf: once, for each look waits for the device."""
    for name, accumulator in accumulators.items():
        if not accumulator.finite:
            raise CalibrationError(f"the inputs of {name} contain NaN or Inf: {OTHER_DTYPE}")


def thinned(rows: Tensor, count: int, turn: int = 0) -> Tensor:
    """At most ``count`` of the rows, evenly spaced: from another one each ``turn``, for each begins with a sink."""
    step = max(-(-len(rows) // count), 1)
    return rows[turn % step :: step]


def _mean(accumulator: Accumulator) -> Tensor:
    """X^T S X / tr S, (D, D); the accumulator is used up."""
    assert accumulator.sum_DD is not None
    return mirror(accumulator.sum_DD).div_(accumulator.tokens + accumulator.extra_weight)
