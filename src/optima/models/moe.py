"""Mixtures of experts: each expert of a fused parameter is a linear, and any family's own code shows its inputs.

transformers keeps the experts of a block in parameters of three dimensions, (experts, outputs, inputs) or, in some
families, (experts, inputs, outputs). No module is called for one expert. So the products of the module's forward pass
are watched: where one factor lies in the memory of a fused parameter, the other holds the inputs of that expert. How
experts are gated, clamped or scaled in between stays the family's own business.

Shapes: O outputs, D inputs, T tokens that reach an expert.
"""

from __future__ import annotations

import inspect
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter

from optima.errors import ModelError

# Products of inputs with a weight, and the dimension of their second factor that counts inputs.
PRODUCTS: dict[Any, int] = {
    nn.functional.linear: -1,
    **dict.fromkeys((torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.__matmul__, Tensor.mm, Tensor.bmm), -2),
}
_Key = tuple[str, int]  # a parameter and an expert


@dataclass(frozen=True)
class Call:
    """A product of one expert.

    Attributes:
        inputs_TD: of the tokens that were routed to it.
        tokens_T: which of the module's tokens these are; None if its code does not show.
        output: of the product.
        rows_T: the rows of ``output`` that belong to the tokens; None if all do.
    """

    inputs_TD: Tensor
    tokens_T: Tensor | None
    output: Tensor
    rows_T: Tensor | None = None

    def watch(self, see: Callable[[Tensor], None]) -> None:
        """Show ``see`` the gradient at the outputs of the tokens, (T, O), when it is known."""
        rows_T = self.rows_T  # a hook that held all of the call would hold the output, which holds the hook
        if self.output.requires_grad:
            self.output.register_hook(lambda gradient: see(gradient if rows_T is None else gradient[rows_T]))


Watcher = Callable[[Call], None]


class FusedExperts:
    """The experts of one module.

    Args:
        name: full name of the module in the model.
        module: holds the fused parameters.
        transposed: of each fused parameter by its name in the module, whether inputs come before outputs.
    """

    def __init__(self, name: str, module: nn.Module, transposed: dict[str, bool]) -> None:
        self.name, self.module, self.transposed = name, module, transposed
        self._watchers: dict[_Key, OrderedDict[int, Watcher]] = {}
        self._own: dict[str, Any] = {}  # a forward that the module itself held
        self._only_watched = False

    @property
    def count(self) -> int:
        """How many experts."""
        return len(self.parameter(next(iter(self.transposed))))

    def parameter(self, name: str) -> Tensor:
        """A fused parameter."""
        found = getattr(self.module, name)
        assert isinstance(found, Tensor)
        return found

    def orient(self, name: str, expert: int, stored: Tensor) -> Tensor:
        """An expert's part of a tensor like the parameter ``name``, outputs x inputs: a view."""
        return stored[expert].mT if self.transposed[name] else stored[expert]

    def linears(self) -> list[ExpertLinear]:
        """Every expert of every fused parameter."""
        return [ExpertLinear(self, name, expert) for name in self.transposed for expert in range(self.count)]

    def add(self, key: _Key, watcher: Watcher) -> RemovableHandle:
        """Show ``watcher`` every product of an expert, until the handle's ``remove()``."""
        if not self._watchers:
            attributes = vars(self.module)
            self._own = {"forward": attributes["forward"]} if "forward" in attributes else {}
            attributes["forward"] = self._forward
        return _Handle(self, key, watcher)

    @property
    def are_sent_tokens(self) -> bool:
        """Whether they are told which tokens are whose; else each is given all (Llama 4)."""
        return len(inspect.signature(type(self.module).forward).parameters) > 2

    def drop(self, key: _Key) -> None:
        """Forget a key that nobody watches; the module's own forward comes back behind the last."""
        if not self._watchers.get(key, True):
            del self._watchers[key]
            if not self._watchers:
                del vars(self.module)["forward"]
                vars(self.module).update(self._own)

    def watchers(self, key: _Key) -> OrderedDict[int, Watcher]:
        """Those of an expert's products."""
        return self._watchers.setdefault(key, OrderedDict())

    @contextmanager
    def only_watched(self) -> Iterator[None]:
        """Experts that nobody watches give zeros inside, at no cost."""
        self._only_watched = True
        try:
            yield
        finally:
            self._only_watched = False

    def find(self, weight: Tensor, inputs_dim: int) -> tuple[str, int | None] | None:
        """The parameter and the expert that a factor lies in, None for all experts; None if it lies elsewhere.

        Raises:
            ModelError: if inputs and outputs lie the other way round than the shapes said.
        """
        for name, transposed in self.transposed.items():
            fused = self.parameter(name)
            ahead = weight.storage_offset() - fused.storage_offset()
            same = weight.untyped_storage().data_ptr() == fused.untyped_storage().data_ptr()
            if not same or weight.ndim < 2 or not 0 <= ahead < fused.numel():
                continue
            if min(weight.shape[-2:]) > 1 and (weight.stride(inputs_dim) == 1) is transposed:
                raise ModelError(
                    f"{self.name}.{name} is not stored as its shape {tuple(fused.shape)} suggests: leave it out with "
                    f"--ignore '{name}'"
                )
            if weight.numel() == fused.numel() and weight.ndim == 3:
                return name, None
            if weight.numel() * len(fused) == fused.numel():
                return name, int(ahead // fused.stride(0))  # SymInt, to newer stubs
        return None

    def show(self, key: _Key, call: Call) -> None:
        """Tell the watchers of a product."""
        for watcher in list(self._watchers.get(key, {}).values()):
            watcher(call)

    def skips(self, expert: int) -> bool:
        """Whether nobody asks for this expert's products."""
        return self._only_watched and not any((name, expert) in self._watchers for name in self.transposed)

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's plain loop over experts, watched; other implementations sort tokens into one product."""
        forward = type(self.module).forward
        if hasattr(self.module, "is_transposed"):  # transformers chooses an implementation in front of it
            forward = getattr(forward, "__wrapped__", forward)
        with _Interceptor(self, hidden_of_call(args, kwargs)):
            return forward(self.module, *args, **kwargs)


def hidden_of_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """What a module of experts is called with: its first tensor."""
    return next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))


