"""Accumulate one Hessian for each distinct input of a block's linears, while the block runs forward.

*Attention sinks.* Most heads of most language models attend to the first token of a sequence when they have nothing
better to attend to (Xiao et al., arXiv 2309.17453), whatever that token is, and blocks treat it as no other (massive
activations: Sun et al., arXiv 2402.17762). An error there reaches every later token, so it may count as more than one
token (cf. IntactKV, arXiv 2403.01241: it leaves the keys and values of such tokens unquantised). Where every sequence
begins with BOS, its input is one vector: to keep the outputs that belong to it takes one of the free weights of a row.

Shapes: B sequences, L tokens in a sequence, T tokens, D inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from optima.errors import CalibrationError
from optima.linalg.hessian import Hessian
from optima.linalg.products import gram
from optima.models.stacks import Linear


class HessianAccumulator:
    """X^T S X over the tokens seen so far, S their weights: float32 products of each batch, summed in float64."""

    def __init__(self) -> None:
        self.sum_DD: Tensor | None = None
        self.total_weight = 0.0

    def add(self, inputs_TD: Tensor, name: str, first_sample: int, samples: int) -> None:
        """Add the inputs of ``samples`` sequences of equal length, the first of which is number ``first_sample``.

        Each token weighs 1.

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
        self.total_weight += inputs_TD.shape[0]

    def add_weight(self, inputs_TD: Tensor, weight: float) -> None:
        """Let tokens that were added weigh more, each by ``weight``."""
        assert self.sum_DD is not None
        self.sum_DD.add_(gram(inputs_TD.float()), alpha=weight)
        self.total_weight += weight * inputs_TD.shape[0]

    def finish(self, damping: float) -> Hessian:
        """H = X^T S X / tr S, and the accumulator is empty again."""
        assert self.sum_DD is not None
        matrix_DD = self.sum_DD.div_(self.total_weight)
        self.sum_DD, self.total_weight = None, 0.0
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
    """Hooks on a block's linears that accumulate one Hessian for each distinct input.

    Args:
        linears: the linears.
        sink_weight: of the first token of each sequence, relative to all tokens of the sequence together: it counts as
            ``max(1, sink_weight * L)`` tokens, in units of the others. 0: it counts as one.

    """

    def __init__(self, linears: Sequence[Linear], sink_weight: float = 0.0) -> None:
        self._linears = linears
        self._sink_weight = sink_weight
        self._shared = SharedInputs()
        self._accumulators: dict[str, HessianAccumulator] = {}
        self._leaders_without_sinks: set[str] = set()
        self._first_sample = 0
        self._samples = 0
        self._length = 0

    @contextmanager
    def batch(self, samples: int, length: int) -> Iterator[None]:
        """Observe one forward pass over ``samples`` sequences of ``length`` tokens inside this context."""
        self._samples, self._length = samples, length
        with ExitStack() as stack:
            for linear in self._linears:
                handle = linear.module.register_forward_pre_hook(self._hook(linear.name))
                stack.callback(handle.remove)
            yield
        self._first_sample += samples
        self._shared.end_batch()

    @property
    def without_sinks(self) -> list[str]:
        """Names of the linears whose first tokens could not be told from the others.

        They were given something else than one input a token: the experts of a mixture, say.
        """
        leader = self._shared.leader
        return [linear.name for linear in self._linears if leader.get(linear.name) in self._leaders_without_sinks]

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
                inputs_TD = inputs.reshape(-1, inputs.shape[-1])
                accumulator.add(inputs_TD, name, self._first_sample, self._samples)
                self._weigh_sinks(accumulator, inputs_TD, name)

        return observe

    def _weigh_sinks(self, accumulator: HessianAccumulator, inputs_TD: Tensor, name: str) -> None:
        extra = self._sink_weight * self._length - 1.0
        if extra <= 0.0:
            return
        if inputs_TD.shape[0] == self._samples * self._length:
            accumulator.add_weight(inputs_TD[:: self._length], extra)
        else:
            self._leaders_without_sinks.add(name)
