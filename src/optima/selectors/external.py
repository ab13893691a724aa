"""External masks: whatever someone else chose (MaskLLM, ProxSparse, a colleague), checked before it is used.

Shapes: O outputs (rows), D inputs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from optima.errors import RecipeError
from optima.patterns import MaskPattern, Pattern, Scope
from optima.selectors.base import LinearTask, Selection
from optima.selectors.ranking import count_error


class Masks(Protocol):
    """Where masks come from."""

    def keep_OD(self, linear: Any) -> Tensor:
        """The mask of a linear of the model, bool, outputs x inputs, True = the weight survives."""
        ...


@dataclass(frozen=True)
class External:
    """The mask that ``masks`` has for the linear's name. Selects only; the solver finds the weights."""

    masks: Masks
    takes_any_mask = True  # where the recipe has no pattern
    published_scope: Scope = "layer"
    _linears: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def check(
        self, linears: Sequence[Any], patterns: Mapping[str, Pattern], ignore: Sequence[str]
    ) -> dict[str, Pattern]:
        """The patterns of the linears to prune: those of ``patterns``, or else what their masks happen to have.

        Raises:
            RecipeError: if a mask is missing, has another shape, prunes nothing, or breaks its pattern.
        """
        found: dict[str, Pattern] = {}
        idle: list[str] = []
        for linear in linears:
            name = linear.name
            self._linears[name] = linear
            keep_OD = self.masks.keep_OD(linear)
            if bool(keep_OD.all()):
                idle.append(name)
                continue
            found[name] = patterns.get(name) or MaskPattern(1.0 - float(keep_OD.double().mean()))
            if problem := count_error(keep_OD, found[name]):
                raise RecipeError(
                    f"the external mask of {name} is not {found[name]}: {problem}; leave out --pattern, --sparsity and "
                    "--scope to take the mask as it is"
                )
        if idle and not found:
            raise RecipeError("mask_from prunes nothing: name a pruned checkpoint, or its masks")
        if idle:
            regexes = " ".join(f"'{each}'" for each in (*ignore, *map(re.escape, idle)))
            raise RecipeError(f"the masks of {len(idle)} linears prune nothing: exclude them by --ignore {regexes}")
        return found

    def select(self, task: LinearTask, pattern: Pattern) -> Selection:
        """See ``Selector``."""
        return Selection(self.masks.keep_OD(self._linears[task.name]).to(task.weight_OD.device))
