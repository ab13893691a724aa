"""Carry gradients from a block's outputs to its inputs, and note how large they are at its linears on the way.

Shapes: B sequences in a batch, L tokens in a sequence, T tokens, O outputs, E hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from optima.calibration.coupling import Halves, packed
from optima.calibration.halving import rows_of
from optima.calibration.left_behind import HandedOn, LeftBehind
from optima.calibration.probe import Place, hidden_of
from optima.calibration.streams import Streams
from optima.calibration.tempering import LossWeights, tempering
from optima.device import backward_explained
from optima.errors import NotDifferentiableError
from optima.models.experts import ExpertLinear
from optima.models.stacks import Block


def second_moment(gradients: Sequence[Tensor], device: torch.device, before_EE: Tensor | None = None) -> Tensor:
    """The sum over tokens of g g^T, (E, E), on the CPU; batches are added to that of earlier ones, one by one."""
    size = gradients[0].shape[-1]
    product_EE = torch.zeros(size, size, device=device) if before_EE is None else before_EE.to(device, copy=True)
    for gradient in gradients:
        flat_TE = gradient.to(device).flatten(0, -2).float()
        product_EE += flat_TE.mT @ flat_TE
    return product_EE.cpu()


class _Notes:
    """Squares of the gradients at a block's linears: of rows at once, of tokens once all batches were through."""

    def __init__(self, block: Block, streams: Streams, found: LossWeights, numbers: Sequence[int] | None) -> None:
        self._block, self._sizes, self._unordered, self._found = block, streams.sizes, streams.probe.routed, found
        self._leaders = {linear.name: group[0].name for group in streams.groups(block) for linear in group}
        self._rows: dict[str, Tensor] = {}  # float64, on the device until the block is done
        self._tokens: dict[str, list[Tensor]] = {}
        self._routed: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self._halves, self._store = Halves(block, streams.sizes, numbers, found.coupling), streams.store

    @contextmanager
    def watch(self, batch: int, part: slice) -> Iterator[None]:
        """Note the gradients of samples of a batch in a backward pass inside, if it gets to its end."""
        noted: list[Callable[[], None]] = []

        def note(name: str, gradient: Tensor, tokens_T: Tensor | None = None) -> None:
            gradient_TO = gradient.detach().flatten(0, -2)
            square_TO = gradient_TO.float().square()
            sum_T = square_TO.sum(dim=1)
            factor_T = tempering(sum_T)
            sum_2O = torch.stack((square_TO.sum(dim=0), factor_T @ square_TO))
            noted.append(partial(self._note, name, batch, part, sum_2O, sum_T.cpu(), tokens_T))
            told = name not in self._unordered
            products = self._halves.products(name, gradient_TO, factor_T, batch, part) if told else None
            if products is not None:
                noted.append(partial(self._halves.add, name, products))

        with ExitStack() as hooks:
            for linear in self._block.linears:
                see = partial(note, linear.name)
                if isinstance(linear, ExpertLinear):
                    nowhere = torch.zeros(0, dtype=torch.int32), torch.zeros(0)
                    self._routed.setdefault(linear.name, [nowhere for _ in self._sizes])
                    hooks.callback(linear.watch_tokens(see).remove)
                else:
                    hooks.callback(linear.watch(see).remove)
            yield
        for each in noted:
            each()

    def _note(self, name: str, batch: int, part: slice, sum_2O: Tensor, sum_T: Tensor, tokens_T: Tensor | None) -> None:
        length = self._sizes[batch][1]
        if not bool(sum_T.isfinite().all()):
            raise NotDifferentiableError(f"gradients at the outputs of {name} are not finite")
        self._rows[name] = self._rows.get(name, 0.0) + sum_2O.double()
        begin, count = part.start * length, (part.stop - part.start) * length
        if name in self._routed or name in self._unordered:
            self._found.reached[name] = self._found.reached.get(name, 0.0) + len(sum_T)
        if name in self._routed:
            if tokens_T is not None:
                known = self._routed[name][batch]
                found = ((tokens_T.cpu() + begin).int(), sum_T)
                self._routed[name][batch] = torch.cat((known[0], found[0])), torch.cat((known[1], found[1]))
        elif name not in self._unordered and len(sum_T) == count:
            if (leader := self._leaders[name]) not in self._tokens:
                self._tokens[leader] = [torch.zeros(math.prod(size)) for size in self._sizes]
            own = self._tokens[leader]
            own[batch][begin : begin + count] += sum_T

    def close(self) -> None:
        """Hand on what was noted of tokens, and of rows that go together."""
        rows = self._found.rows
        for name, sum_2O in self._rows.items():
            rows[name] = rows.get(name, 0.0) + sum_2O.cpu()
        for name, halves in self._halves.sums.items():
            self._found.coupling[name] = self._store.keep(packed(halves).cpu())
        parted = self._routed.keys() | self._unordered
        ordered = {leader for name, leader in self._leaders.items() if name not in parted}
        for name in sorted(ordered):  # one that was not called has zeros, for another part of the batches may call it
            batches = self._tokens.get(name) or [torch.zeros(math.prod(size)) for size in self._sizes]
            self._found.tokens.setdefault(name, []).extend(batches)
        for name, routed in self._routed.items():
            self._found.routed.setdefault(name, []).extend(routed)


def through(
    block: Block,
    streams: Streams,
    gradients: list[Tensor],
    found: LossWeights,
    behind: tuple[LeftBehind, HandedOn] | None = None,
    numbers: Sequence[int] | None = None,
) -> None:
    """Carry ``gradients`` from the block's outputs to its inputs, and note them at its linears.

    ``behind``: what waits of the blocks behind it. ``numbers``: see ``Halves``.
    """
    left, handed = behind or (LeftBehind(), HandedOn())
    notes = _Notes(block, streams, found, numbers)

    def back(batch: int, part: slice) -> tuple[Tensor, Tensor]:
        gradient = rows_of(gradients[batch], part, streams.sizes[batch][0]).to(streams.device)
        square_T = gradient.float().square().flatten(streams.probe.token_dims).sum(dim=-1).flatten()
        if not bool(square_T.isfinite().all()):
            raise NotDifferentiableError(f"gradients at the output of {block.name} are not finite")
        leaves: list[Tensor] = []
        lent: dict[Place, Tensor] = {}
        states = streams.states(block, batch)

        def call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            leaves.append(args[0].detach().requires_grad_(True))
            (args, kwargs), found = handed.lend(streams.probe.carried[block.index], (args, kwargs))
            lent.update(found)
            return block.module(leaves[0], *args[1:], **kwargs)

        with notes.watch(batch, part):
            left.lend(states)
            returned = streams.run(block, batch, part, call)
            output = hidden_of(returned)
            if not output.requires_grad:
                raise NotDifferentiableError(f"the output of {block.name} does not depend on its input by a gradient")
            with backward_explained(block.name):
                waiting = handed.waiting(streams, block, batch, part, returned)
                left.back(states, [output, *(each for each, _ in waiting)], [gradient, *(each for _, each in waiting)])
        handed.add(streams, batch, part, lent)
        assert leaves[0].grad is not None
        return square_T.cpu(), leaves[0].grad.cpu()

    for batch in range(len(gradients)):
        squares, parts = zip(*streams.in_parts(block, batch, partial(back, batch)), strict=True)
        handed.drop(block, batch)
        found.tokens.setdefault(block.name, []).append(torch.cat(squares))
        gradients[batch] = streams.store.keep(parts[0] if len(parts) == 1 else torch.cat(parts))
    notes.close()
