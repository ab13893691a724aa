"""How tests compare floats: no processor, thread count or batch size may decide."""

import torch
from torch import Tensor

# Sums of a few hundred products, in another order or by other instructions, differ by tens of eps of the tensor's norm.
EPS = 256.0


def assert_close_in_norm(found: Tensor, expected: Tensor, eps: float = EPS, name: str = "tensors") -> None:
    """The difference is at most ``eps`` times the eps of the coarser dtype, relative to the norm of ``expected``.

    An entry near zero carries the rounding of the largest ones: no entry is compared relative to itself.
    """
    assert found.shape == expected.shape, f"{name}: {found.shape} and {expected.shape}"
    coarser = max(torch.finfo(each.dtype).eps for each in (found, expected))
    difference = torch.linalg.vector_norm(found.double() - expected.double())
    limit = eps * coarser * torch.linalg.vector_norm(expected.double())
    assert difference <= limit, f"{name}: the norm of the difference is {difference:.3g}, above {limit:.3g}"
