"""The protocol of mask selectors, and their registry.

Shapes: O outputs (rows), D inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from optima.errors import RecipeError
from optima.patterns import Pattern, Scope
from optima.qp.hessian import Hessian


@dataclass(frozen=True)
class Layer:
    """What a selector sees of one linear.

    Attributes:
        name: full name of the linear, for messages and for masks that are looked up by name.
        weight_OD: the dense weight, float32 or float64, on the Hessian's device; the selector must not change it.
        hessian: of the linear's inputs.
        gradient_OD: root mean square over calibration samples of the gradient of the block output's l2 norm, for
            selectors that need it.
    """

    name: str
    weight_OD: Tensor
    hessian: Hessian
    gradient_OD: Tensor | None = None


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
    """Chooses which weights survive. Sees one layer and a pattern: never a model or a file.

    A selector that scores with gradients has, beyond this, ``needs_gradient = True`` (see ``NeedsGradient``).
    """

    @property
    def published_scope(self) -> Scope:
        """Scope of unstructured sparsity in the method's paper, used when the recipe names none."""
        ...

    def select(self, layer: Layer, pattern: Pattern) -> Selection:
        """Choose the survivors among the weights of ``layer``."""
        ...


@runtime_checkable
class NeedsGradient(Protocol):
    """A selector that says whether it needs ``Layer.gradient_OD``, which costs a backward pass through every block."""

    needs_gradient: bool


def needs_gradient(selector: Selector) -> bool:
    """Whether ``selector`` needs gradients: one that does not say does not."""
    return isinstance(selector, NeedsGradient) and selector.needs_gradient


def make_selector(name: str) -> Selector:
    """The selector called ``name``.

    Raises:
        RecipeError: if the name is unknown.
    """
    from optima.selectors.admm import ADMM
    from optima.selectors.alps import ALPS
    from optima.selectors.magnitude import Magnitude
    from optima.selectors.ria import RIA
    from optima.selectors.sparsegpt import SparseGPT
    from optima.selectors.thanos import Thanos
    from optima.selectors.wanda import Wanda

    selectors: dict[str, type[Selector]] = {
        "magnitude": Magnitude,
        "wanda": Wanda,
        "ria": RIA,
        "sparsegpt": SparseGPT,
        "thanos": Thanos,
        "admm": ADMM,
        "alps": ALPS,
    }
    if name not in selectors:
        raise RecipeError(f"unknown selector {name!r}: known selectors are {', '.join(selectors)}")
    return selectors[name]()


SELECTOR_NAMES = ("magnitude", "wanda", "ria", "sparsegpt", "thanos", "admm", "alps")
