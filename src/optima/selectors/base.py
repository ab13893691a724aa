"""The protocol of mask selectors, and their registry.

Shapes: O outputs (rows), D inputs.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from optima.errors import RecipeError
from optima.linalg.hessian import Hessian
from optima.linalg.statistics import Statistics
from optima.patterns import Pattern, Scope


@dataclass(frozen=True)
class LinearTask:
    """What a selector sees of one linear.

    Attributes:
        name: full name of the linear, for messages and for masks that are looked up by name.
        weight_OD: the dense weight, float32 or float64, on the Hessian's device; the selector must not change it.
        statistics: of the linear's inputs.
        gradient_OD: root mean square over calibration samples of the gradient of the block output's l2 norm, by the
            root of the sample's tokens as in H; for selectors that need it.
    """

    name: str
    weight_OD: Tensor
    statistics: Statistics
    gradient_OD: Tensor | None = None

    @property
    def hessian(self) -> Hessian:
        """Of the linear's inputs."""
        return self.statistics.hessian


@dataclass(frozen=True)
class Selection:
    """A selector's answer for one linear.

    Attributes:
        keep_OD: boolean, True = the weight survives.
        weight_OD: the selector's own update of the weights (zero off keep), or None if it only selects.
    """

    keep_OD: Tensor
    weight_OD: Tensor | None = None


@runtime_checkable
class Selector(Protocol):
    """Chooses which weights survive. Sees one layer and a pattern: never a model or a file.

    A selector that scores with gradients has, beyond this, ``needs_gradient = True`` (see ``NeedsGradient``); one that
    must know all linears beforehand has ``expect`` (see ``ExpectsTargets``); one that holds or computes much has
    ``cost`` (see ``Cost``).
    """

    @property
    def published_scope(self) -> Scope:
        """Scope of unstructured sparsity in the method's paper, used when the recipe names none."""
        ...

    def select(self, task: LinearTask, pattern: Pattern) -> Selection:
        """Choose the survivors among the weights of ``layer``."""
        ...


@runtime_checkable
class NeedsGradient(Protocol):
    """A selector that says whether it needs ``gradient_OD``, which costs a backward pass through every block."""

    needs_gradient: bool


def needs_gradient(selector: Selector) -> bool:
    """Whether ``selector`` needs gradients: one that does not say does not."""
    return isinstance(selector, NeedsGradient) and selector.needs_gradient


@dataclass(frozen=True)
class Cost:
    """What a selector takes, for a plan: most bytes at a time, without the Hessian and the weights, and operations.

    Attributes:
        per_square: bytes for each entry of a D x D matrix, with what it lets the Hessian prepare.
        per_weight: bytes for each weight.
        kept_per_square: of ``per_square``, what lives on as long as the Hessian, beside its factorisation.
        products: of the weights with a D x D matrix, typically.
    """

    per_square: int
    per_weight: int
    kept_per_square: int = 0
    products: int = 0


# Scores and a mask; for a selector that does not say.
SCORES = Cost(per_square=0, per_weight=12)


def cost_of(selector: Selector) -> Cost:
    """What ``selector`` takes: one that does not say is taken to hold scores and a mask."""
    cost = getattr(selector, "cost", None)
    return cost if isinstance(cost, Cost) else SCORES


@dataclass(frozen=True)
class Target:
    """A linear that will be pruned.

    Attributes:
        name: its full name.
        shape: (outputs, inputs).
        transposed: True if the model stores its weight as inputs x outputs.
    """

    name: str
    shape: tuple[int, int]
    transposed: bool = False


@runtime_checkable
class ExpectsTargets(Protocol):
    """A selector that is told of every linear before the first is pruned."""

    def expect(self, targets: Sequence[Target]) -> None:
        """Remember ``targets``."""
        ...


SELECTORS = {
    "magnitude": "magnitude:Magnitude",
    "wanda": "wanda:Wanda",
    "ria": "ria:RIA",
    "gradient": "gradient:Gradient",
    "sparsegpt": "sparsegpt:SparseGPT",
    "thanos": "thanos:Thanos",
    "admm": "admm:ADMM",
    "alps": "alps:ALPS",
    "optima": "optima:Optima",
}
SELECTOR_NAMES = (*SELECTORS, "external")


def make_selector(name: str) -> Selector:
    """The selector called ``name``, or an instance of the class that ``package.module:Class`` names.

    Modules are looked for in the current directory too.

    Raises:
        RecipeError: if the name is unknown, or does not lead to a selector.
    """
    if name in SELECTORS:
        return _load(f"optima.selectors.{SELECTORS[name]}")
    if ":" in name:
        return _load(name)
    if name == "external":
        raise RecipeError("selector external takes its masks from mask_from: name a checkpoint or a file of masks")
    known = ", ".join(SELECTOR_NAMES)
    raise RecipeError(f"unknown selector {name!r}: known selectors are {known}, or your own as package.module:Class")


@contextmanager
def _current_directory_importable() -> Iterator[None]:
    """An installed command does not look for modules there."""
    here = os.getcwd()
    known = here in sys.path or "" in sys.path
    if not known:
        sys.path.append(here)
    try:
        yield
    finally:
        if not known:
            sys.path.remove(here)


def _load(path: str) -> Selector:
    module_name, _, class_name = path.partition(":")
    try:
        with _current_directory_importable():
            module = importlib.import_module(module_name)
    except (ImportError, ValueError) as error:
        raise RecipeError(f"selector {path}: {module_name} cannot be imported ({error})") from error
    if class_name not in vars(module):
        raise RecipeError(f"selector {path}: {module_name} has no {class_name}")
    try:
        selector = vars(module)[class_name]()
    except TypeError as error:
        raise RecipeError(f"selector {path} cannot be made without arguments ({error})") from error
    if not isinstance(selector, Selector):
        raise RecipeError(f"selector {path} is no selector: it needs published_scope and select(task, pattern)")
    return selector