class _Handle(RemovableHandle):
    """Takes the watcher away, and with the last one the watch."""

    def __init__(self, experts: FusedExperts, key: _Key, watcher: Watcher) -> None:
        watchers = experts.watchers(key)
        super().__init__(watchers)
        watchers[self.id] = watcher
        self._experts, self._key = experts, key

    def remove(self) -> None:
        """See ``RemovableHandle``."""
        super().remove()
        self._experts.drop(self._key)


class _Interceptor(TorchFunctionMode):
    """Shows the products with fused parameters."""

    def __init__(self, experts: FusedExperts, hidden: Tensor) -> None:
        super().__init__()
        self._experts, self._hidden = experts, hidden
        self._picked: tuple[Tensor, Tensor] | None = None  # rows of the hidden states, and which
        self._tokens: dict[int, Tensor] = {}  # of the expert at work

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in PRODUCTS and len(args) > 1 and (found := self._experts.find(args[1], PRODUCTS[func])) is not None:
            name, expert = found
            if expert is None:
                pairs = enumerate(zip(*args[:2], strict=True))
                return torch.stack([self._product(torch.matmul, pair, {}, (name, each), True) for each, pair in pairs])
            return self._product(func, args, kwargs, (name, expert), False)
        result = func(*args, **kwargs)
        if func is Tensor.__getitem__ and self._is_hidden(args[0]) and _is_list(args[1]):
            self._picked = (result, args[1])
        return result

    def _is_hidden(self, tensor: Tensor) -> bool:
        same = tensor.ndim == 2 and tensor.numel() == self._hidden.numel()
        return same and tensor.data_ptr() == self._hidden.data_ptr()

    def _product(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], key: _Key, every_token: bool
    ) -> Tensor:
        """One expert's; with ``every_token`` those that are not routed to it are there as zeros, as in Llama 4."""
        inputs = args[0]
        if self._experts.skips(key[1]):
            outputs = args[1].shape[-2 if PRODUCTS[func] == -1 else -1]
            nothing: Tensor = inputs.new_zeros(*inputs.shape[:-1], outputs)
            return nothing
        output: Tensor = func(*args, **kwargs)
        if self._picked is not None and self._picked[0] is inputs:
            self._tokens = {key[1]: self._picked[1]}
        inputs_TD = inputs.reshape(-1, inputs.shape[-1])
        if every_token and key[1] not in self._tokens:
            self._tokens[key[1]] = inputs_TD.ne(0).any(dim=1).nonzero()[:, 0]
        tokens_T, rows_T = self._tokens.get(key[1]), None
        if every_token:
            assert tokens_T is not None
            inputs_TD, rows_T = inputs_TD[tokens_T], tokens_T
        elif tokens_T is not None and len(tokens_T) != len(inputs_TD):
            tokens_T = None
        self._experts.show(key, Call(inputs_TD, tokens_T, output, rows_T))
        return output


