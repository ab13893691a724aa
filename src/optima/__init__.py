"""OPTIMA: one-shot pruning of transformers, solved to a certified optimum, then tuned block by block."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optima.errors import OptimaError
    from optima.extras.compress import compress, restore
    from optima.extras.mask_preserving import preserve_masks
    from optima.extras.permute import Permutation, permute
    from optima.extras.semi_structured import accelerate
    from optima.hub import push
    from optima.patterns import NM, Unstructured
    from optima.recipe import Recipe, load_recipe
    from optima.reporting.callbacks import BlockEvent, Callback, RunStart
    from optima.reporting.record import Report, load_report
    from optima.run import prune

__all__ = [
    "NM",
    "BlockEvent",
    "Callback",
    "OptimaError",
    "Permutation",
    "Recipe",
    "Report",
    "RunStart",
    "Unstructured",
    "accelerate",
    "compress",
    "load_recipe",
    "load_report",
    "permute",
    "preserve_masks",
    "prune",
    "push",
    "restore",
]
__version__ = "0.1.0"

_HOMES = {
    "BlockEvent": "reporting.callbacks",
    "Callback": "reporting.callbacks",
    "NM": "patterns",
    "OptimaError": "errors",
    "Permutation": "extras.permute",
    "Recipe": "recipe",
    "Report": "reporting.record",
    "RunStart": "reporting.callbacks",
    "Unstructured": "patterns",
    "accelerate": "extras.semi_structured",
    "compress": "extras.compress",
    "load_recipe": "recipe",
    "load_report": "reporting.record",
    "permute": "extras.permute",
    "preserve_masks": "extras.mask_preserving",
    "prune": "run",
    "push": "hub",
    "restore": "extras.compress",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for: torch alone takes seconds."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
