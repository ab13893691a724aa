"""Accumulate the statistics of each distinct input of a block's linears, while the block runs forward.

*Attention sinks.* Most heads of most language models attend to the first token of a sequence when they have nothing
better to attend to (Xiao et al., arXiv 2309.17453), whatever that token is, and blocks treat it as no other (massive
activations: Sun et al., arXiv 2402.17762). An error there reaches every later token, so it may count as more than one
token (cf. IntactKV, arXiv 2403.01241: it leaves the keys and values of such tokens unquantised). Where every sequence
begins with BOS, its input is one vector: to keep the outputs that belong to it takes one of the free weights of a row.

Shapes: B sequences, L tokens in a sequence, T tokens, D inputs, N tokens that weigh more than one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from optima.calibration.accumulator import SAMPLE, Accumulator, Found, sampled
from optima.calibration.expert_statistics import TokenWeights, observe_experts
from optima.calibration.fisher import FisherWeights
from optima.calibration.halving import Once, rows_of
from optima.calibration.probe import Given
from optima.calibration.reduction import reduce_statistics
from optima.calibration.routed import Recorded, recorders
from optima.calibration.streams import Streams
from optima.device import Stopwatch, full_precision
from optima.errors import OTHER_DTYPE, CalibrationError
from optima.linalg.statistics import sampling_step
from optima.models.blocks import Block
from optima.models.moe import ExpertLinear


def observe(
    block: Block,
    streams: Streams,
    sink_weight: float,
    damping: float,
    stopwatch: Stopwatch | None = None,
    weights: FisherWeights | None = None,
    onward: bool = False,
) -> Iterator[Found]:
    """Run ``block`` over ``streams``, and give the statistics of each group of its linears that share their input.

    Of several processes each is given all groups; see ``Found.owner``. Experts come last: each is dense until its own
    statistics are given, see ``calibration.expert_statistics``.

    Args:
        block: on the device of ``streams``, with the linears to prune.
        streams: what enters the block.
        sink_weight: without ``weights``, of the first token of each sequence, relative to all tokens of the sequence
            together: it counts as ``max(1, sink_weight * L)`` tokens, in units of the others. 0: it counts as one.
        damping: of the hessians.
        stopwatch: told of the stages ``forward``, ``hessian`` and ``reduce``.
        weights: of the tokens, by the model's loss.
        onward: the same pass carries ``streams`` on to the block's outputs. Else they stay as they are, and a pass over
            a batch ends with the input of the last linear: its product is for nobody.

    Raises:
        CalibrationError: on NaN or Inf, naming the linear and the first bad sample.
    """
    stopwatch = stopwatch or Stopwatch(streams.device)
    if not block.linears:
        if onward:
            with stopwatch("forward"):
                streams.advance(block)
        return
    watch = _Watch(streams, block, sink_weight, stopwatch, weights, onward)

    @contextmanager
    def watched(batch: int, part: slice) -> Iterator[None]:
        with watch.over(batch, part), torch.no_grad():
            yield

    def run(batch: int, part: slice) -> None:
        with watched(batch, part), suppress(_AllSeen):
            streams.run(block, batch, part, looks=True)

    with stopwatch("forward"), full_precision():
        if onward:
            streams.advance(block, watched)
        else:
            for batch in range(len(streams.hidden)):
                streams.in_parts(block, batch, partial(run, batch))
    with stopwatch("reduce") if streams.ranks.size > 1 else nullcontext():
        owners = reduce_statistics(watch.accumulators, watch.untold, watch.groups, streams)
    # What all do together comes first: nobody waits in it for one who works alone.
    for group in sorted(watch.groups, key=lambda group: owners[group[0].name] is not None):
        name = group[0].name
        yield Found(watch.accumulators.pop(name).finish(damping), group, name not in watch.untold, owners[name])
    for recorded in watch.recorders:
        told = TokenWeights(block, streams, sink_weight, weights)
        yield from observe_experts(recorded, told, damping, stopwatch)


class _AllSeen(Exception):  # noqa: N818 - not an error
    """Stops a block's forward pass before the product of its last linear."""


