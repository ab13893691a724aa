"""The code that CONTRIBUTING.md tells people to copy works."""

import re
from pathlib import Path
from typing import Any

from row_solver_contract import RowSolverContract

from optima.core import RowSolver

PAGE = Path(__file__).parents[2] / "CONTRIBUTING.md"


def load(name: str) -> Any:
    """The class ``name`` out of the page's code."""
    for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL):
        if f"class {name}" in code:
            namespace: dict[str, Any] = {"__name__": "contributing"}
            exec(compile(code, str(PAGE), "exec"), namespace)
            return namespace[name]
    raise AssertionError(f"{PAGE.name} has no class {name}")


class TestSampleSolver(RowSolverContract):
    """The page's solver keeps the contract that the page names."""

    def make(self, gap: float) -> RowSolver:
        solver: RowSolver = load("RowByRow")(gap=gap)
        return solver
