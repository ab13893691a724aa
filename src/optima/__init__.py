"""OPTIMA: one-shot pruning of transformers with certified optimal weights."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optima.errors import OptimaError
    from optima.patterns import NM, Unstructured
    from optima.recipe import Recipe, load_recipe
    from optima.reporting.record import Report, load_report
    from optima.run import prune

__all__ = ["NM", "OptimaError", "Recipe", "Report", "Unstructured", "load_recipe", "load_report", "prune"]
__version__ = "0.1.0"

_HOMES = {
    "NM": "patterns",
    "OptimaError": "errors",
    "Recipe": "recipe",
    "Report": "reporting.record",
    "Unstructured": "patterns",
    "load_recipe": "recipe",
    "load_report": "reporting.record",
    "prune": "run",
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
