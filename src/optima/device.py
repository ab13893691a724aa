"""Devices: find and describe them, move a block there and back, full precision, peak memory, lack of it."""

from __future__ import annotations

import ctypes
import gc
import re
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from optima.errors import DeviceMemoryError, NotDifferentiableError, RecipeError

_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")
# What torch for main memory, the driver, cuBLAS and cuSOLVER say where there is none, in errors of other types.
NO_MEMORY = (
    *("DefaultCPUAllocator: can't allocate memory", "out of memory", "STATUS_ALLOC_FAILED"),
    *("cublasCreate", "cusolverDnCreate", "cusolverDnXcreate"),
)
# What makes a run smaller.
REMEDY = (
    "Lower --batch-size, then --max-seq-length; --objective sink and --tuning-epochs 0 need no gradients; --ignore the "
    "widest linears. With other options --resume does not continue from the committed blocks"
)
# Root mean square of gradients at a block's outputs, to which losses are scaled: float16 holds a 256th of it in full,
# and a million times it. By powers of two, which round nothing elsewhere.
GRADIENT = 2.0**-6

Result = TypeVar("Result")


class PeakMemory:
    """Highest memory in use on ``device`` since construction, in bytes.

    On a CPU this is the process's resident memory. Linux can restart its high-water mark; elsewhere, and where that is
    not permitted, it covers the life of the process.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.init()  # which counting does not
            torch.cuda.reset_peak_memory_stats(device)
        else:
            with suppress(OSError):
                _CLEAR_REFS.write_text("5")

    def peak(self) -> int:
        """The highest value until now."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        for line in _STATUS.read_text().splitlines() if _STATUS.exists() else ():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def give_back_freed_memory() -> None:
    """Return main memory that was freed to the system. glibc keeps what it may soon need again (malloc_trim(3)).

    After the gradient pass that is over a gigabyte of block inputs.
    """
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)


def named_device(name: str) -> torch.device:
    """The device that a recipe calls ``name``, which need not be there; ``auto`` is the first CUDA device, if any."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", name):
        raise RecipeError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}")
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


def find_device(name: str) -> torch.device:
    """As ``named_device``.

    Raises:
        RecipeError: if the device is not there.
    """
    device, count = named_device(name), torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise RecipeError(f"device {name!r} is not there: {count} CUDA devices found; use auto or cpu")
    return device


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the device has units for bfloat16; without them it may be slower than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return any(getattr(torch.cpu, f"_is_{unit}_supported", bool)() for unit in ("avx512_bf16", "amx_tile", "amx_fp16"))


def describe_device(device: torch.device) -> str:
    """Name of the device for the report."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    threads = torch.get_num_threads()
    return f"cpu ({threads} thread{'s' if threads > 1 else ''})"


def card_memory(device: torch.device) -> int:
    """Bytes of memory of a CUDA device."""
    return int(torch.cuda.get_device_properties(device).total_memory)


def dtype_name(dtype: torch.dtype) -> str:
    """As users and reports write it: ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


@contextmanager
def one_memory_error() -> Iterator[None]:
    """Any error of the device's memory inside is ``torch.OutOfMemoryError``."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or not any(text in str(error) for text in NO_MEMORY):
            raise
        raise torch.OutOfMemoryError(str(error)) from error


def in_halves(
    total: int, work: Callable[[slice], Result], most: int | None = None, reduced: Callable[[int], object] = id
) -> list[Result]:
    """What ``work`` returns for parts of ``total`` items, in order: one part, or parts of at most ``most`` items.

    A part that is out of memory is split in two, and later parts have no more items than its halves, which no other
    part reaches over. ``reduced`` is called with the new limit.

    Raises:
        torch.OutOfMemoryError: if there is no memory for one item.
    """
    results, waiting = list[Result](), [slice(0, total)]
    while waiting:
        part = waiting.pop()
        size = part.stop - part.start
        if most is not None and size > most:
            middle = part.start + most
            waiting += [slice(middle, part.stop), slice(part.start, middle)]
            continue
        try:
            with one_memory_error():
                results.append(work(part))
            continue
        except torch.OutOfMemoryError:
            if size <= 1:
                raise
        # Only after the exception and the frames that it holds are gone is their memory free.
        gc.collect()
        torch.cuda.empty_cache()
        most = (size + 1) // 2
        reduced(most)
        waiting.append(part)
    return results


