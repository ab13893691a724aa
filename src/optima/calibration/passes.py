"""Forward passes of a block that wait where a linear is not pruned yet, all sequences side by side.

Each is a greenlet, which keeps its Python frames while others run: no model needs to be taken apart for it. Threads
would do the same, but libraries of products keep work space and helpers for each of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from types import TracebackType

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor

from optima.calibration.probe import Given
from optima.calibration.streams import Streams
from optima.device import give_back_freed_memory
from optima.models.stacks import Block, Linear

# Told of a group's first linear, of the inputs that samples of a batch give the group, of the batch and the samples.
See = Callable[[str, Tensor, int, slice], None]


class _Pass:
    """One forward pass: ``waits_at`` a group until it goes on, or has an ``output``."""

    def __init__(self, work: Callable[[], list[Tensor]]) -> None:
        self._running = greenlet(work)
        self.waits_at: str | None = None
        self.output: list[Tensor] = []

    def go_on(self) -> None:
        if self._running.dead:
            return
        self._running.parent = getcurrent()
        result = self._running.switch()
        if self._running.dead:
            self.waits_at, self.output = None, result
        else:
            self.waits_at = result


class Passes:
    """Forward passes of all batches of ``streams`` through a block, inside this context.

    Args:
        block: on the device of the streams.
        streams: what enters it.
        groups: linears by the input that they share; of each, a pass waits at the one that it calls first.
        see: is shown the input before a pass waits, once.

    Attributes:
        given: what the linears were given in the first pass.
    """

    def __init__(self, block: Block, streams: Streams, groups: Sequence[Sequence[Linear]], see: See) -> None:
        self._block, self._streams, self._groups, self._see = block, streams, groups, see
        self._passes: list[dict[tuple[int, int], _Pass]] = [{} for _ in streams.sizes]
        self._let_through: set[str] = set()
        self._now = 0, slice(0)
        self._hooks = ExitStack()
        self.given = Given()

    def __enter__(self) -> Passes:
        for group in self._groups:
            for linear in group:
                hook = partial(self._called, linear.name, group[0].name)
                self._hooks.callback(linear.observe(hook).remove)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._passes.clear()  # what waits still is broken off
        self._hooks.close()

    def let_through(self, name: str) -> None:
        """The group of the linear ``name`` is pruned: no pass waits there any more."""
        self._let_through.add(name)

    @torch.inference_mode(False)
    @torch.no_grad()
    def go_on(self) -> set[str]:
        """Run every pass to its next group that is not let through. The first linears of these; empty at the end."""
        for batch, waiting in enumerate(self._passes):
            parts = self._streams.in_parts(self._block, batch, partial(self._go_on, batch, waiting))
            self._passes[batch] = {(part.start, part.stop): one for part, one in parts}
        if self._streams.device.type == "cpu":
            give_back_freed_memory()  # between what waits are holes, too small for what the next group is given
        return {one.waits_at for passes in self._passes for one in passes.values() if one.waits_at is not None}

    def finish(self) -> None:
        """Run all passes to their ends, and let ``streams`` have their outputs."""
        self.go_on()
        for batch, passes in enumerate(self._passes):
            self._streams.receive(self._block, batch, [one.output for one in passes.values()])

    def _go_on(self, batch: int, waiting: dict[tuple[int, int], _Pass], part: slice) -> tuple[slice, _Pass]:
        """A part that waits nowhere begins anew: its halves, if it ran out of memory, get to where it was."""
        one = waiting.pop((part.start, part.stop), None)
        if one is None:
            if not batch and not part.start:
                self.given = Given()
            one = _Pass(partial(self._streams.outputs, self._block, batch, part))
        self._now = batch, part
        one.go_on()
        return part, one

    def _called(self, name: str, first: str, inputs: Tensor) -> None:
        batch, part = self._now
        if not batch and not part.start:
            self.given.add(name, inputs)
        if first not in self._let_through and inputs.numel():
            self._see(first, inputs, batch, part)
            parent = getcurrent().parent
            assert parent is not None
            parent.switch(first)
