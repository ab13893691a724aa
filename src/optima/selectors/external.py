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
from optima.patterns import Given, Pattern, Scope
from optima.selectors.base import LinearTask, Selection
from optima.selectors.ranking import count_error


class Masks(Protocol):
    """Where masks come from."""

    def keep_OD(self, linear: Any) -> Tensor:
        """The mask of a linear of the model, bool, outputs x inputs, True = the weight survives."""
        ...


@dataclass(frozen=True)
class External:
    """The mask that ``masks`` has for the linear's name. Selects only; the solver finds the weights.

    Args:
        masks: where masks are looked up.
    """

    masks: Masks
    takes_given = True  # where no pattern is named, masks are taken as they are
    published_scope: Scope = "layer"
    _linears: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def check(
        self, linears: Sequence[Any], patterns: Mapping[str, Pattern], ignore: Sequence[str]
    ) -> dict[str, Pattern]:
        """The patterns of linears under their masks: those asked for or else what the masks happen to have.

        Args:
            linears: to prune.
            patterns: those asked for, by name.
            ignore: regexes that exclude others, for the remedy.

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
            elif (pattern := patterns.get(name)) is None:
                found[name] = Given(1.0 - float(keep_OD.double().mean()))
            elif problem := count_error(keep_OD, pattern):
                raise RecipeError(
                    f"the external mask of {name} is not {pattern}: {problem}; leave out --pattern, --sparsity and "
                    "--scope to take the mask as it is"
                )
            else:
                found[name] = pattern
        if idle and not found:
            raise RecipeError("mask_from prunes nothing: name a pruned checkpoint, or its masks")
        if idle:
            regexes = " ".join(f"'{each}'" for each in (*ignore, *map(re.escape, idle)))
            raise RecipeError(f"the masks of {len(idle)} linears prune nothing: exclude them by --ignore {regexes}")
        return found

    def select(self, task: LinearTask, pattern: Pattern) -> Selection:
        """See ``Selector``."""
        return Selection(self.masks.keep_OD(self._linears[task.name]).to(task.weight_OD.device))
