"""How tests compare floats: no processor, thread count or batch size may decide.

Bits are compared where the same operations run in the same shapes on the same data in one process. Masks of float32
scores are compared by the share of entries that differ; float64 scores of a few thousand random weights never tie.
"""

import torch
from numpy.typing import NDArray
from torch import Tensor

# Sums of a few hundred products, in another order or by other instructions, differ by tens of eps of the tensor's norm.
EPS = 256.0


def assert_close_in_norm(
    found: Tensor | NDArray, expected: Tensor | NDArray, eps: float = EPS, name: str = "tensors"
) -> None:
    """The difference is at most ``eps`` times the eps of the coarser dtype, relative to the norm of ``expected``.

    An entry near zero carries the rounding of the largest ones: no entry is compared relative to itself.
    """
    found, expected = torch.as_tensor(found), torch.as_tensor(expected)
    assert found.shape == expected.shape, f"{name}: {found.shape} and {expected.shape}"
    coarser = max(torch.finfo(each.dtype).eps for each in (found, expected))
    difference = torch.linalg.vector_norm(found.double() - expected.double())
    limit = eps * coarser * torch.linalg.vector_norm(expected.double())
    assert difference <= limit, f"{name}: the norm of the difference is {difference:.3g}, above {limit:.3g}"


def assert_masks_alike(found: Tensor, expected: Tensor, share: float = 0.01) -> None:
    """At most this share of the entries differs: rounding decides between scores that are nearly equal."""
    assert found.shape == expected.shape
    differing = float((found != expected).double().mean())
    assert differing <= share, f"{differing:.2%} of the entries differ, above {share:.2%}"
