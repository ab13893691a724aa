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
from optima.core.statistics import Statistics
from optima.errors import RecipeError
from optima.patterns import Pattern, Scope


@dataclass(frozen=True)
class LinearTask:
    """What a selector sees of one linear.

    Attributes:
        name: full name of the linear, for messages and for masks that are looked up by name.
        weight_OD: the dense weight, float32 or float64, on the Hessian's device; the selector must not change it.
        statistics: of the linear's inputs.
        row_weight_O: what the model's loss feels of each row, positive, of any scale; None if rows count alike. What a
            selector gets from ``prune_linear`` is scaled by its root already.
        coupling_OO: how rows go together in the loss, see ``calibration.correlation``; for selectors that need it, and
            None where it is not known.
    """

    name: str
    weight_OD: Tensor
    statistics: Statistics
    row_weight_O: Tensor | None = None
    coupling_OO: Tensor | None = None

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
    """Chooses which weights survive. Sees one linear and a pattern: never a model or a file.

    Beyond this, a selector may have ``needs``: a frozenset of what calibration must find for it (see ``needs_of``).
    """

    @property
    def published_scope(self) -> Scope:
        """Scope of unstructured sparsity in the method's paper, used when the recipe names none."""
        ...

    def select(self, task: LinearTask, pattern: Pattern) -> Selection:
        """Choose the survivors among the weights of ``task``."""
        ...


def needs_of(selector: Selector) -> frozenset[str]:
    """What calibration must find for ``selector`` beyond the statistics.

    ``coupling`` for ``coupling_OO``, which there is by objective loss alone.

    Raises:
        RecipeError: if it asks for what nothing can give.
    """
    asked = getattr(selector, "needs", ())
    needs = frozenset((asked,) if isinstance(asked, str) else asked)
    if unknown := needs - NEEDS:
        known = ", ".join(sorted(NEEDS))
        raise RecipeError(
            f"selector {type(selector).__name__} needs {', '.join(sorted(unknown))}: known needs are {known}"
        )
    return needs


NEEDS = frozenset({"coupling"})
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
    """The package's own selector called ``name``, at its published settings.

    Raises:
        RecipeError: if the name is none of ``SELECTORS``.
    """
    if name not in SELECTORS:
        raise RecipeError(
            f"unknown selector {name!r}: known selectors are {', '.join(SELECTORS)}, external with mask_from, or your "
            "own as package.module:Class"
        )
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
    if "/" in module_name or module_name.endswith(".py"):
        name = module_name.rpartition("/")[2].removesuffix(".py")
        raise RecipeError(f"selector {path}: write {name}:{class_name}, and run from the directory of {name}.py")
    if not module_name or module_name.startswith("."):  # import_module takes neither
        raise RecipeError(f"selector {path}: name a whole module before the colon, as package.module:Class does")
    known = "" in sys.path
    if not known:
        sys.path.append("")
    try:
        module = importlib.import_module(module_name)
    except SyntaxError as error:
        place = f"line {error.lineno} of {error.filename}"
        raise RecipeError(f"selector {path}: {place} is not Python ({error.msg}): correct it") from error
    except ImportError as error:
        raise RecipeError(
            f"selector {path}: {module_name} cannot be imported ({error}): install it, or run from its directory"
        ) from error
    finally:
        if not known:
            sys.path.remove("")
    if class_name not in vars(module):
        raise RecipeError(f"selector {path}: {module_name} has no {class_name}: name a class of it")
    try:
        selector = vars(module)[class_name]()
    except TypeError as error:
        raise RecipeError(f"selector {path} cannot be made without arguments ({error}): give them defaults") from error
    if not isinstance(selector, Selector):
        raise RecipeError(f"selector {path} is no selector: it needs published_scope and select(task, pattern)")
    return selector
