"""The protocol of mask selectors, and their registry.

Shapes: O outputs (rows), D inputs.
"""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from optima.core.hessian import Hessian
from optima.errors import RecipeError
from optima.patterns import Pattern, Scope


@dataclass(frozen=True)
class LinearTask:
    """What a selector sees of one linear.

    Attributes:
        name: full name of the linear, for messages and for masks that are looked up by name.
        weight_OD: the dense weight, float32 or float64, on the Hessian's device; the selector must not change it.
        hessian: of the linear's inputs.
        row_weight_O: Fisher weights of the rows, positive, of any scale; None if rows count alike. What a selector
            gets from ``prune_linear`` is scaled by their roots already.
        coupling_OO: row correlation, see ``calibration.weights``; None where it is not known.
    """

    name: str
    weight_OD: Tensor
    hessian: Hessian
    row_weight_O: Tensor | None = None
    coupling_OO: Tensor | None = None


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
    """Chooses which weights survive. Sees one linear and a pattern: never a model or a file.

    A selector that uses ``coupling_OO`` says so by an attribute ``needs = {"coupling"}``.
    """

    @property
    def published_scope(self) -> Scope:
        """Scope of unstructured sparsity in the method's paper, used when the recipe names none."""
        ...

    def select(self, task: LinearTask, pattern: Pattern) -> Selection:
        """Choose the survivors among the weights of ``task``."""
        ...


SELECTORS = {
    "magnitude": "scores:Magnitude",
    "wanda": "scores:Wanda",
    "ria": "scores:RIA",
    "sparsegpt": "sparsegpt:SparseGPT",
    "thanos": "thanos:Thanos",
    "admm": "admm:ADMM",
    "alps": "alps:ALPS",
    "optima": "optima:Optima",
}


def make_selector(name: str) -> Selector:
    """The package's own selector called ``name``, at its published settings."""
    module, _, class_name = SELECTORS[name].partition(":")
    selector: Selector = getattr(importlib.import_module(f"optima.selectors.{module}"), class_name)()
    return selector


def load_foreign(path: str) -> Selector:
    """An instance of the class that ``package.module:Class`` names. Importing it runs its code.

    Modules are looked for in the current directory too, as an installed command does not.

    Raises:
        RecipeError: if the path does not lead to a selector.
    """
    module_name, _, class_name = path.partition(":")
    added = [] if "" in sys.path else [""]
    sys.path += added
    try:
        selector = getattr(importlib.import_module(module_name), class_name)()
    except (ImportError, AttributeError, SyntaxError, TypeError, ValueError) as error:
        raise RecipeError(
            f"selector {path} cannot be loaded ({error}): write module:Class, for a class that needs no arguments in a "
            "module that is installed or in the current directory"
        ) from error
    finally:
        for each in added:
            sys.path.remove(each)
    if not isinstance(selector, Selector):
        raise RecipeError(f"selector {path} is not a selector: it needs published_scope and select(task, pattern)")
    return selector