@contextmanager
def memory_explained(remedy: str = REMEDY) -> Iterator[None]:
    """A lack of memory inside, where no smaller batch helps, is a ``DeviceMemoryError``."""
    try:
        with one_memory_error():
            yield
    except torch.OutOfMemoryError as error:
        raise DeviceMemoryError(f"out of memory ({error}): take a larger device. {remedy}") from error


@contextmanager
def backward_explained(name: str) -> Iterator[None]:
    """A missing backward pass inside, which some kernels lack, is a ``NotDifferentiableError``."""
    try:
        with one_memory_error():
            yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise NotDifferentiableError(f"{name} has no backward pass ({error})") from error


@contextmanager
def on_device(module: nn.Module, device: torch.device, comes_back: bool = True) -> Iterator[None]:
    """The module lives on ``device`` inside this context and returns to where it was.

    Args:
        module: to move.
        device: where to.
        comes_back: False for parameters that are not needed afterwards; buffers return all the same.
    """
    home = next((parameter.device for parameter in module.parameters()), device)
    try:
        module.to(device)  # where memory runs out on the way, what had arrived goes back too
        yield
    finally:
        if comes_back or home == device:
            module.to(home)
        else:
            for part in module.modules():
                part._buffers.update({name: each.to(home) for name, each in part._buffers.items() if each is not None})


@contextmanager
def default_torch_settings() -> Iterator[None]:
    """No autocast or defaults of the caller's inside: they change what is computed, in what, and where."""
    with ExitStack() as stack:
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float32)
        for kind in ("cpu", "cuda"):
            stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":  # the context costs microseconds a call
            stack.enter_context(torch.device("cpu"))
        yield


@contextmanager
def _matmul_precision(cuda: str, mkldnn: str) -> Iterator[None]:
    backends: Any = torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul")  # noqa: B009 - unknown to mypy
    with ExitStack() as stack:
        for backend, precision in zip(backends, (cuda, mkldnn), strict=True):
            stack.callback(setattr, backend, "fp32_precision", backend.fp32_precision)
            backend.fp32_precision = precision
        yield


@contextmanager
def full_precision() -> Iterator[None]:
    """Products of float32 matrices are float32 inside: no TF32 or bfloat16 by a global switch or autocast."""
    with _matmul_precision("ieee", "ieee"), default_torch_settings():
        yield


@contextmanager
def bfloat16_products() -> Iterator[None]:
    """Inside, float32 matrices that hold bfloat16 numbers are multiplied by units that read no more digits.

    Such products are exact in float32, and sums are float32 all the same: TF32 on CUDA, bfloat16 on a CPU with AMX.
    """
    with _matmul_precision("tf32", "bf16"):
        yield


class Stopwatch:
    """Seconds spent in each stage of a run. A stage inside another pauses it, so that no second counts twice.

    On CUDA the times are of events in the current stream, which stops nothing: they are read with ``seconds``.

    Args:
        device: whose time it is.
        begins: called with the name of each stage as it begins.
    """

    def __init__(self, device: torch.device, begins: Callable[[str], object] = str) -> None:
        self._device, self._begins = device, begins
        self._running: list[str] = []
        self._since: Any = None
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._seconds: dict[str, float] = {}

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of each stage so far. On CUDA this waits for the device."""
        if self._events:
            torch.cuda.synchronize(self._device)
        for stage, begin, end in self._events:
            self._seconds[stage] = self._seconds.get(stage, 0.0) + begin.elapsed_time(end) / 1000.0
        self._events.clear()
        return self._seconds

    @property
    def total(self) -> float:
        """Seconds of all stages."""
        return sum(self.seconds.values())

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Inside, time counts for ``stage``."""
        self._switch()
        self._begins(stage)
        self._running.append(stage)
        try:
            yield
        finally:
            self._switch()
            self._running.pop()

    def _switch(self) -> None:
        if self._device.type == "cuda":
            now: Any = torch.cuda.Event(enable_timing=True)
            now.record(torch.cuda.current_stream(self._device))
            if self._running:
                self._events.append((self._running[-1], self._since, now))
        else:
            now = time.perf_counter()
            if self._running:
                stage = self._running[-1]
                self._seconds[stage] = self._seconds.get(stage, 0.0) + now - self._since
        self._since = now
