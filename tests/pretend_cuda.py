"""A pretend CUDA device in main memory: it says "cuda:0", computes on the CPU, and refuses what CUDA refuses.

Tensors are ordinary CPU tensors; those "on the device" have a mark on their storage. A TorchFunctionMode lies about
``.device`` and takes ``device=`` out of calls; a TorchDispatchMode checks every operator and marks what it returns. So
numbers are those of the CPU bit for bit, parameters keep their identity, and the code takes its CUDA paths.

    with pretend_cuda():
        optima.prune(model, Recipe(device="cuda"), ...)

Not modelled: order of asynchronous work, memory, threads of autograd, and the precision of CUDA's own kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
MEMORY = 80 * 2**30  # bytes
aten = torch.ops.aten
# May take tensors of several devices: copies; and operators whose indices may be on the CPU.
COPIES = {aten.copy_, aten._to_copy, aten.copy, aten.set_, aten.detach, aten.alias, aten._copy_from}
INDEXING = {aten.index, aten.index_put_, aten.index_put, aten._index_put_impl_, aten._unsafe_index}
# One 0-dim CPU tensor beside those of the device, besides pointwise operators.
SCALAR_TOO = {aten.where, aten.masked_fill_, aten.masked_fill, aten.fill_, aten.fill, aten.lerp, aten.lerp_}
# Pointwise, but without config.allow_cpu_scalars in their CUDA kernels.
NO_SCALARS = {aten.clamp, aten.clamp_, aten.clamp_min, aten.clamp_max}
PRODUCTS = {aten.mm, aten.bmm, aten.addmm, aten.addmm_, aten.baddbmm, aten.mv, aten.addmv, aten.dot, aten.vdot}
LINALG = ("cholesky", "linalg_", "triangular_solve", "geqrf", "ormqr", "_linalg")
NO_HALF = {aten.histc, aten.quantile}
DEVICE_GETTERS = {Tensor.device.__get__, Tensor.is_cuda.__get__, Tensor.is_cpu.__get__}
TO_HOST = {Tensor.numpy, Tensor.__array__, torch._C.TensorBase.numpy}
DENIED = "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory first."


class PretendError(RuntimeError):
    """What a CUDA device would refuse."""


def on_cuda(tensor: Tensor) -> bool:
    with torch._C.DisableTorchFunction():
        return tensor.layout == torch.strided and hasattr(tensor.untyped_storage(), "pretend")


def mark(tensor: Any) -> Any:
    if isinstance(tensor, Tensor):
        with torch._C.DisableTorchFunction():
            if tensor.layout == torch.strided and tensor.device.type == "cpu":
                tensor.untyped_storage().pretend = True
    return tensor


def tensors_in(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, Tensor)]


class _Move(torch.autograd.Function):
    """A copy in the other memory; its gradient comes back."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, to_cuda: bool, dtype: torch.dtype | None) -> Tensor:
        ctx.was_cuda, ctx.dtype = on_cuda(tensor), tensor.dtype
        return _moved(tensor, to_cuda, dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _moved(grad, ctx.was_cuda, ctx.dtype), None, None


def _moved(tensor: Tensor, to_cuda: bool, dtype: torch.dtype | None) -> Tensor:
    with torch._C.DisableTorchFunction(), torch.utils._python_dispatch._disable_current_modes():
        result = torch.empty_like(tensor, dtype=dtype or tensor.dtype).copy_(tensor)
    return mark(result) if to_cuda else result


class _Checks(TorchDispatchMode):
    def __init__(self, state: PretendCuda) -> None:
        super().__init__()
        self.state = state

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [tensor for tensor in tensors_in((args, kwargs)) if tensor.device.type != "meta"]
        marked = [on_cuda(tensor) for tensor in given]
        packet = func.overloadpacket
        device = any(marked)
        if device:
            self._check(func, packet, args, given, marked)
        if device and packet is aten.histc and not given[0].is_floating_point():  # which a CPU cannot
            return mark(func(given[0].double(), *args[1:], **kwargs).to(given[0].dtype))
        result = func(*args, **kwargs)
        if packet in COPIES and packet is not aten._to_copy:
            return result  # into the first argument, or a view
        if packet in INDEXING:
            device = marked[0]
        if device or (not given and self.state.here):
            tree_map(mark, result)
        return result

    def _check(self, func: Any, packet: Any, args: Any, given: list[Tensor], marked: list[bool]) -> None:
        if any(tensor.is_mkldnn for tensor in given) or "mkldnn" in str(func):
            raise PretendError(f"{func}: no mkldnn on CUDA")
        dtypes = {tensor.dtype for tensor, mine in zip(given, marked, strict=True) if mine}
        if packet in PRODUCTS and not any(dtype.is_floating_point or dtype.is_complex for dtype in dtypes):
            raise PretendError(f'"{func}" not implemented for {dtypes} on CUDA')
        small = {torch.bfloat16, torch.float16}
        name = str(packet).removeprefix("aten.")
        factors = name.startswith(LINALG) and not name.endswith(("vector_norm", "vecdot"))
        if (factors or packet in NO_HALF) and dtypes & small:
            raise PretendError(f'"{func}" not implemented for {dtypes} on CUDA')
        if all(marked) or packet in COPIES:
            return
        if packet in INDEXING:
            beside = [tensor for tensor in tensors_in(args[2:])] if "put" in str(packet) else []
            wrong = [each for each in beside if each.ndim and on_cuda(each) != marked[0]]
            indices = [each for each in args[1] if each is not None]
            if not wrong and (marked[0] or not any(map(on_cuda, indices))):
                return
        elif packet in SCALAR_TOO or (torch.Tag.pointwise in func.tags and packet not in NO_SCALARS):
            strangers = [each for each, mine in zip(given, marked, strict=True) if not mine]
            in_place = func._schema.name.endswith("_") and not marked[0]
            if len(strangers) == 1 and not strangers[0].ndim and not in_place:
                return
        shapes = [
            f"{tuple(each.shape)} on {'cuda:0' if mine else 'cpu'}" for each, mine in zip(given, marked, strict=True)
        ]
        raise PretendError(f"{func}: expected all tensors to be on the same device, found {', '.join(shapes)}")


class _Lies(TorchFunctionMode):
    def __init__(self, state: PretendCuda) -> None:
        super().__init__()
        self.state = state

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        if func in DEVICE_GETTERS:
            true = func(*args, **kwargs)
            if not on_cuda(args[0]):
                return true
            return CUDA if isinstance(true, torch.device) else func is Tensor.is_cuda.__get__
        if (func in TO_HOST or name in ("numpy", "__array__")) and on_cuda(args[0]):
            raise PretendError(DENIED)
        if name == "get_device":
            return 0 if on_cuda(args[0]) else -1
        if name == "pin_memory":
            return args[0]
        if name in ("cuda", "cpu", "to") and isinstance(args[0], Tensor):
            return self._to(name, *args, **kwargs)
        if name == "_parse_to":  # of nn.Module.to
            return func(*args, **kwargs)
        return self._called(func, name, args, kwargs)

    def _called(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Any other function: with the device that it names taken out, and its result marked."""
        given, device = tensors_in((args, kwargs)), kwargs.get("device")
        for place, value in enumerate(args):  # by place: torch.nn.init's, new_empty's
            if isinstance(value, torch.device) and value.type == "cuda":
                device, args = value, (*args[:place], CPU, *args[place + 1 :])
        wanted = None if device is None else _kind(device)
        if wanted == "cuda":
            kwargs |= {"device": CPU} if "device" in kwargs else {}
        here = wanted == "cuda" if wanted is not None else any(map(on_cuda, given))
        _check_generator(kwargs.get("generator"), here, func)
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        if wanted is not None and len(given) == 1 and name in ("as_tensor", "tensor", "asarray"):
            return self._to("to", given[0], wanted, kwargs.get("dtype"))
        with self.state.at(here):
            result = func(*args, **kwargs)
        if wanted == "cuda":
            tree_map(mark, result)
        elif wanted == "cpu" and any(map(on_cuda, given)):
            result = tree_map(lambda each: _moved(each, False, None) if isinstance(each, Tensor) else each, result)
        return result

    def _to(self, name: str, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        was = on_cuda(tensor)
        kind, dtype, rest = _where_to(name, args, kwargs)
        if kind not in (None, "cpu", "cuda"):
            return tensor.to(kind, *([dtype] if dtype else []), **kwargs)
        target = None if kind is None else kind == "cuda"
        if tensor.device.type == "meta" and target is not None:
            raise NotImplementedError("Cannot copy out of meta tensor; no data!")
        if target is not None and target != was:
            return _Move.apply(tensor, target, dtype)
        if name != "to":
            return tensor
        with self.state.at(was):
            return tensor.to(dtype or tensor.dtype, *rest, **kwargs)


def _kind(device: Any) -> str:
    return "cuda" if isinstance(device, int) else torch.device(device).type


def _where_to(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str | None, torch.dtype | None, list]:
    """The kind of device and the dtype that ``Tensor.to``, ``cpu`` or ``cuda`` is given, and what else by place."""
    dtype, given, other = kwargs.pop("dtype", None), kwargs.pop("device", None), kwargs.pop("other", None)
    rest = []
    for value in args:
        if isinstance(value, Tensor):
            other = value
        elif isinstance(value, torch.dtype):
            dtype = value
        elif isinstance(value, (torch.device, str)) or (isinstance(value, int) and not isinstance(value, bool)):
            given = value
        elif value is not None:
            rest.append(value)
    if name != "to":
        return name, dtype, rest
    if other is not None:
        return "cuda" if on_cuda(other) else other.device.type, other.dtype, rest
    return None if given is None else _kind(given), dtype, rest


def _check_generator(generator: Any, here: bool, func: Any) -> None:
    if generator is not None and getattr(generator, "pretend", False) != here:
        expected, found = ("cuda", "cpu") if here else ("cpu", "cuda")
        raise PretendError(f"{func}: Expected a '{expected}' device type for generator but found '{found}'")


class _Generator(torch.Generator):
    pretend = True

    def __new__(cls, device: Any = "cpu") -> Any:
        if torch.device(device).type == "cuda":
            return super().__new__(cls)
        return _generator(device)


_generator = torch.Generator


class _Event:
    def __init__(self, **_: Any) -> None: ...

    def record(self, *_: Any) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


class PretendCuda:
    """Whether what is made now is made on the device."""

    def __init__(self) -> None:
        self.here = False

    @contextmanager
    def at(self, here: bool) -> Iterator[None]:
        """Inside it is so."""
        before, self.here = self.here, here
        try:
            yield
        finally:
            self.here = before


@contextmanager
def pretend_cuda() -> Iterator[None]:
    """Inside, torch has one CUDA device."""
    state = PretendCuda()
    properties = SimpleNamespace(
        total_memory=MEMORY, name="Pretend", major=9, minor=0, multi_processor_count=132, gcnArchName=""
    )

    # torch.Generator is a C type that is called with a device: replaced as a name.
    answers: dict[str, Callable[..., Any]] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "is_initialized": lambda: True,
        "_lazy_init": lambda: None,
        "init": lambda: None,
        "_lazy_call": lambda *_, **__: None,
        "synchronize": lambda *_: None,
        "empty_cache": lambda: None,
        "set_device": lambda *_: None,
        "get_device_name": lambda *_: "Pretend",
        "get_device_capability": lambda *_: (9, 0),
        "get_device_properties": lambda *_: properties,
        "mem_get_info": lambda *_: (MEMORY, MEMORY),
        "memory_allocated": lambda *_: 0,
        "memory_reserved": lambda *_: 0,
        "max_memory_allocated": lambda *_: 0,
        "max_memory_reserved": lambda *_: 0,
        "reset_peak_memory_stats": lambda *_: None,
        "is_bf16_supported": lambda *_, **__: True,
        "is_current_stream_capturing": lambda: False,
        "get_rng_state": lambda *_: torch.get_rng_state(),
        "set_rng_state": lambda value, *_: torch.set_rng_state(value),
        "manual_seed": lambda *_: None,
        "manual_seed_all": lambda *_: None,
        "Event": _Event,
    }
    with ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, answer))
        stack.enter_context(mock.patch.object(torch.version, "cuda", "13.0"))
        stack.enter_context(mock.patch.object(torch, "Generator", _Generator))
        lies, run_backward = _Lies(state), torch.autograd._engine_run_backward

        def with_hooks_told(*args: Any, **kwargs: Any) -> Any:
            with lies:  # torch disables a mode while it handles Tensor.backward
                return run_backward(*args, **kwargs)

        stack.enter_context(mock.patch.object(torch.autograd, "_engine_run_backward", with_hooks_told))
        stack.enter_context(_Checks(state))
        stack.enter_context(lies)
        yield
