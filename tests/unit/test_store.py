"""Activations within a budget: the same numbers, wherever they wait, and no file that outlives them."""

from __future__ import annotations

import errno
import gc
import os
import re
from pathlib import Path

import pytest
import torch
from families import build

from optima import Recipe
from optima.calibration.activations import moved
from optima.calibration.store import SMALLEST_MAPPED, Store
from optima.errors import ModelError
from optima.plan import resolve


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int64], ids=str)
def test_beyond_the_budget_tensors_are_in_files_without_a_name(dtype: torch.dtype, tmp_path: Path) -> None:
    given = [torch.arange(2 * SMALLEST_MAPPED).reshape(2, -1).to(dtype) + number for number in range(3)]
    size = given[0].numel() * given[0].element_size()
    store = Store(size, tmp_path)
    kept = [store.keep(tensor) for tensor in given]
    assert kept[0] is given[0]
    assert kept[1] is not given[1]
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(kept, given, strict=True))
    assert (store.held, store.mapped) == (size, 2 * size)
    assert not os.listdir(tmp_path)
    assert store.notes
    assert store.keep(kept[2]) is kept[2]
    del given, kept
    gc.collect()
    assert (store.held, store.mapped, store.most_mapped) == (0, 0, 2 * size)


def test_room_is_used_again(tmp_path: Path) -> None:
    store = Store(8 * SMALLEST_MAPPED, tmp_path)
    for _ in range(5):
        tensor = store.keep(torch.zeros(8 * SMALLEST_MAPPED, dtype=torch.uint8))
        del tensor
    assert not store.notes


def test_small_tensors_and_stores_without_a_budget_keep_all(tmp_path: Path) -> None:
    small, large = torch.zeros(3), torch.zeros(SMALLEST_MAPPED)
    assert Store(0, tmp_path).keep(small) is small
    assert Store().keep(large) is large


def test_a_disk_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match=re.escape(str(tmp_path / "missing"))):
        Store(0, tmp_path / "missing").keep(torch.zeros(SMALLEST_MAPPED))

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ModelError, match="free some space there, or take fewer samples"):
        Store(0, tmp_path).keep(torch.zeros(SMALLEST_MAPPED))


def test_files_that_cannot_be_mapped_are_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("unable to mmap 65536 bytes from file <x>: Cannot allocate memory (12)")

    monkeypatch.setattr(torch, "from_file", fail)
    with pytest.raises(ModelError, match=r"cannot be kept in files in .*Cannot allocate memory.*ulimit -v"):
        Store(0, tmp_path).keep(torch.zeros(SMALLEST_MAPPED))
    assert not list(tmp_path.iterdir())


def test_what_stands_there_once_for_all_samples_is_moved_once() -> None:
    mask = torch.ones(1, 1, 5, 5).expand(8, 1, 5, 5)
    assert moved(mask, torch.device("cpu")) is mask
    there = moved(mask, torch.device("meta"))
    assert there.shape == mask.shape
    assert there.stride()[0] == 0
    assert there.untyped_storage().nbytes() == 25 * 4
    assert moved(torch.ones(2, 3).mT, torch.device("meta")).shape == (3, 2)
    assert moved(torch.ones(()), torch.device("meta")).shape == ()


def test_each_of_two_stacks_reads_enough_tokens_for_its_widest_linear() -> None:
    model = build("t5", d_ff=2048)
    recipe = resolve(model, Recipe(max_seq_length=16), torch.device("cpu")).recipe
    assert recipe.num_calibration_samples == 32 * 2048 // (16 // 2)
