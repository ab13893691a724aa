"""The code that CONTRIBUTING.md tells people to copy works."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from optima.qp import Hessian, solve

PAGE = Path(__file__).parents[2] / "CONTRIBUTING.md"


def load(name: str) -> Any:
    """The class ``name`` out of the page's code."""
    for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL):
        if f"class {name}" in code:
            namespace: dict[str, Any] = {"__name__": "contributing"}
            exec(compile(code, str(PAGE), "exec"), namespace)
            return namespace[name]
    raise AssertionError(f"{PAGE.name} has no class {name}")


@pytest.fixture
def hessian() -> Hessian:
    inputs_TD = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    return Hessian(inputs_TD.T @ inputs_TD / 64)


@pytest.fixture
def weight_OD() -> torch.Tensor:
    return torch.randn(6, 16, generator=torch.Generator().manual_seed(1))


def test_solver(hessian: Hessian, weight_OD: torch.Tensor) -> None:
    keep_OD = torch.rand(weight_OD.shape, generator=torch.Generator().manual_seed(2)) > 0.5
    solution = solve(hessian, weight_OD, keep_OD, solver=load("RowByRow")())
    assert solution.gap_R.max() <= 1e-4
    assert not solution.weight_RD[~keep_OD].any()
    matrix_DD = hessian.damped_DD
    for weight_D, keep_D, solved_D in zip(weight_OD.double(), keep_OD, solution.weight_RD, strict=True):
        oracle_S = torch.linalg.solve(matrix_DD[keep_D][:, keep_D], (matrix_DD @ weight_D)[keep_D])
        torch.testing.assert_close(solved_D[keep_D].double(), oracle_S, rtol=1e-3, atol=1e-4)
