"""Several processes that prune one model: sequences are split over them, linears and rows too; one of them writes.

    torchrun --nproc-per-node 8 -m optima prune MODEL --output-dir OUT

torch.distributed does the work: gloo between main memories, nccl between CUDA devices. Two rules keep a run from
hanging. Every exchange begins with ``gather``, over gloo, whose connections break at once when a process dies: others
raise ``RankError``. And an ``OptimaError`` of one process is raised by all at their next ``gather``. Tensors travel
right behind one, for which all have the memory by then: nccl would wait for a process that has not.
"""

from __future__ import annotations

import atexit
import logging
import os
import socket
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from optima.device import find_device
from optima.errors import OptimaError, RankError, RecipeError
from optima.parcels import joined_bytes, plan_of, put_together, take_apart
from optima.stopping import unstoppable

T = TypeVar("T")
# What a launcher tells each process.
TOLD = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# A process waits so long for the slowest. One that dies is noticed at once, a machine that loses power only by this.
PATIENCE = timedelta(hours=2)
# Of the sums of a matrix, travelling together.
STRIP_BYTES = 2**26
_logger = logging.getLogger("optima")


class Ranks:
    """The processes of a run, of which this is number ``rank`` of ``size``. This class: one process, which has it all.

    Every method that is given or returns something of another process must be called by all of them, in one order.
    """

    rank, size = 0, 1

    @property
    def first(self) -> bool:
        """Whether this process writes, reports and shows progress."""
        return self.rank == 0

    def part(self, count: int) -> slice:
        """Which of ``count`` things are this process's: contiguous; sizes differ by one at most."""
        return slice(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def here(self) -> int:
        """How many of them are on this machine."""
        hosts = self.gather(socket.gethostname())
        return hosts.count(hosts[self.rank])

    def on(self, name: str) -> torch.device:
        """The device of this process, where ``name`` is a recipe's.

        Raises:
            RecipeError: if there is no such device, or none for each process.
        """
        return find_device(name)

    def gather(self, value: T) -> list[T]:
        """Every process's value, by rank: small, without tensors."""
        return [value]

    def collect(self, value: T) -> list[T]:
        """Every process's value, by rank, with the tensors inside it, which keep their kind of device."""
        return [value]

    def to_first(self, value: T, received: Callable[[T], T] = lambda value: value) -> list[T]:
        """Every process's value in the first, by rank, with its tensors; ``received`` is given those of others."""
        return [value]

    def share(self, value: T | None, owner: int) -> T:
        """The owner's value in every process, with the tensors inside it."""
        assert value is not None
        return value

    def from_first(self, make: Callable[[], T]) -> T:
        """What the first process makes, in every process."""
        return make()

    def add(self, tensor: Tensor, owner: int | None = None) -> Tensor:
        """The sum of every process's tensor, in place: at ``owner``, with anything elsewhere, or, if None, at all."""
        return tensor

    def add_lower(self, matrix_DD: Tensor, owner: int | None = None) -> None:
        """``add`` for the lower triangle of a matrix; what is above it is undefined then."""

    def total(self, tensor: Tensor, owner: int | None = None) -> Tensor:
        """As ``add``, but added in float64 and returned in the dtype of ``tensor``, which stays as it is."""
        return tensor


ALONE = Ranks()


class Group(Ranks):
    """This process and others, in torch's default process group.

    Args:
        control: a gloo group of all of them.
    """

    def __init__(self, control: dist.ProcessGroup) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._control = self._data = control
        self._device = torch.device("cpu")
        self._over = False  # all know that the run has failed

    def on(self, name: str) -> torch.device:
        """See ``Ranks``: the first CUDA device belongs to the first process of its machine, and so on."""
        device, card = find_device(name), ""
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
        if card and len(cards := set(known)) < self.size:
            shared = f"{self.size} processes share {len(cards)} CUDA devices"
            raise RecipeError(f"{shared}: start one process for each, with its LOCAL_RANK")
        if device.type == "cuda":
            torch.cuda.set_device(device)  # as nccl expects
            self._data, self._device = everyone(backend="nccl"), device
        return device

    def gather(self, value: T) -> list[T]:
        """See ``Ranks``.

        Raises:
            RankError: if a process has died.
            OptimaError: that another process raised.
        """
        return self._exchange(None, value)

    def _exchange(self, error: OptimaError | None, value: T) -> list[T]:
        own = None if error is None else (type(error), str(error))
        found: list[Any] = [None] * self.size
        with self._watched():
            dist.all_gather_object(found, (own, value), group=self._control)
        failed = {rank: error for rank, (error, _) in enumerate(found) if error is not None}
        if failed:
            self._over = True
            rank, (kind, text) = next(iter(failed.items()))
            raise error or kind(f"{text} (said by process {rank} of {self.size})")
        return [value for _, value in found]

    def tell(self, error: OptimaError) -> bool:
        """Let the others raise ``error`` at their next ``gather``. Returns, when all have, whether all know of it."""
        if not self._over:
            try:
                self._exchange(error, None)
            except RankError:
                return False
            except OptimaError:  # this one, or that of a process before it
                return True
        return not isinstance(error, RankError)

    def leave(self, error: BaseException) -> None:
        """Break the connections: the others raise ``RankError``, those too that would wait for this process alone.

        While a caller keeps ``error``, what torch was doing would hold them open.
        """
        self._over = True
        dist.destroy_process_group(self._control)
        del self._control, self._data
        told: BaseException | None = error
        while told is not None:
            for frame, _ in traceback.walk_tb(told.__traceback__):
                if str(frame.f_globals.get("__name__")).startswith(dist.__name__):
                    with suppress(RuntimeError):  # it goes on
                        frame.clear()
            told = told.__cause__ or told.__context__

    def close(self) -> None:
        """Give up the connections of this run: a script may begin others, and nccl's hold memory of the device."""
        if self._data is not self._control:
            dist.destroy_process_group(self._data)
        dist.destroy_process_group(self._control)
        del self._control, self._data

    def collect(self, value: T) -> list[T]:
        """See ``Ranks``."""
        data, tensors = take_apart(value)
        parts = self.gather((data, plan_of(tensors)))
        size = max(plan[-1][0] for _, plan in parts)
        own = joined_bytes(tensors, size, self._device)
        flat = torch.empty(len(parts) * size, dtype=torch.uint8, device=self._device)
        if size:
            self.gather(None)
            with self._watched():  # into one tensor: for several, nccl takes as much memory again
                getattr(dist, "all_gather_single", dist.all_gather_into_tensor)(flat, own, group=self._data)
        return [
            value if rank == self.rank else put_together(data, plan, flat[rank * size :], self._device)
            for rank, (data, plan) in enumerate(parts)
        ]

    def to_first(self, value: T, received: Callable[[T], T] = lambda value: value) -> list[T]:
        """See ``Ranks``: by way of main memory."""
        data, tensors = take_apart(value)
        parts, found, cpu = self.gather((data, plan_of(tensors))), [value], torch.device("cpu")
        for rank, (data, plan) in enumerate(parts[1:], 1):
            mine, size = rank == self.rank, plan[-1][0]
            buffer = joined_bytes(tensors, size, cpu) if mine else torch.empty(size * self.first, dtype=torch.uint8)
            self.gather(None)  # all have the memory
            if size and (mine or self.first):
                with self._watched():
                    dist.send(buffer, 0, group=self._control) if mine else dist.recv(buffer, rank, group=self._control)
            if self.first:
                found.append(received(put_together(data, plan, buffer, self._device)))
        return found if self.first else []

    def share(self, value: T | None, owner: int) -> T:
        """See ``Ranks``."""
        mine = self.rank == owner
        data, tensors = take_apart(value) if mine else (b"", [])
        data, plan = self.gather((data, plan_of(tensors)))[owner]
        buffer = joined_bytes(tensors, plan[-1][0], self._device)
        if len(buffer):
            self.gather(None)
            with self._watched():
                dist.broadcast(buffer, owner, group=self._data)
        result: T = value if mine else put_together(data, plan, buffer, self._device)  # type: ignore[assignment]
        return result

    def from_first(self, make: Callable[[], T]) -> T:
        """See ``Ranks``."""
        return self.share(make() if self.first else None, 0)

    def add(self, tensor: Tensor, owner: int | None = None) -> Tensor:
        """See ``Ranks``: contiguous."""
        self.gather(None)
        with self._watched():
            if owner is None:
                dist.all_reduce(tensor, group=self._data)
            else:
                dist.reduce(tensor, owner, group=self._data)
        return tensor

    def add_lower(self, matrix_DD: Tensor, owner: int | None = None) -> None:
        """See ``Ranks``: in strips of rows, half of the bytes of the matrix."""
        rows = max(STRIP_BYTES // (len(matrix_DD) * matrix_DD.element_size()), 1)
        for begin in range(0, len(matrix_DD), rows):
            strip = matrix_DD[begin : begin + rows, : begin + rows]
            strip.copy_(self.add(strip.contiguous(), owner))

    def total(self, tensor: Tensor, owner: int | None = None) -> Tensor:
        """See ``Ranks``."""
        return self.add(tensor.to(self._device, torch.float64, copy=True).contiguous(), owner).to(tensor)

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """A broken connection is a ``RankError``."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # torch has no type of its own for what gloo says
            self._over = True
            unstoppable()  # the launcher will stop this process too: not before it has cleared up
            reason = str(error).strip().splitlines()[0]
            raise RankError(
                f"another process of this run is no more ({reason}): what was committed stays; the same command with "
                "--resume goes on, with as many processes as you like"
            ) from error


@contextmanager
def joined() -> Iterator[Ranks]:
    """All processes that a launcher such as torchrun started with this one, or that the caller's own group has.

    An error inside ends the run in all of them, and nobody leaves before all have.
    """
    ready = dist.is_available() and dist.is_initialized()
    launched = all(name in os.environ for name in TOLD) and int(os.environ["WORLD_SIZE"]) > 1
    if not (dist.get_world_size() > 1 if ready else launched):
        yield ALONE
        return
    if not ready:
        try:
            dist.init_process_group("gloo")
        except RuntimeError as error:  # of the rendezvous, in many forms
            raise RankError(f"the processes of this run do not find each other ({error}): see the launcher") from error
    ranks = Group(everyone(backend="gloo", timeout=PATIENCE))
    try:
        yield ranks
        _all_at_the_end(ranks)
    except BaseException as error:
        # A process that is no more, a bug, or Ctrl-C: this one may live on, and the others must not wait for it.
        if not isinstance(error, OptimaError) or not ranks.tell(error):
            ranks.leave(error)
        raise
    ranks.close()
    if not ready:  # kept for the next run of this script: made anew, it would read the addresses of this one
        atexit.register(_give_up_group)


def _all_at_the_end(ranks: Ranks) -> None:
    try:
        ranks.gather(None)
    except RankError as error:
        if not ranks.first:
            raise
        _logger.warning("the run is complete, although %s", error)  # the first process writes all there is


def _give_up_group() -> None:
    """Unless the script has done it itself."""
    if dist.is_initialized():
        dist.destroy_process_group()


def everyone(**options: Any) -> dist.ProcessGroup:
    """A new group of all processes. Newer torch types it as what a process outside of the group would be given, too."""
    group: Any = dist.new_group(**options)
    assert isinstance(group, dist.ProcessGroup)
    return group