class _Sums:
    """What a block's linears were given, accumulated for each group of those that share their input."""

    def __init__(
        self, streams: Streams, block: Block, sink_weight: float, stopwatch: Stopwatch, weights: FisherWeights | None
    ) -> None:
        self._streams, self._sink_weight, self._stopwatch = streams, sink_weight, stopwatch
        self.groups = [group for group in streams.groups(block) if not isinstance(group[0], ExpertLinear)]
        self._leader = {linear.name: group[0].name for group in self.groups for linear in group}
        self.accumulators = {group[0].name: Accumulator() for group in self.groups}
        self._by_loss = None if weights is None else {name: weights.of_tokens(name) for name in self.accumulators}
        self.untold: set[str] = set()
        self._step = sampling_step(streams.tokens, SAMPLE)

    def add(self, name: str, inputs: Tensor, batch: int, part: slice) -> None:
        """Add the inputs that samples of a batch give the group of ``name``, its first linear."""
        with self._stopwatch("hessian"):
            self._add(name, inputs, batch, part)

    def _add(self, name: str, inputs: Tensor, batch: int, part: slice) -> None:
        (every, length), samples = self._streams.sizes[batch], part.stop - part.start
        inputs_TD = inputs.reshape(-1, inputs.shape[-1])
        before = self._streams.before[1] + sum(math.prod(size) for size in self._streams.sizes[:batch])
        weight_T, heavy_ND, sample_ND, extra = None, None, None, 0.0
        if self._by_loss is not None:
            weights = self._by_loss[name]
            if weights is None or len(inputs_TD) != samples * length:
                self.untold.add(name)
            else:
                weight_T = rows_of(weights[batch], part, every).to(inputs_TD.device)
                sample_ND = sampled(inputs_TD, before + part.start * length, self._step)
        elif (more := self._sink_weight * length - 1.0) > 0.0:
            heavy_ND = self._streams.probe.first_tokens(inputs, name, samples, length)
            if heavy_ND is None:
                self.untold.add(name)
            else:
                extra = more
        self.accumulators[name].add(inputs_TD, weight_T, heavy_ND, extra, sample_ND)
        if not self.accumulators[name].finite:
            raise CalibrationError(self._describe_bad(name, inputs_TD, batch, part))

    def check_groups(self, given: Given) -> None:
        """A few tokens told which linears share their input: on a whole batch, if they were reached, it must be so."""
        for name, leader in self._leader.items():
            if name in given.inputs and given.inputs[name] != given.inputs[leader]:
                raise CalibrationError(
                    f"{leader} and {name} share their input over a few tokens, but not over a whole calibration "
                    "sequence: leave one of them out with --ignore"
                )

    def _describe_bad(self, name: str, inputs_TD: Tensor, batch: int, part: slice) -> str:
        length, samples = self._streams.sizes[batch][1], part.stop - part.start
        first = self._streams.before[0] + sum(count for count, _ in self._streams.sizes[:batch]) + part.start
        if len(inputs_TD) != samples * length or self._streams.probe.sequence_first:
            place = f"calibration samples {first} to {first + samples - 1}"
            return f"the inputs of {name} contain NaN or Inf in {place}: {OTHER_DTYPE}"
        by_sample = inputs_TD.reshape(samples, -1).float()
        # Finite inputs can still overflow float32 when squared.
        good = (by_sample.isfinite() & (by_sample.abs() < 1e18)).all(dim=1)
        place = f"first in calibration sample {first + int(good.to(torch.int8).argmin())}"
        return f"the inputs of {name} contain NaN or Inf ({place}): {OTHER_DTYPE}"


class _Watch(_Sums):
    """Hooks on a block's linears that accumulate the inputs of each group's first."""

    def __init__(
        self,
        streams: Streams,
        block: Block,
        sink_weight: float,
        stopwatch: Stopwatch,
        weights: FisherWeights | None,
        onward: bool,
    ) -> None:
        super().__init__(streams, block, sink_weight, stopwatch, weights)
        self._onward = onward
        self.recorders = recorders(block, streams)
        self._expected = {*self._leader, *(recorded.experts.name for recorded in self.recorders)}
        self._batch, self._part = 0, slice(0)
        self._called: list[str] = []  # in this pass
        self._last: str | None = None  # where a pass can end, known after the first
        self._given: Given | None = None  # of the first pass
        self._checked = False
        self._once = Once()

    @contextmanager
    def over(self, batch: int, part: slice) -> Iterator[None]:
        """Watch one forward pass inside this context; what one left half done is not done again."""
        self._batch, self._part = batch, part
        self._called.clear()
        self._once.start(batch, part)
        given = self._given = None if self._checked else Given()
        with ExitStack() as hooks:
            hooks.callback(self._forget)
            for group in self.groups:
                for linear in group:
                    hooks.callback(linear.observe(self._see(linear.name)).remove)
            for recorded in self.recorders:
                hook = partial(self._record, recorded)
                handle = recorded.experts.module.register_forward_pre_hook(hook, with_kwargs=True)
                hooks.callback(handle.remove)
            yield
        if given is not None:
            self.check_groups(given)
            self._checked = True
            if not self._onward and sorted(self._called) == sorted(self._expected):
                self._last = self._called[-1]

    def _forget(self) -> None:
        self._given = None  # it holds memory

    def _see(self, name: str) -> Callable[[Tensor], None]:
        def see(inputs: Tensor) -> None:
            self._called.append(name)
            if self._given is not None:
                self._given.add(name, inputs)
            with self._once(name) as new:
                if new and inputs.numel() and self._leader[name] == name:
                    self.add(name, inputs, self._batch, self._part)
            self._end(name)

        return see

    def _record(self, recorded: Recorded, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._called.append(recorded.experts.name)
        with self._once(recorded.experts.name) as new:
            if new:
                recorded.note(self._batch, self._part, args, kwargs)
        self._end(recorded.experts.name)

    def _end(self, name: str) -> None:
        if name == self._last and len(set(self._called)) == len(self._expected):
            raise _AllSeen
