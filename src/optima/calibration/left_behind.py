"""Gradients through keys and values that a block leaves in a state, where later blocks read them (Gemma 3n, Gemma 4).

A block on the way back is given what it reads as leaves. Their gradients wait for the block that wrote it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from optima.calibration.streams import map_tensors

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

    def back(self, states: Sequence[State], output: Tensor, gradient: Tensor) -> None:
        """Go back through a block from its output, and from what it wrote to the states."""
        written, gradients = [output], [gradient]
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


def _plain(tensor: Tensor) -> Tensor:
    """Without its history, in main memory, and fit for gradients."""
    return (tensor.detach().clone() if tensor.is_inference() else tensor.detach()).cpu()
