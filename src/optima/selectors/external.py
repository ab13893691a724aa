"""External masks: whatever someone else chose (MaskLLM, ProxSparse, a colleague), checked before it is used.

Shapes: O outputs (rows), D inputs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from optima.errors import RecipeError
from optima.patterns import NM, Pattern, PatternTable, Scope, Unstructured
from optima.selectors.base import LinearTask, Selection, Target
from optima.selectors.ranking import pruned_in_rows


class Masks(Protocol):
    """Where masks come from: looked up by the name of a linear, in the shape in which the model stores its weight."""

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of the mask."""
        ...

    def keep(self, name: str) -> Tensor:
        """The mask, bool, True = the weight survives."""
        ...


@dataclass(frozen=True)
class Given(Unstructured):
    """The sparsity that an external mask happens to have: any, and of no pattern that is known."""

    def __post_init__(self) -> None:
        """Nothing is asked, so nothing can be wrong."""

    def __str__(self) -> str:
        return "external"


@dataclass(frozen=True)
class External:
    """The mask that ``masks`` has for the linear's name. Selects only; the solver finds the weights.

    Args:
        masks: where masks are looked up.
    """

    masks: Masks
    published_scope: Scope = "layer"
    _targets: dict[str, Target] = field(default_factory=dict, init=False, repr=False, compare=False)

    def expect(self, targets: Sequence[Target]) -> None:
        """Learn how the model stores its weights."""
        self._targets.update({target.name: target for target in targets})

    def check(self, patterns: Mapping[str, Pattern]) -> None:
        """Check the mask of every expected linear against its shape and its pattern.

        Raises:
            RecipeError: naming the first linear whose mask is missing, has another shape or breaks its pattern.
        """
        for name in patterns:
            self._check_shape(name)
        for name, pattern in patterns.items():
            self._check_counts(name, pattern)

    def table(self) -> PatternTable:
        """Each linear's pattern where the recipe asks for none: that of its mask."""
        return _MaskTable(selector=self)

    def keep_OD(self, name: str) -> Tensor:
        """The mask of a linear, on the CPU."""
        self._check_shape(name)
        keep = self.masks.keep(name)
        return keep.mT if self._transposed(name) else keep

    def select(self, task: LinearTask, pattern: Pattern) -> Selection:
        """See ``Selector``."""
        if task.name not in self._targets:
            outputs, inputs = task.weight_OD.shape
            self.expect([Target(task.name, (outputs, inputs))])
        return Selection(self.keep_OD(task.name).to(task.weight_OD.device))

    def _transposed(self, name: str) -> bool:
        return self._targets[name].transposed

    def _check_shape(self, name: str) -> None:
        target = self._targets[name]
        wanted = target.shape[::-1] if target.transposed else target.shape
        found = self.masks.shape(name)
        if found != wanted:
            raise RecipeError(
                f"the external mask of {name} has shape {found}, but the model stores its weight as {wanted}: use "
                "masks that were made for this model"
            )

    def _check_counts(self, name: str, pattern: Pattern) -> None:
        keep_OD = self.keep_OD(name)
        if bool(keep_OD.all()):
            raise RecipeError(
                f"the external mask of {name} prunes nothing: leave the linear out with --ignore '{re.escape(name)}'"
            )
        problem = _broken(keep_OD, pattern)
        if problem:
            raise RecipeError(
                f"the external mask of {name} is not {pattern}: {problem}; leave out --pattern, --sparsity and --scope "
                "to take the mask as it is"
            )


@dataclass(frozen=True)
class _MaskTable(PatternTable):
    selector: External = field(kw_only=True)

    def of(self, name: str) -> Pattern:
        """See ``PatternTable``."""
        keep_OD = self.selector.keep_OD(name)
        return Given(1.0 - float(keep_OD.double().mean()))


def _broken(keep_OD: Tensor, pattern: Pattern) -> str:
    """How a mask misses the exact counts of ``pattern``; empty if it does not."""
    num_outputs, num_inputs = keep_OD.shape
    if isinstance(pattern, Given):
        return ""
    if isinstance(pattern, NM):
        kept_G = keep_OD.reshape(-1, pattern.m).sum(dim=1)
        wrong = (kept_G != pattern.n).nonzero()[:, 0]
        if not len(wrong):
            return ""
        row, group = divmod(int(wrong[0]), num_inputs // pattern.m)
        return f"{len(wrong)} groups keep another number, first {int(kept_G[wrong[0]])} in row {row}, group {group}"
    pruned_OD = ~keep_OD
    if pattern.scope == "row":
        wanted_O, found_O = pruned_in_rows(pattern, num_outputs, num_inputs), pruned_OD.sum(dim=1)
        wrong = (wanted_O != found_O).nonzero()[:, 0]
        first = int(wrong[0]) if len(wrong) else 0
        return f"row {first} prunes {int(found_O[first])}, not {int(wanted_O[first])}" if len(wrong) else ""
    width = pattern.group_size if pattern.scope == "group" else num_inputs
    for begin in range(0, num_inputs, width):
        end = min(begin + width, num_inputs)
        wanted, found = pattern.pruned_in_columns(num_outputs, begin, end), int(pruned_OD[:, begin:end].sum())
        if wanted != found:
            return f"columns {begin} to {end} prune {found} weights, not {wanted}"
    return ""
