"""The protocol of mask selectors, and their registry.

Shapes: O outputs (rows), D inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from optima.errors import RecipeError
from optima.patterns import Pattern, Scope
from optima.qp.hessian import Hessian


@dataclass(frozen=True)
class Selection:
    """A selector's answer for one linear.

    Attributes:
        keep_OD: boolean, True = the weight survives.
        weight_OD: the selector's own update of the weights (zero off keep), or None if it only selects.
    """

    keep_OD: Tensor
    weight_OD: Tensor | None = None


class Selector(Protocol):
    """Chooses which weights survive. Sees one weight, its Hessian and a pattern: never a model or a file."""

    @property
    def published_scope(self) -> Scope:
        """Scope of unstructured sparsity in the method's paper, used when the recipe names none."""
        ...

    def select(self, weight_OD: Tensor, hessian: Hessian, pattern: Pattern) -> Selection:
        """Choose the survivors of ``weight_OD`` (float32 or float64, on the Hessian's device)."""
        ...


def make_selector(name: str) -> Selector:
    """The selector called ``name``.

    Raises:
        RecipeError: if the name is unknown.
    """
    from optima.selectors.magnitude import Magnitude
    from optima.selectors.sparsegpt import SparseGPT
    from optima.selectors.wanda import Wanda

    selectors: dict[str, type[Selector]] = {"magnitude": Magnitude, "wanda": Wanda, "sparsegpt": SparseGPT}
    if name not in selectors:
        raise RecipeError(f"unknown selector {name!r}: known selectors are {', '.join(selectors)}")
    return selectors[name]()


SELECTOR_NAMES = ("magnitude", "wanda", "sparsegpt")
