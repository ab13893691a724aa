"""What became of the channels of a model, as ``ordering.json`` tells it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from optima.extras.channels import KINDS, Kind


@dataclass(frozen=True)
class Ordered:
    """What became of channels.

    Attributes:
        kind, name: see ``Channels``.
        lost: what the pattern would prune of their readers' saliency, relative to before; of heads the mean of
            that and the same of what writes their values.
        order: for each place the number that its channel had there; None of heads, which are turned.
        turn: of heads the SHA-256 of the matrices that turn them. These follow from the weights of both models.
    """

    kind: Kind
    name: str
    lost: float
    order: list[int] | None = None
    turn: str | None = None


@dataclass(frozen=True)
class Ordering:
    """What ``order`` did, as in ``ordering.json``.

    Attributes:
        model: as it was named.
        recipe: as resolved.
        channels: those that have another order now, or are turned.
        notes: which stay where they were, and why.
        seconds: of the whole run.
    """

    model: str
    recipe: dict[str, Any]
    channels: tuple[Ordered, ...]
    notes: tuple[str, ...]
    seconds: float

    def summary(self) -> list[tuple[Kind, int, float]]:
        """Each kind, how many of it are ordered or turned, and the mean of ``lost``."""
        own = {kind: [each.lost for each in self.channels if each.kind == kind] for kind in KINDS}
        return [(kind, len(lost), sum(lost) / len(lost)) for kind, lost in own.items() if lost]
