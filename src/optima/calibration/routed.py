"""What a module of experts was called with in each batch: from it, its experts can be run again on their own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from optima.calibration.halving import rows_of
from optima.calibration.streams import Streams, Watched, map_tensors
from optima.errors import ModelError
from optima.models.blocks import Block, Linear
from optima.models.moe import ExpertLinear, FusedExperts

Group = tuple[Linear, ...]


@dataclass
class Recorded:
    """Calls of a module of experts.

    Attributes:
        experts: the module.
        groups: its linears to prune, by the input that they share.
        streams: what enters the block.
        calls: the batch and its samples, and the arguments on the CPU, of each call.
    """

    experts: FusedExperts
    groups: list[Group]
    streams: Streams
    calls: list[tuple[int, slice, tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)

    def note(self, batch: int, part: slice, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep a call."""

        def kept(tensor: Tensor) -> Tensor:
            return self.streams.store.keep(tensor.detach().to("cpu", copy=True))

        self.calls.append((batch, part, map_tensors(args, kept), map_tensors(kwargs, kept)))

    def run(self, place: int, watched: Watched) -> None:
        """The call number ``place`` again, for the experts that are watched.

        Args:
            place: in ``calls``.
            watched: what surrounds it; given the batch and the samples of it that run together.
        """
        batch, part, args, kwargs = self.calls[place]
        samples = part.stop - part.start

        def run(own: slice) -> None:
            inputs = map_tensors((args, kwargs), lambda tensor: rows_of(tensor, own, samples).to(self.streams.device))
            with watched(batch, slice(part.start + own.start, part.start + own.stop)), self.experts.only_watched():
                self.experts.module(*inputs[0], **inputs[1])

        self.streams.halving.over(samples, run, self._inseparable(samples, args, kwargs))

    def _inseparable(self, samples: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        """Why a call cannot be taken apart into samples: the rows of each tensor must be theirs, in order."""
        given = _tensors(args, kwargs)
        odd = any(not tensor.ndim or len(tensor) % samples for tensor in given)
        # One tensor alone has the tokens of each expert in turn (Llama 4).
        if samples > 1 and (len(given) == 1 or odd or self.streams.probe.sample_dim):
            return f"{self.experts.name} is called with what cannot be taken apart into samples"
        return ""

    def run_all(self, hidden_ND: Tensor, expert: int) -> None:
        """``hidden_ND`` through the module, as though all of them were routed to ``expert``.

        Raises:
            ModelError: if the module is called with other things than hidden states and their routing.
        """
        *_, args, kwargs = self.calls[0]
        values = _tensors(args, kwargs)
        count, device = len(hidden_ND), hidden_ND.device
        replaced = {id(values[0]): hidden_ND}
        if len(values) == 1:  # every expert is given every token (Llama 4)
            replaced[id(values[0])] = hidden_ND.repeat(self.experts.count, 1)
        elif len(values) == 3 and [value.is_floating_point() for value in values[1:]].count(True) == 1:
            for value in values[1:]:
                fill = 1 if value.is_floating_point() else expert
                replaced[id(value)] = torch.full((count, 1), fill, dtype=value.dtype, device=device)
        else:
            raise ModelError(
                f"{self.experts.name} is called with {len(values)} tensors, not with hidden states, the numbers of "
                "experts and their weights: leave its experts out with --ignore experts"
            )
        args, kwargs = map_tensors((args, kwargs), lambda tensor: replaced[id(tensor)])
        with self.experts.only_watched():
            self.experts.module(*args, **kwargs)


def _tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    found: list[Tensor] = []
    map_tensors((args, kwargs), found.append)
    return found


def recorders(block: Block, streams: Streams) -> list[Recorded]:
    """One for each module of experts whose linears in ``block`` are pruned."""
    found: dict[str, Recorded] = {}
    for group in streams.groups(block):
        if isinstance(group[0], ExpertLinear):
            experts = group[0].experts
            found.setdefault(experts.name, Recorded(experts, [], streams)).groups.append(group)
    return list(found.values())
