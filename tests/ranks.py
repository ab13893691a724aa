"""Several processes of one run, forked from the test: as torchrun would start them, but with all libraries imported."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from runs import finish, start

from optima.distributed import Ranks, joined
from optima.errors import OptimaError, RankError


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_ranks(
    size: int,
    out: str,
    *options: str,
    prepare: Callable[[int], object] = int,
    model: str = "model",
    verb: str = "prune",
) -> list[int]:
    """The process ids of ``optima prune``; ``prepare`` is called in each with its rank. Each has a file of messages."""
    port = free_port()

    def child(rank: int) -> Callable[[], None]:
        def as_torchrun() -> None:
            values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": port}
            os.environ.update({"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in values.items()}})
            prepare(rank)

        return as_torchrun

    return [
        start(out, *options, prepare=child(rank), messages=f"messages{rank}.txt", model=model, verb=verb)
        for rank in range(size)
    ]


def finish_ranks(children: Sequence[int]) -> list[int]:
    return [finish(child) for child in children]


def prune_ranks(size: int, out: str, *options: str, model: str = "model") -> None:
    codes = finish_ranks(start_ranks(size, out, *options, model=model))
    assert codes == [0] * size, said(size)


def said(size: int) -> list[str]:
    return [" ".join(Path(f"messages{rank}.txt").read_text().split()) for rank in range(size)]


def in_processes(size: int, work: Callable[[Ranks], object]) -> list[int]:
    """What each exits with: 0, 2 for an ``OptimaError`` (in a file ``said`` with its rank), 3 for a ``RankError``."""
    port, children = str(free_port()), []
    for rank in range(size):
        child = os.fork()
        if child:
            children.append(child)
            continue
        code = 99
        torch.set_num_threads(1)  # as in ``runs.start``
        try:
            names = {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            os.environ.update(names)
            with joined() as ranks:
                work(ranks)
            code = 0
        except RankError:
            code = 3
        except OptimaError as error:
            Path(f"said{rank}").write_text(str(error))
            code = 2
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return finish_ranks(children)