def _is_list(index: Any) -> bool:
    return isinstance(index, Tensor) and index.ndim == 1 and index.dtype == torch.int64


class Stored:
    """What every kind of ``Linear`` in ``optima.models.blocks`` shares: its weight is a view of a parameter."""

    @property
    def parameter(self) -> Tensor:
        """See ``Linear``."""
        raise NotImplementedError

    def orient(self, stored: Tensor) -> Tensor:
        """See ``Linear``."""
        raise NotImplementedError

    def read(self) -> Tensor:
        """See ``Linear``: a view."""
        return self.orient(self.parameter.detach())

    def write(self, weight_OD: Tensor) -> None:
        """See ``Linear``."""
        # What is made there changes there alone.
        with torch.inference_mode(self.parameter.is_inference()), torch.no_grad():
            self.read().copy_(weight_OD)


@dataclass(frozen=True)
class ExpertLinear(Stored):
    """One expert of a fused parameter: see ``Linear`` in ``optima.models.blocks``.

    Attributes:
        experts: the module's.
        within: name of the fused parameter in the module.
        expert: number of the expert.
    """

    experts: FusedExperts
    within: str
    expert: int

    @property
    def name(self) -> str:
        """See ``Linear``."""
        return f"{self.experts.name}.{self.within}.{self.expert}"

    @property
    def parameter(self) -> Tensor:
        """See ``Linear``: of all experts."""
        return self.experts.parameter(self.within)

    @property
    def shape(self) -> tuple[int, int]:
        """See ``Linear``."""
        _, first, second = self.parameter.shape
        return (second, first) if self.experts.transposed[self.within] else (first, second)

    def orient(self, stored: Tensor) -> Tensor:
        """See ``Linear``."""
        return self.experts.orient(self.within, self.expert, stored)

    def observe(self, see: Callable[[Tensor], None]) -> RemovableHandle:
        """See ``Linear``: of the tokens that are routed to the expert."""
        return self.experts.add((self.within, self.expert), lambda call: see(call.inputs_TD))

    def watch(self, see: Callable[[Tensor], None]) -> RemovableHandle:
        """See ``Linear``: of the tokens that are routed to the expert."""
        return self.experts.add((self.within, self.expert), lambda call: call.watch(see))

    def watch_tokens(self, see: Callable[[Tensor, Tensor | None], None]) -> RemovableHandle:
        """As ``watch``, with the places of the tokens among those of the module."""

        def watch(call: Call) -> None:
            tokens_T = call.tokens_T
            call.watch(lambda gradient: see(gradient, tokens_T))

        return self.experts.add((self.within, self.expert), watch)


def experts_of(module: nn.Module, prefix: str) -> list[FusedExperts]:
    """The mixtures inside ``module``, whose full name is ``prefix``, that keep experts in fused parameters."""
    found = []
    for name, child in module.named_modules():
        if "expert" in name.lower() or "expert" in type(child).__name__.lower():
            transposed = _layout(child)
            if transposed:
                found.append(FusedExperts(f"{prefix}.{name}".strip("."), child, transposed))
    return found


def _layout(module: nn.Module) -> dict[str, bool]:
    """Of the fused parameters whether inputs come first; empty if there are none, or their shapes do not say.

    The first leads from the hidden size to another, the last one back; the same size stands at both ends.
    """
    fused = {name: p for name, p in module.named_parameters(recurse=False) if p.ndim == 3}
    if len(fused) < 2 or len({len(parameter) for parameter in fused.values()}) > 1:
        return {}
    first, *_, last = fused.values()
    told = getattr(module, "is_transposed", None)
    ways = [False] * (first.shape[2] == last.shape[1]) + [True] * (first.shape[1] == last.shape[2])
    if isinstance(told, bool) and told in ways:
        return dict.fromkeys(fused, told)
    return dict.fromkeys(fused, ways[0]) if len(ways) == 1 else {}


def split_on_disk(model: PreTrainedModel, linears: Iterable[object]) -> int:
    """Weights of ``linears`` whose fused parameter transformers writes in parts: a writer keeps them whole beside."""
    experts = [linear for linear in linears if isinstance(linear, ExpertLinear)]
    if not experts:
        return 0
    converters = [each for each in get_model_conversion_mapping(model) if isinstance(each, WeightConverter)]
    fused = [target for each in converters for target in each.target_patterns]
    return sum(math.prod(each.shape) for each in experts if any(target in each.name for target in fused))
