"""Accumulate one Hessian for each distinct input of a block's linears, while the block runs forward.

Shapes: T tokens, D inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from optima.errors import CalibrationError
from optima.models.blocks import Linear
from optima.qp.hessian import Hessian
from optima.qp.products import gram


class HessianAccumulator:
    """X^T X over the tokens seen so far: float32 products of each batch, summed in float64."""

    def __init__(self) -> None:
        self.sum_DD: Tensor | None = None
        self.num_tokens = 0

    def add(self, inputs_TD: Tensor, name: str, first_sample: int, samples: int) -> None:
        """Add the inputs of ``samples`` sequences of equal length, the first of which is number ``first_sample``.

        Raises:
            CalibrationError: on NaN or Inf, naming the linear and the first bad sample.
        """
        inputs_TD = inputs_TD.float()
        product_DD = gram(inputs_TD)
        # NaN or Inf anywhere in a column shows on the diagonal; looking there costs nothing.
        if not product_DD.diagonal().isfinite().all():
            raise CalibrationError(_describe_bad(inputs_TD, name, first_sample, samples))
        if self.sum_DD is None:
            self.sum_DD = product_DD.double()
        else:
            self.sum_DD += product_DD
        self.num_tokens += inputs_TD.shape[0]

    def finish(self, damping: float) -> Hessian:
        """H = X^T X / T, and the accumulator is empty again."""
        assert self.sum_DD is not None
        matrix_DD = self.sum_DD.div_(self.num_tokens)
        self.sum_DD = None
        return Hessian(matrix_DD, damping)


def _describe_bad(inputs_TD: Tensor, name: str, first_sample: int, samples: int) -> str:
    if inputs_TD.shape[0] % samples:
        last = first_sample + samples - 1
        return f"the inputs of {name} contain NaN or Inf in calibration samples {first_sample} to {last}"
    by_sample = inputs_TD.reshape(samples, -1)
    # Finite inputs can still overflow float32 when squared.
    good = (by_sample.isfinite() & (by_sample.abs() < 1e18)).all(dim=1)
    sample = first_sample + int(good.to(torch.int8).argmin())
    return (
        f"the inputs of {name} contain NaN or Inf (first in calibration sample {sample}): load the model in another "
        "dtype (--dtype bfloat16 or float32), or check its weights"
    )


class SharedInputs:
    """Recognises linears that are given the same tensor (q, k and v; gate and up), in the first batch.

    The identity of tensors tells, which is why the batch's inputs are held until its end; later batches rely on it.
    """

    def __init__(self) -> None:
        self.leader: dict[str, str] = {}
        self._seen: list[tuple[Tensor, int, str]] = []
        self._first_batch = True

    def find(self, name: str, inputs: Tensor) -> str:
        """The first linear that is given the same inputs as the linear ``name``: itself, if it is the first."""
        if name not in self.leader:
            # A tensor that was changed in place since is another input.
            seen = ((tensor, other) for tensor, version, other in self._seen if version == inputs._version)
            same = (other for tensor, other in seen if _is_same(tensor, inputs))
            self.leader[name] = next(same, name)
            if self._first_batch:
                self._seen.append((inputs, inputs._version, self.leader[name]))
        return self.leader[name]

    def end_batch(self) -> None:
        """Let go of the inputs that were held."""
        self._seen.clear()
        self._first_batch = False


def _is_same(first: Tensor, second: Tensor) -> bool:
    if first is second:
        return True
    views = first.data_ptr() == second.data_ptr() != 0 and first.dtype == second.dtype
    return views and first.shape == second.shape and first.stride() == second.stride()


class HessianCollector:
    """Hooks on a block's linears that accumulate one Hessian for each distinct input."""

    def __init__(self, linears: Sequence[Linear]) -> None:
        self._linears = linears
        self._shared = SharedInputs()
        self._accumulators: dict[str, HessianAccumulator] = {}
        self._first_sample = 0
        self._samples = 0

    @contextmanager
    def batch(self, samples: int) -> Iterator[None]:
        """Observe one forward pass over ``samples`` sequences inside this context."""
        self._samples = samples
        with ExitStack() as stack:
            for linear in self._linears:
                handle = linear.module.register_forward_pre_hook(self._hook(linear.name))
                stack.callback(handle.remove)
            yield
        self._first_sample += samples
        self._shared.end_batch()

    def finish(self, damping: float) -> Iterator[tuple[Hessian | None, list[Linear]]]:
        """Each distinct input's Hessian with the linears that share it; None for linears that were never called."""
        groups: dict[str | None, list[Linear]] = {}
        for linear in self._linears:
            groups.setdefault(self._shared.leader.get(linear.name), []).append(linear)
        for leader, linears in groups.items():
            yield None if leader is None else self._accumulators.pop(leader).finish(damping), linears

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def observe(module: nn.Module, args: tuple[Any, ...]) -> None:
            inputs = args[0]
            if inputs.numel() and self._shared.find(name, inputs) == name:
                accumulator = self._accumulators.setdefault(name, HessianAccumulator())
                accumulator.add(inputs.reshape(-1, inputs.shape[-1]), name, self._first_sample, self._samples)

        return observe
