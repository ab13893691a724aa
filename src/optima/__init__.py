"""OPTIMA: one-shot pruning of transformers with certified optimal weights."""

from optima.errors import OptimaError
from optima.patterns import NM, Unstructured
from optima.recipe import Recipe, load_recipe
from optima.reporting.record import Report, load_report
from optima.run import prune

__all__ = ["NM", "OptimaError", "Recipe", "Report", "Unstructured", "load_recipe", "load_report", "prune"]
__version__ = "0.1.0"
