"""Peak memory of tensors: the allocator's own count on a GPU, a count of live storages on a CPU."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class TensorPeak:
    """Context: highest number of bytes of tensors alive in each phase inside it, all of the process's on a GPU.

    On a CPU it sees ``held`` and the tensors that were used inside; work space of the BLAS is not seen.

    Attributes:
        peaks: phase -> bytes, in order.
    """

    def __init__(self, device: torch.device, held: Sequence[Tensor] = ()) -> None:
        self.device = device
        self.peaks: dict[str, int] = {}
        self._phase = ""
        self._storages = _LiveStorages()
        for tensor in held:
            self._storages.count(tensor)

    @property
    def highest(self) -> tuple[int, str]:
        """Bytes and phase of the peak."""
        return max((size, phase) for phase, size in self.peaks.items())

    def phase(self, name: str) -> None:
        """What follows is counted under ``name``."""
        self._close()
        self._phase = name

    def _close(self) -> None:
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            peak, self._storages.peak = self._storages.peak, self._storages.live
        if self._phase:
            self.peaks[self._phase] = peak

    def __enter__(self) -> TensorPeak:
        if self.device.type == "cpu":
            self._storages.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.device.type == "cpu":
            self._storages.__exit__(kind, error, traceback)
        self._close()


class _LiveStorages(TorchDispatchMode):
    """Counts a storage from its first use until it is freed."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, output)):
            if isinstance(leaf, Tensor):
                self.count(leaf)
        return output

    def count(self, tensor: Tensor) -> None:
        """A tensor's storage, or the tensor itself where oneDNN holds its data in a layout of its own."""
        owner = tensor if tensor.is_mkldnn else tensor.untyped_storage()
        key = id(tensor) if tensor.is_mkldnn else tensor.untyped_storage()._cdata
        size = tensor.numel() * tensor.element_size() if tensor.is_mkldnn else tensor.untyped_storage().nbytes()
        if key in self._seen:
            return

        def freed(_: Any, key: int = key, size: int = size) -> None:
            self._seen.pop(key, None)
            self.live -= size

        self._seen[key] = weakref.ref(owner, freed)
        self.live += size
        self.peak = max(self.peak, self.live)
