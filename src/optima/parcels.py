"""Values taken apart for their way to another process: a pickle without tensors, and the bytes of these in a row."""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from optima.errors import RecipeError

# Tensors that travel together begin at multiples of this, so that their bytes can be looked at as numbers.
ALIGNMENT = 16


class _Pickler(pickle.Pickler):
    """Leaves tensors out, and lists them."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.tensors: list[Tensor] = []
        self._places: dict[int, int] = {}

    def persistent_id(self, value: object) -> int | None:
        if not isinstance(value, Tensor):
            return None
        if id(value) not in self._places:
            self._places[id(value)] = len(self.tensors)
            self.tensors.append(value)
        return self._places[id(value)]


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, tensors: Sequence[Tensor]) -> None:
        super().__init__(file)
        self._tensors = tensors

    def persistent_load(self, place: Any) -> Tensor:
        tensor: Tensor = self._tensors[place]
        return tensor


# Of a tensor: where its bytes begin, its shape, dtype and whether it is in main memory. The last entry: where all end.
_Entry = tuple[int, tuple[int, ...], torch.dtype, bool]


def take_apart(value: object) -> tuple[bytes, list[Tensor]]:
    """A value without its tensors, and these.

    Raises:
        RecipeError: if it holds something that cannot leave this process.
    """
    file = io.BytesIO()
    pickler = _Pickler(file)
    try:
        pickler.dump(value)
    except (pickle.PicklingError, AttributeError, TypeError) as error:  # as pickle says it, by kind of object
        raise RecipeError(f"something cannot be sent to another process ({error}): prune with one process") from error
    return file.getvalue(), pickler.tensors


def plan_of(tensors: Sequence[Tensor]) -> list[_Entry]:
    """Where the bytes of each tensor begin, and where all end."""
    plan: list[_Entry] = []
    begin = 0
    for tensor in tensors:
        plan.append((begin, tuple(tensor.shape), tensor.dtype, tensor.device.type == "cpu"))
        begin += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    return [*plan, (begin, (), torch.uint8, True)]


def joined_bytes(tensors: Sequence[Tensor], size: int, device: torch.device) -> Tensor:
    """The bytes of all tensors, filled up to ``size``."""
    buffer = torch.zeros(size, dtype=torch.uint8, device=device)
    for tensor, (begin, *_) in zip(tensors, plan_of(tensors), strict=False):
        data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        buffer[begin : begin + len(data)].copy_(data)
    return buffer


def put_together(data: bytes, plan: Sequence[_Entry], buffer: Tensor, device: torch.device) -> Any:
    """The value, with tensors of its own: those that were not in main memory on ``device``."""
    tensors = []
    for begin, shape, dtype, in_memory in plan[:-1]:
        count = torch.Size(shape).numel() * dtype.itemsize
        found = buffer[begin : begin + count].view(dtype).reshape(shape)
        # A copy: one tensor that is kept would keep the bytes of all.
        tensors.append(found.to("cpu" if in_memory else device, copy=True))
    return _Unpickler(io.BytesIO(data), tensors).load()
