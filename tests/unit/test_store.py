"""Activations within a budget of main memory: the same numbers, and no file that outlives them."""

from __future__ import annotations

import errno
import gc
import os
from pathlib import Path

import pytest
import torch
from runs import raising

from optima.calibration.store import SMALLEST_MAPPED, Store
from optima.errors import ModelError


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int64], ids=str)
def test_beyond_the_budget_tensors_are_in_files_without_a_name(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = [torch.arange(2 * SMALLEST_MAPPED).reshape(2, -1).to(dtype) + number for number in range(3)]
    size = tensors[0].numel() * tensors[0].element_size()
    store = Store(size, tmp_path)
    kept = [store.keep(tensor) for tensor in tensors]
    assert kept[0] is tensors[0]
    assert kept[1] is not tensors[1]
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(kept, tensors, strict=True))
    assert (store.held, store.mapped) == (size, 2 * size)
    assert not os.listdir(tmp_path)
    assert store.notes
    del tensors, kept
    gc.collect()
    assert store.held == 0


def test_small_tensors_and_stores_without_a_budget_keep_all(tmp_path: Path) -> None:
    small, large = torch.zeros(3), torch.zeros(SMALLEST_MAPPED)
    assert Store(0, tmp_path).keep(small) is small
    assert Store().keep(large) is large


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "posix_fallocate", raising(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(ModelError, match=str(tmp_path)):
        Store(0, tmp_path).keep(torch.zeros(SMALLEST_MAPPED))
