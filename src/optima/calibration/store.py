"""Activations between blocks: in main memory up to a budget, beyond it in memory-mapped files."""

from __future__ import annotations

import os
import tempfile
import weakref
from pathlib import Path

import torch
from torch import Tensor

from optima.distributed import Ranks
from optima.errors import ModelError
from optima.files import ACTIVATIONS, explain_write_errors
from optima.main_memory import available_memory

# Smaller tensors stay in main memory: a page, a mapping and a file cost more.
SMALLEST_MAPPED = 2**16
FREE_SHARE = 0.5  # of the free main memory, for activations: the rest of them is in files


class Store:
    """Keeps tensors on the CPU within a budget; which of them are in files changes no number.

    A file loses its name once it is mapped: the system removes it with the last tensor that needs it.

    Args:
        budget: bytes of main memory; None: no limit.
        directory: where the files are; None: that for temporary files.

    Attributes:
        held: bytes in main memory now.
        mapped: bytes that were put into files.
    """

    def __init__(self, budget: int | None = None, directory: Path | None = None) -> None:
        self.budget, self.directory = budget, directory
        self.held = self.mapped = 0

    def keep(self, tensor: Tensor) -> Tensor:
        """The tensor, or one with the same numbers in a file, if there is no room left for it.

        Raises:
            ModelError: if the disk fails or is full.
        """
        size = held = tensor.nbytes
        if self.budget is None or size < SMALLEST_MAPPED:
            return tensor
        if self.held + size > self.budget:
            tensor, held = self._map(tensor, size), 0
            self.mapped += size
        self.held += held
        weakref.finalize(tensor, self._release, held).atexit = False
        return tensor

    def _release(self, held: int) -> None:
        self.held -= held

    @property
    def notes(self) -> list[str]:
        """For the report."""
        text = f"activations exceeded main memory: {self.mapped:,} bytes went into temporary files"
        return [text] if self.mapped else []

    def _map(self, tensor: Tensor, size: int) -> Tensor:
        directory = self.directory or Path(tempfile.gettempdir())
        with explain_write_errors(directory, "free some space there, or take fewer samples"):
            handle, name = tempfile.mkstemp(prefix=ACTIVATIONS, dir=directory)
            try:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(handle, 0, size)  # a full disk is an error here, not a signal later
                # Shared, so that the pages are the file's and can be written back and dropped.
                mapped = torch.from_file(name, shared=True, size=tensor.numel(), dtype=tensor.dtype)
            except RuntimeError as error:
                raise ModelError(f"activations cannot be kept in files in {directory}: {error}") from error
            finally:
                os.close(handle)
                os.unlink(name)
        return mapped.view(tensor.shape).copy_(tensor)


def make_store(directory: Path | None, ranks: Ranks) -> Store:
    """A store in half of the free memory; its files are in the ``directory`` of rank 0, if that is on this machine."""
    directory = ranks.on_rank0(lambda: directory)
    budget = int(FREE_SHARE * available_memory() / ranks.here())
    return Store(budget, directory if directory is not None and directory.is_dir() else None)
