"""What a module of experts was called with in each batch: from it, its experts can be run again on their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from optima.calibration.store import Store
from optima.calibration.streams import map_tensors
from optima.errors import ModelError
from optima.models.experts import ExpertLinear, FusedExperts
from optima.models.stacks import Linear

Group = tuple[Linear, ...]


@dataclass
class Recorded:
    """Calls of a module of experts.

    Attributes:
        experts: the module.
        groups: its linears to prune, by the input that they share.
        store: keeps what is recorded.
        calls: the batch, and the arguments on the CPU, of each call.
    """

    experts: FusedExperts
    groups: list[Group]
    store: Store
    calls: list[tuple[int, tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)

    def note(self, batch: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep a call."""

        def kept(tensor: Tensor) -> Tensor:
            return self.store.keep(tensor.detach().to("cpu", copy=True))

        self.calls.append((batch, map_tensors(args, kept), map_tensors(kwargs, kept)))

    def run(self, place: int, device: torch.device) -> None:
        """The call number ``place`` again, for the experts that are watched."""
        _, args, kwargs = self.calls[place]
        args, kwargs = map_tensors((args, kwargs), lambda tensor: tensor.to(device))
        with self.experts.only_watched():
            self.experts.module(*args, **kwargs)

    def run_all(self, hidden_ND: Tensor, expert: int) -> None:
        """``hidden_ND`` through the module, as though all of them were routed to ``expert``.

        Raises:
            ModelError: if the module is called with other things than hidden states and their routing.
        """
        _, args, kwargs = self.calls[0]
        values = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
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


def recorders(groups: Sequence[Group], store: Store) -> list[Recorded]:
    """One for each module of experts in ``groups`` of a block's linears."""
    found: dict[str, Recorded] = {}
    for group in groups:
        if isinstance(group[0], ExpertLinear):
            experts = group[0].experts
            found.setdefault(experts.name, Recorded(experts, [], store)).groups.append(group)
    return list(found.values())
