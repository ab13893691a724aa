"""OPTIMA: one-shot pruning of transformers, solved to a certified optimum, then tuned block by block."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optima.errors import OptimaError as OptimaError
    from optima.extras.compress import compress as compress, restore as restore
    from optima.extras.mask_preserving import preserve_masks as preserve_masks
    from optima.extras.permute import Permutation as Permutation, permute as permute
    from optima.extras.semi_structured import accelerate as accelerate
    from optima.hub import push as push
    from optima.patterns import NM as NM, Unstructured as Unstructured
    from optima.recipe import Recipe as Recipe, Shrink as Shrink, load_recipe as load_recipe
    from optima.reporting.callbacks import BlockEvent as BlockEvent, Callback as Callback, RunStart as RunStart
    from optima.reporting.record import Report as Report, load_report as load_report
    from optima.run import prune as prune
    from optima.shrinking import shrink as shrink

__version__ = "0.1.0"

_NAMES = {
    "errors": ["OptimaError"],
    "extras.compress": ["compress", "restore"],
    "extras.mask_preserving": ["preserve_masks"],
    "extras.permute": ["Permutation", "permute"],
    "extras.semi_structured": ["accelerate"],
    "hub": ["push"],
    "patterns": ["NM", "Unstructured"],
    "recipe": ["Recipe", "Shrink", "load_recipe"],
    "reporting.callbacks": ["BlockEvent", "Callback", "RunStart"],
    "reporting.record": ["Report", "load_report"],
    "run": ["prune"],
    "shrinking": ["shrink"],
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names}
__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for: torch alone takes seconds."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
