"""The clock: medians, the machine's own matrix-multiply rate, and a meter of where a solver's time goes.

Shapes: m, k, n as in (m, k) @ (k, n).
"""

from __future__ import annotations

import os
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from harness.products import Packed

Result = TypeVar("Result")
Shape = tuple[int, int, int, torch.dtype]

# A call longer than this is timed once: its own length averages the noise that repeats would.
LONG_SECONDS = 5.0


@dataclass(frozen=True)
class Timed(Generic[Result]):
    """Median and best wall time of a call, and what its last run returned."""

    seconds: float
    best: float
    repeats: int
    result: Result


def use_threads(threads: int) -> None:
    """Restrict this process (torch, and XLA if imported later) to ``threads`` cores."""
    if hasattr(os, "sched_setaffinity"):
        available = sorted(os.sched_getaffinity(0))
        if threads < len(available):
            os.sched_setaffinity(0, available[:threads])
    torch.set_num_threads(threads)


def synchronise(device: torch.device) -> None:
    """Wait for queued work, so that a wall clock is right."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(function: Callable[[], Result], device: torch.device, repeats: int, warm: bool = True) -> Timed[Result]:
    """Median of ``repeats`` runs after a warm-up (which counts as a run if it is long)."""
    seconds: list[float] = []
    for attempt in range(repeats + warm):
        synchronise(device)
        begin = time.perf_counter()
        result = function()
        synchronise(device)
        elapsed = time.perf_counter() - begin
        if attempt >= warm or elapsed > LONG_SECONDS:
            seconds.append(elapsed)
        if elapsed > LONG_SECONDS:
            break
    return Timed(statistics.median(seconds), min(seconds), len(seconds), result)


class MatmulRate:
    """Measured seconds of one (m, k) @ (k, k), by the fastest way the machine has, remembered per shape and dtype."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._seconds: dict[Shape, float] = {}

    def seconds(self, shape: Shape) -> float:
        """Best time of this product alone, rows and result as ordinary tensors."""
        if shape not in self._seconds:
            self._seconds[shape] = self._measure(*shape)
        return self._seconds[shape]

    def flops_per_second(self, shape: Shape) -> float:
        m, k, n, _ = shape
        return 2.0 * m * k * n / self.seconds(shape)

    def _measure(self, m: int, k: int, n: int, dtype: torch.dtype) -> float:
        left, right = (torch.randn(*size, device=self.device).to(dtype) for size in ((m, k), (k, n)))
        ways: list[Callable[[], torch.Tensor]] = [lambda: left @ right]
        if k == n and dtype == torch.float32:
            product = Packed(right, dtype)
            ways.append(lambda: product(left))
        return min(timed(way, self.device, repeats=9).best for way in ways)


@dataclass
class Profile:
    """Where one call spent its time.

    Attributes:
        seconds: the whole call, metered.
        product_seconds: inside matrix products, oneDNN's conversions of rows and results included.
        factor_seconds: inside factorisations, triangular solves and attention, which are dense level-3 work too.
        products: how often each shape was multiplied.
    """

    seconds: float = 0.0
    product_seconds: float = 0.0
    factor_seconds: float = 0.0
    products: Counter[Shape] = field(default_factory=Counter)

    @property
    def product_share(self) -> float:
        return self.product_seconds / self.seconds

    @property
    def dense_share(self) -> float:
        return (self.product_seconds + self.factor_seconds) / self.seconds

    def floor_seconds(self, rate: MatmulRate) -> float:
        """Time the same products take with nothing between them."""
        return sum(count * rate.seconds(shape) for shape, count in self.products.items())

    def rate_share(self, rate: MatmulRate, rows: int) -> float:
        """Rate inside products relative to the machine's for the full batch of ``rows``, dtype by dtype.

        A solver that splits its rows into batches too small for the machine scores below 1.
        """
        ideal = 0.0
        for (m, k, n, dtype), count in self.products.items():
            ideal += count * 2.0 * m * k * n / rate.flops_per_second((rows, k, n, dtype))
        return ideal / self.product_seconds if self.product_seconds else 0.0


class _Meter(TorchDispatchMode):
    """Times every matrix product and factorisation that passes the dispatcher."""

    FACTORS = frozenset(
        {"linalg_solve_triangular", "linalg_cholesky_ex", "cholesky_inverse", "cholesky_solve", "_linalg_eigh",
         "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention_for_cpu_backward",
         "_scaled_dot_product_flash_attention"}
    )  # fmt: skip
    CONVERSIONS = frozenset({"to_mkldnn", "_to_dense"})

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.profile = Profile()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        shape = _product_shape(name, args)
        if shape is None and name not in self.FACTORS and name not in self.CONVERSIONS:
            return func(*args, **(kwargs or {}))
        synchronise(self.device)
        begin = time.perf_counter()
        output = func(*args, **(kwargs or {}))
        synchronise(self.device)
        elapsed = time.perf_counter() - begin
        if name in self.FACTORS:
            self.profile.factor_seconds += elapsed
        else:
            self.profile.product_seconds += elapsed
        if shape is not None:
            self.profile.products[shape] += args[0].shape[0] if name in ("bmm", "baddbmm", "baddbmm_") else 1
        return output


def _product_shape(name: str, args: Any) -> Shape | None:
    """(m, k, n, dtype) of a product, None for any other operation."""
    if name in ("mm", "bmm"):
        left, right = args[0], args[1]
    elif name in ("addmm", "addmm_", "baddbmm", "baddbmm_"):
        left, right = args[1], args[2]
    elif name in ("mkldnn_linear", "_linear_pointwise"):
        return args[0].shape[0], args[0].shape[1], args[1].shape[0], args[0].dtype
    else:
        return None
    return left.shape[-2], left.shape[-1], right.shape[-1], left.dtype


def profiled(function: Callable[[], object], device: torch.device) -> Profile:
    """Run ``function`` once under the meter. The meter's own overhead counts against it."""
    synchronise(device)
    begin = time.perf_counter()
    with _Meter(device) as meter:
        function()
        synchronise(device)
    meter.profile.seconds = time.perf_counter() - begin
    return meter.profile
