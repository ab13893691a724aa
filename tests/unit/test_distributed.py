"""Exchanges between processes: every value arrives whole, everywhere it should, whoever fails."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from closeness import assert_close_in_norm
from ranks import in_processes
from tiny import make_llama, make_tokens
from torch import Tensor, nn

from optima.calibration.activations import capture
from optima.calibration.hessians import Accumulator, owners_of, reduce_to, share_out
from optima.checkpointing import check_alike
from optima.core import problem
from optima.distributed import ALONE, Ranks, joined
from optima.errors import CalibrationError, RecipeError
from optima.models.blocks import Linear, find_stacks

SIZE = 3


@dataclass
class Value:
    name: str
    tensor: Tensor
    again: Tensor
    mask: Tensor


def value_of(rank: int) -> Value:
    tensor = torch.full((rank + 1, 3), float(rank)).bfloat16().mT
    return Value(f"rank {rank}", tensor, tensor, torch.arange(5) > rank)


def is_of(value: Value, rank: int) -> bool:
    own = value_of(rank)
    alike = torch.equal(value.tensor, own.tensor) and torch.equal(value.mask, own.mask)
    return value.name == own.name and alike and value.again is value.tensor


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def exchange(ranks: Ranks) -> None:
    assert (ranks.size, ranks.first) == (SIZE, ranks.rank == 0)
    assert ranks.gather(ranks.rank) == [0, 1, 2]
    for owner in range(SIZE):
        assert is_of(ranks.broadcast(value_of(owner) if ranks.rank == owner else None, owner), owner)
    assert ranks.broadcast("text" if ranks.rank == 1 else None, 1) == "text"
    for dtype in (torch.bfloat16, torch.bool):
        own = torch.full((2, 3), ranks.rank == 1).to(dtype)
        assert torch.equal(ranks.broadcast_(own, 1), torch.ones(2, 3).to(dtype))
    assert ranks.on_rank0(lambda: [ranks.rank]) == [0]
    assert all(is_of(value, rank) for rank, value in enumerate(ranks.all_gather(value_of(ranks.rank))))


def add(ranks: Ranks) -> None:
    assert torch.equal(ranks.all_reduce_(torch.full((2, 2), 2.0**ranks.rank)), torch.full((2, 2), 7.0))
    own = torch.tensor([1e8, 1.0, 1e-3])[ranks.rank].expand(4)
    assert torch.equal(ranks.all_reduce(own), torch.full((4,), 1e8 + 1.0 + 1e-3, dtype=torch.float64).float())


def capture_uneven(ranks: Ranks) -> None:
    model = make_llama()
    acts = capture(model, find_stacks(model)[0], [make_tokens(2 + ranks.rank, 9)], ranks=ranks)
    assert acts.tokens == 9 * (2 + 3 + 4)
    assert acts.before == [0, 2, 5][ranks.rank]


def inputs_of(rank: int) -> Tensor:
    return torch.randn(4 + rank, 6, generator=torch.Generator().manual_seed(rank))


def reduce(ranks: Ranks) -> None:
    """The last process was given no token of one group; all solve another together."""
    problem.CACHE_ENTRIES, problem.SMALLEST_CACHED_CHUNK = 6 * 64, 64  # rows fall into chunks of 64
    linears = [Linear(name, nn.Linear(6, outputs)) for name, outputs in (("a", 2), ("b", 2), ("c", 200), ("d", 2))]
    accumulators = {linear.name: Accumulator(6, torch.device("cpu")) for linear in linears}
    for name, accumulator in accumulators.items():
        if name != "d" and not (name == "a" and ranks.rank == 2):
            accumulator.add(inputs_of(ranks.rank))
    owners = owners_of([[linear] for linear in linears], ranks.size, torch.device("cpu"))
    reduce_to(owners, accumulators, ranks)
    assert owners["c"] is None
    assert accumulators.keys() == {name for name in "abc" if owners[name] in (None, ranks.rank)}
    for name, found in accumulators.items():
        all_TD = torch.cat([inputs_of(rank) for rank in range(2 if name == "a" else 3)])
        assert found.tokens == len(all_TD)
        assert_close_in_norm(found.mean(), all_TD.mT @ all_TD / len(all_TD))


def other_recipes(ranks: Ranks) -> None:
    check_alike({"recipe": {"allocation": "uniform", "sparsity": 0.5 + ranks.rank}, "device": "cpu"}, ranks)


def test_what_differs_between_processes_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert in_processes(2, other_recipes) == [2, 2]
    assert "process 1 has another recipe.sparsity than process 0 (1.5, and 0.5)" in Path("said0").read_text()


@pytest.mark.parametrize("work", [exchange, add, capture_uneven, reduce])
def test_values_arrive(work: Callable[[Ranks], object]) -> None:
    assert in_processes(SIZE, work) == [0, 0, 0]


def test_an_error_of_one_is_raised_by_all() -> None:
    def work(ranks: Ranks) -> None:
        if ranks.rank == 1:
            raise CalibrationError("bad sample")
        ranks.gather(None)

    assert in_processes(SIZE, work) == [2, 2, 2]
    assert Path("said0").read_text() == "bad sample (rank 1 of 3)"
    assert Path("said1").read_text() == "bad sample"


def test_where_one_dies_the_others_end() -> None:
    def work(ranks: Ranks) -> None:
        if ranks.rank == 1:
            os._exit(7)
        ranks.gather(None)

    assert in_processes(SIZE, work) == [3, 7, 3]


def test_a_bug_of_one_ends_all() -> None:
    def work(ranks: Ranks) -> None:
        try:
            with joined() as inner:
                if inner.rank == 1:
                    raise ValueError("of a callback")
                inner.gather(None)
        except ValueError:
            os._exit(4)

    assert in_processes(SIZE, work) == [3, 4, 3]


def test_a_device_is_for_each() -> None:
    assert in_processes(SIZE, lambda ranks: ranks.on("cpu")) == [0, 0, 0]
    if not torch.cuda.is_available():
        assert in_processes(SIZE, lambda ranks: ranks.on("cuda:0")) == [2, 2, 2]


def test_one_process_has_it_all() -> None:
    with joined() as ranks:
        assert ranks is ALONE
        assert ranks.part(5) == slice(0, 5)
        assert ranks.gather(1) == ranks.all_gather(1) == [1]
        with pytest.raises(RecipeError):
            ranks.on("cuda:99")


def test_the_largest_first_to_whoever_has_least() -> None:
    assert share_out([1.0, 4.0, 3.0, 2.0], 2) == [0, 0, 1, 1]
    assert share_out([1.0, 9.0, 2.0], 2) == [1, None, 0], "what exceeds a share is done together"
    assert share_out([1.0, 9.0, 2.0], 2, [True, False, True]) == [1, 0, 1], "what cannot be divided has an owner"


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_parts_cover_everything_once(size: int) -> None:
    for count in (1, 5, 64):
        found = []
        for rank in range(size):
            ranks = Ranks()
            ranks.rank, ranks.size = rank, size
            found += range(count)[ranks.part(count)]
        assert found == list(range(count))
