"""The processes (ranks) of a run: sequences, linears and rows are divided over them; rank 0 writes and reports.

    torchrun --nproc-per-node 8 -m optima prune MODEL --output-dir OUT

torch.distributed does the work: gloo between main memories, nccl between CUDA devices. Every collective begins with
``gather``, over gloo: its connections break at once when a process dies, and it carries the error of a rank to all
others, before they would wait for tensors of that rank.
"""

from __future__ import annotations

import atexit
import io
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from optima.console import warn
from optima.device import find_device
from optima.errors import OptimaError, RankError, RecipeError
from optima.stopping import unstoppable

T = TypeVar("T")
LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # set by a launcher such as torchrun
# A rank waits this long for the slowest. A process that dies is noticed at once, a machine without power only by this.
PATIENCE = timedelta(hours=2)


class Ranks:
    """The processes of a run, of which this is ``rank`` of ``size``.

    All ranks must call the methods that exchange something, in one order.

    Args:
        control: a gloo group of all processes; None: there is this one alone.
    """

    def __init__(self, control: Any = None) -> None:
        self.rank, self.size = (0, 1) if control is None else (dist.get_rank(), dist.get_world_size())
        self._control = self._data = control
        self._device = torch.device("cpu")
        self._failed = False  # all ranks know

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which writes, reports and shows progress."""
        return self.rank == 0

    def part(self, count: int) -> slice:
        """Which of ``count`` items are this rank's: contiguous; sizes differ by one at most."""
        return slice(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def here(self) -> int:
        """The number of ranks on this machine."""
        hosts = self.gather(socket.gethostname())
        return hosts.count(hosts[self.rank])

    def on(self, name: str) -> torch.device:
        """The device of this rank, where ``name`` is a recipe's: a CUDA device for each rank of a machine.

        Raises:
            RecipeError: if there is no such device, or none for each rank.
        """
        device, card = find_device(name), ""
        if self.size == 1:
            return device
        if device.type == "cuda":
            if device.index is not None:
                raise RecipeError(f"device {name} is one for all processes: leave it out, and each takes its own")
            local = int(os.environ.get("LOCAL_RANK", self.rank))
            # A batch system may show each process its own card alone.
            device = torch.device("cuda", local if local < torch.cuda.device_count() else 0)
            card = f"{socket.gethostname()} {torch.cuda.get_device_properties(device).uuid}"
        known = self.gather((device.type, card))
        if len(kinds := {kind for kind, _ in known}) > 1:
            raise RecipeError(
                f"the processes have different devices ({', '.join(sorted(kinds))}): name one by --device"
            )
        if card and (count := len(set(known))) < self.size:
            raise RecipeError(f"{self.size} processes share {count} CUDA devices: start one for each, with LOCAL_RANK")
        if device.type == "cuda":
            torch.cuda.set_device(device)  # as nccl expects
            self._data, self._device = dist.new_group(backend="nccl"), device
        return device

    def gather(self, value: T) -> list[T]:
        """Every rank's value, on every rank: small, tensors in it on the CPU.

        Raises:
            RankError: if a process has died.
            OptimaError: that another process raised.
        """
        return [value] if self.size == 1 else self._exchange(value)

    def gather_dict(self, own: Mapping[str, T]) -> dict[str, T]:
        """The entries of every rank's dict, on every rank."""
        return {name: value for each in self.gather(dict(own)) for name, value in each.items()}

    def _exchange(self, value: T, error: Exception | None = None) -> list[T]:
        kind = type(error) if isinstance(error, OptimaError) else RankError
        found: list[Any] = [None] * self.size
        with self._watched():
            dist.all_gather_object(found, (value, error and (kind, str(error) or repr(error))), group=self._control)
        for rank, (_, failed) in enumerate(found):
            if failed is not None:
                self._failed = True
                raise error or failed[0](f"{failed[1]} (rank {rank} of {self.size})")
        return [value for value, _ in found]

    def fail(self, error: Exception) -> None:
        """Raise ``error`` on the other ranks at their next ``gather``; one that is not ours as a ``RankError``."""
        if not self._failed:
            with suppress(type(error), OptimaError):
                self._exchange(None, error)

    @contextmanager
    def raised_on_all(self, kind: type[Exception]) -> Iterator[None]:
        """An error of this ``kind`` inside, on one rank, is raised on every rank: no rank waits for another."""
        own = ""
        try:
            yield
        except kind as error:
            if self.size == 1:
                raise
            own = str(error) or kind.__name__
        if message := next(filter(None, self.gather(own)), ""):
            raise kind(message)

    def all_gather(self, value: T) -> list[T]:
        """As ``gather``; CUDA tensors arrive on the rank's device."""
        if self.size == 1:
            return [value]

        def place(storage: Any, location: str) -> Any:
            return storage if location == "cpu" else storage.to(device=self._device)

        torch.save(value, file := io.BytesIO())
        every = self.gather(file.getvalue())
        return [torch.load(io.BytesIO(data), map_location=place, weights_only=False) for data in every]

    def broadcast(self, value: T | None, owner: int) -> T:
        """The owner's value on every rank; tensors in it are on the CPU."""
        data: list[Any] = [value]
        if self.size > 1:
            self.gather(None)
            with self._watched():
                dist.broadcast_object_list(data, owner, group=self._control)
        found: T = data[0]
        return found

    def on_rank0(self, make: Callable[[], T]) -> T:
        """What ``make`` returns on rank 0, the only one that calls it, on every rank."""
        return self.broadcast(make() if self.first else None, 0)

    def broadcast_(self, tensor: Tensor, owner: int) -> Tensor:
        """The owner's tensor in the place of every rank's, which is contiguous and on its device."""
        if self.size > 1:
            self.gather(None)
            with self._watched():
                dist.broadcast(tensor, owner, group=self._group(tensor))
        return tensor

    def all_reduce_(self, tensor: Tensor, owner: int | None = None) -> Tensor:
        """The sum of every rank's contiguous tensor, in place; with an ``owner``, there alone, undefined elsewhere."""
        if self.size > 1:
            self.gather(None)
            with self._watched():
                if owner is None:
                    dist.all_reduce(tensor, group=self._group(tensor))
                else:
                    dist.reduce(tensor, owner, group=self._group(tensor))
        return tensor

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum of every rank's tensor, added in float64, in a new tensor of the same dtype and device."""
        if self.size == 1:
            return tensor
        return self.all_reduce_(tensor.to(self._device, torch.float64, copy=True).contiguous()).to(tensor)

    def _group(self, tensor: Tensor) -> Any:
        return self._data if tensor.is_cuda else self._control

    def close(self) -> None:
        """Give up the connections of this run: a script may begin others, and nccl's hold device memory."""
        if self._data is not self._control:
            dist.destroy_process_group(self._data)
        dist.destroy_process_group(self._control)
        self._control = self._data = None

    @contextmanager
    def _watched(self) -> Iterator[None]:
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # torch has no type of its own for what gloo says
            self._failed = True
            unstoppable()  # the launcher will stop this process too: not before it has cleared up
            reason = str(error).strip().splitlines()[0]
            raise RankError(
                f"another process of this run has exited ({reason}): what was committed stays; the same command with "
                "--resume goes on, with as many processes as you like"
            ) from error


ALONE = Ranks()


@contextmanager
def joined() -> Iterator[Ranks]:
    """All processes that a launcher such as torchrun started with this one, or that the caller's own group has.

    An error inside ends the run in all of them, and nobody leaves before all have.
    """
    ready = dist.is_available() and dist.is_initialized()
    launched = all(name in os.environ for name in LAUNCHED) and int(os.environ["WORLD_SIZE"]) > 1
    if not (dist.get_world_size() > 1 if ready else launched):
        yield ALONE
        return
    if not ready:
        try:
            dist.init_process_group("gloo")
        except RuntimeError as error:  # of the rendezvous, in many forms
            raise RankError(f"the processes of this run do not find each other ({error}): see the launcher") from error
    ranks = Ranks(dist.new_group(backend="gloo", timeout=PATIENCE))
    try:
        yield ranks
        try:  # nobody leaves before all have come to the end
            ranks.gather(None)
        except RankError as error:
            if not ranks.first:
                raise
            warn(f"the run is complete, although {error}")  # the first process writes all there is
    except Exception as error:  # of another kind, such as Ctrl-C, ends the process, which the others notice
        ranks.fail(error)
        raise
    ranks.close()
    if not ready:  # kept for the next run of this script: made anew, it would read the addresses of this one
        atexit.register(lambda: dist.is_initialized() and dist.destroy_process_group())
