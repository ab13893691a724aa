"""External masks: whatever someone else chose (MaskLLM, ProxSparse, a colleague), checked before it is used.

Shapes: O outputs (rows), D inputs.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
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

    def __post_init__(self) -> None:
        if not callable(getattr(self.masks, "keep_OD", None)):
            raise RecipeError(
                f"masks of type {type(self.masks).__name__} have no method keep_OD(linear), which gives the mask of a "
                "linear: see optima.selectors.external.Masks"
            )

    def check(self, linear: Any, pattern: Pattern | None) -> Pattern:
        """The pattern of a linear under its mask: the one asked for or, if that is None, what the mask happens to have.

        Raises:
            RecipeError: if the mask is missing, has another shape, prunes nothing, or breaks the pattern.
        """
        name = linear.name
        self._linears[name] = linear
        keep_OD = self.masks.keep_OD(linear)
        if bool(keep_OD.all()):
            raise RecipeError(_idle([name], ()))
        if pattern is None:
            return Given(1.0 - float(keep_OD.double().mean()))
        if problem := count_error(keep_OD, pattern):
            raise RecipeError(
                f"the external mask of {name} is not {pattern}: {problem}; leave out --pattern, --sparsity and --scope "
                "to take the mask as it is"
            )
        return pattern

    def check_all(self, linears: Sequence[Any], ignore: Sequence[str]) -> None:
        """Raise ``RecipeError`` if masks of ``linears`` prune nothing; all are named, with what else to ``ignore``."""
        idle = [linear.name for linear in linears if bool(self.masks.keep_OD(linear).all())]
        if idle and len(idle) == len(linears):
            raise RecipeError(
                "mask_from prunes nothing of what is to be pruned: name a pruned checkpoint, or its masks"
            )
        if idle:
            raise RecipeError(_idle(idle, ignore))

    def select(self, task: LinearTask, pattern: Pattern) -> Selection:
        """See ``Selector``."""
        return Selection(self.masks.keep_OD(self._linears[task.name]).to(task.weight_OD.device))


def _idle(names: Sequence[str], ignore: Sequence[str]) -> str:
    """What to do about masks of these linears that prune nothing."""
    which = f"mask of {names[0]} prunes" if len(names) == 1 else f"masks of {len(names)} linears prune"
    regexes = " ".join(f"'{each}'" for each in (*ignore, *map(re.escape, names)))
    return f"the external {which} nothing: leave out what is dense with --ignore {regexes}"
