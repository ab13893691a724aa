"""2:4 linears on sparse tensor cores give what the dense ones give."""

from __future__ import annotations

import pytest
import torch
from closeness import assert_close_in_norm
from torch import nn

from optima.extras.semi_structured import CAPABILITY, accelerate

able = torch.cuda.is_available() and torch.cuda.get_device_capability() >= CAPABILITY
pytestmark = pytest.mark.skipif(not able, reason="needs a CUDA device with sparse tensor cores")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [1, 7, 64])
def test_same_outputs(dtype: torch.dtype, tokens: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 128, bias=False), nn.Linear(128, 10))
    model = model.to("cuda", dtype).eval()
    with torch.no_grad():
        for linear in (model[0], model[2]):
            linear.weight[:, 1::4] = 0
            linear.weight[:, 2::4] = 0
        inputs_TD = torch.randn(tokens, 256, device="cuda", dtype=dtype)
        dense = model(inputs_TD)
        done = accelerate(model)
        assert done.linears == ("0", "2")
        assert list(done.skipped) == ["3"]
        assert_close_in_norm(model(inputs_TD), dense, 4.0)
