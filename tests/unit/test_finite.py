"""Whether numbers are finite: one that is not is found wherever it stands, in every dtype."""

from __future__ import annotations

import pytest
import torch

from optima.core.products import all_finite

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_that_is_not(dtype: torch.dtype, value: float) -> None:
    good = torch.full((3, 700), torch.finfo(dtype).max, dtype=dtype)  # their sum is not finite, they are
    assert all_finite(good, good[:0], -good)
    for at in (0, 1049, 2099):
        bad = good.clone()
        bad.view(-1)[at] = value
        assert not all_finite(bad)
        assert not all_finite(good, bad)


def test_none_and_of_several_dtypes() -> None:
    assert all_finite()
    assert all_finite(*(torch.ones(2, dtype=dtype) for dtype in DTYPES))
    assert all_finite(torch.ones(2, requires_grad=True))
