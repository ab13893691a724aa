"""A hash of tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor


def hash_tensors(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 in hex over the name, dtype, shape and bytes of each tensor."""
    found = hashlib.sha256()
    for name, tensor in tensors:
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(bytes_of(tensor).numpy().data)
    return found.hexdigest()


def bytes_of(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, in main memory, one after another."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
