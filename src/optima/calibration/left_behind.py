"""Gradients through what a block leaves for later ones besides hidden states.

That are keys and values in a state (Gemma 3n, Gemma 4), and what it returns beside hidden states (ZAYA's router
states). A block on the way back is given what it reads as leaves. Their gradients wait for the block that wrote it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from optima.calibration.probe import Place
from optima.calibration.streams import Call, Streams, map_tensors, piece
from optima.models.stacks import Block

State = MutableMapping[Any, Any]


class LeftBehind:
    """What of each state waits for its writer, on one way back through the blocks."""

    def __init__(self) -> None:
        self._waiting: defaultdict[tuple[int, Any], list[Tensor]] = defaultdict(list)  # by state and key
        self._lent: dict[tuple[int, Any], tuple[Any, list[Tensor]]] = {}

    def lend(self, states: Sequence[State]) -> None:
        """Put leaves in the place of all tensors in the states that a block is about to be given."""
        self._lent.clear()
        for state in states:
            for key, value in state.items():
                leaves: list[Tensor] = []

                def leaf(tensor: Tensor, leaves: list[Tensor] = leaves) -> Tensor:
                    leaves.append(_plain(tensor).requires_grad_(tensor.is_floating_point()))
                    return leaves[-1]

                state[key] = map_tensors(value, leaf)
                self._lent[id(state), key] = state[key], leaves

    def back(self, states: Sequence[State], outputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        """Go back through a block from its outputs, and from what it wrote to the states."""
        written, gradients = [*outputs], [*gradients]
        for state in states:
            for key, value in state.items():
                if self._is_lent(state, key):
                    continue
                own: list[Tensor] = []
                map_tensors(value, own.append)
                waiting = self._waiting.pop((id(state), key), [])
                for tensor, later in zip(own, waiting, strict=bool(waiting)):
                    if tensor.requires_grad:
                        written.append(tensor)
                        gradients.append(later.to(tensor.device))
        torch.autograd.backward(written, gradients)
        for state in states:
            for key, value in state.items():
                if self._is_lent(state, key):
                    self._add((id(state), key), self._lent[id(state), key][1])
                state[key] = map_tensors(value, _plain)

    def _is_lent(self, state: State, key: Any) -> bool:
        lent = self._lent.get((id(state), key))
        return lent is not None and lent[0] is state[key]

    def _add(self, place: tuple[int, Any], leaves: Sequence[Tensor]) -> None:
        if all(leaf.grad is None for leaf in leaves):
            return
        found = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
        known = self._waiting[place]
        self._waiting[place] = [one + other for one, other in zip(known, found, strict=True)] if known else found


class HandedOn:
    """Gradients of what blocks returned besides hidden states, which wait for them on one way back."""

    def __init__(self) -> None:
        self._waiting: defaultdict[tuple[int, int], dict[Place, Tensor]] = defaultdict(dict)  # by batch and block

    def lend(self, carried: Mapping[int | str, Place], call: Call) -> tuple[Call, dict[Place, Tensor]]:
        """A call of a block, hidden states first, with leaves for what is ``carried`` to it; and these leaves."""
        args, kwargs, leaves = [*call[0]], {**call[1]}, dict[Place, Tensor]()
        for argument, source in carried.items():
            where: Any = args if isinstance(argument, int) else kwargs
            at = argument + 1 if isinstance(argument, int) else argument
            # What has nothing for each token depends on no hidden states: T5's position bias.
            of_tokens = where[at].shape[:2] == args[0].shape[:2]
            if of_tokens and where[at].is_floating_point():
                where[at] = leaves[source] = where[at].detach().requires_grad_(True)
        return (tuple(args), kwargs), leaves

    def waiting(
        self, streams: Streams, block: Block, batch: int, part: slice, output: Any
    ) -> list[tuple[Tensor, Tensor]]:
        """What the block returned of samples of a batch for later blocks, each with its gradient."""
        own, samples = self._waiting.get((batch, block.index), {}), streams.sizes[batch][0]
        found = [(output[place], piece(each, part, samples)) for (_, place), each in own.items()]
        return [(tensor, each.to(tensor.device)) for tensor, each in found if tensor.requires_grad]

    def add(self, streams: Streams, batch: int, part: slice, leaves: Mapping[Place, Tensor]) -> None:
        """Keep the gradients of a block's leaves for samples of a batch."""
        for source, leaf in leaves.items():
            if leaf.grad is not None:
                carried, samples = streams.carried[batch][source], streams.sizes[batch][0]
                whole = self._waiting[batch, source[0]].setdefault(source, torch.zeros_like(carried))
                piece(whole, part, samples).add_(leaf.grad.to("cpu"))

    def drop(self, block: Block, batch: int) -> None:
        """The block has gone back through a batch."""
        self._waiting.pop((batch, block.index), None)


def _plain(tensor: Tensor) -> Tensor:
    """Without its history, in main memory, and fit for gradients."""
    return (tensor.detach().clone() if tensor.is_inference() else tensor.detach()).cpu()
