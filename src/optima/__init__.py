"""OPTIMA: one-shot pruning of transformers, solved to a certified optimum, then tuned block by block."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optima.errors import OptimaError
    from optima.holding import HoldZeros, hold_zeros
    from optima.hub import push
    from optima.ordering.order import order
    from optima.ordering.record import Ordering
    from optima.packing import pack, unpack
    from optima.patterns import NM, Unstructured
    from optima.recipe import Recipe
    from optima.recipe_files import load_recipe
    from optima.reporting.callbacks import BlockEvent, Callback, RunStart
    from optima.reporting.record import Report, load_report
    from optima.run import prune
    from optima.semi_structured import accelerate

__all__ = [
    "NM",
    "BlockEvent",
    "Callback",
    "HoldZeros",
    "OptimaError",
    "Ordering",
    "Recipe",
    "Report",
    "RunStart",
    "Unstructured",
    "accelerate",
    "hold_zeros",
    "load_recipe",
    "load_report",
    "order",
    "pack",
    "prune",
    "push",
    "unpack",
]
__version__ = "0.1.0"

_HOMES = {
    "BlockEvent": "reporting.callbacks",
    "Callback": "reporting.callbacks",
    "HoldZeros": "holding",
    "NM": "patterns",
    "OptimaError": "errors",
    "Ordering": "ordering.record",
    "Recipe": "recipe",
    "Report": "reporting.record",
    "RunStart": "reporting.callbacks",
    "Unstructured": "patterns",
    "accelerate": "semi_structured",
    "hold_zeros": "holding",
    "load_recipe": "recipe_files",
    "load_report": "reporting.record",
    "order": "ordering.order",
    "pack": "packing",
    "prune": "run",
    "push": "hub",
    "unpack": "packing",
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
