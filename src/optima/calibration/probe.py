"""What one forward pass of the model over a few tokens shows of a stack: call order, outputs, shared inputs.

Shapes: L tokens, D inputs, E hidden size.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from optima.data.batches import Batch, arguments, stack_size
from optima.device import one_memory_error
from optima.errors import ModelError
from optima.models.blocks import Linear, Stack
from optima.models.inspect import arguments_of
from optima.models.load import some
from optima.names import NUMBER, kind

PROBE_LENGTH = 8  # tokens on which a model is looked at before the long work
Place = tuple[int, int]  # a block, and a place in the tuple that it returns
_Called = tuple[int, tuple[Any, ...], dict[str, Any], Any]  # a block, its arguments and its output


@dataclass(frozen=True)
class Probe:
    """A stack as it runs.

    Attributes:
        groups: of each block, its linears to prune by the input that they share.
        outputs: what each block returned; of tensors the shapes alone, once they were compared.
        carried: of each block, its arguments (a position behind the hidden states, or a name) that an earlier block
            returned: T5's position bias.
        sample_dim: dimension of the hidden states that counts sequences.
        sequence_first: True if tokens are counted before it, as in XLNet.
        routed: names of the linears that are not given every token (experts).
        repeated: names of the linears that are called several times.
    """

    groups: list[list[tuple[Linear, ...]]]
    outputs: list[Any]
    carried: list[dict[int | str, Place]]
    sample_dim: int
    sequence_first: bool
    routed: frozenset[str]
    repeated: frozenset[str] = frozenset()

    @property
    def token_dims(self) -> int:
        """How many dimensions of the hidden states, the first ones, tell tokens apart; in the others is one's own.

        Gemma 3n's versions are tokens of their own; the streams of hyper-connections (DeepSeek-V4) are not.
        """
        return 2 + self.sample_dim - self.sequence_first

    def first_tokens(self, inputs: Tensor, name: str, samples: int, length: int) -> Tensor | None:
        """The inputs (B, D) of each sequence's first token among those of the linear ``name``; None if unknown."""
        counts = inputs.shape[:-1]
        order = (length, samples) if self.sequence_first else (samples, length)
        flat = len(counts) == 1 and counts[0] == samples * length and name not in self.routed
        # Dimensions of one do not matter: one for all heads, a batch of one sequence.
        one_block = len(counts) > 1 and [count for count in counts if count != 1] == [n for n in order if n != 1]
        if not (flat or one_block):
            return None
        return inputs.reshape(-1, inputs.shape[-1])[self.starts(samples, length)]

    def starts(self, samples: int, length: int) -> slice:
        """Where the first token of each sequence is among all tokens of a batch."""
        return slice(samples) if self.sequence_first else slice(None, None, length)


class Given:
    """The inputs of linears, distinguished by ``identity``.

    Tensors are held until their block is done, so that no address is used again meanwhile.

    Attributes:
        inputs: of each linear that was given tokens, an identity a call.
        tokens: how many each was given.
    """

    def __init__(self) -> None:
        self.inputs: defaultdict[str, list[object]] = defaultdict(list)
        self.tokens = Counter[str]()
        self._held: list[Tensor] = []
        self._done = 0

    def add(self, name: str, inputs: Tensor) -> None:
        """Note a call."""
        if inputs.numel():
            self._held.append(inputs)
            self.inputs[name].append((self._done, identity(inputs)))
            self.tokens[name] += inputs.numel() // inputs.shape[-1]

    def release(self) -> None:
        """A block is done: later tensors differ from all earlier ones."""
        self._held.clear()
        self._done += 1


def identity(tensor: Tensor) -> object:
    """Equal for tensors that are the same numbers at the same place; one that was changed in place since is another."""
    version = 0 if tensor.is_inference() else tensor._version  # inference tensors have none
    address = tensor.data_ptr() or id(tensor)
    return (tensor.device, address, tensor.dtype, tuple(tensor.shape), tensor.stride(), version)


# What Triton and CUDA extensions say of tensors in main memory.
OF_KERNELS = ("is_cuda", "cannot be accessed from Triton")


def _refuse_kernels(model: nn.Module, error: Exception) -> None:
    """Raise if it comes from kernels of a package that the library takes wherever a model runs."""
    if any(text in str(error) for text in OF_KERNELS):
        raise ModelError(
            f"{type(model).__name__} runs by kernels that need a GPU ({error}): take --device cuda and text alone, or "
            "uninstall their package (causal_conv1d, fla or mamba_ssm), without which it runs anywhere"
        ) from error


def _is_ours(error: BaseException) -> bool:
    """Whether it was raised by a hook of this package, which is a bug."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and str(trace.tb_frame.f_globals.get("__name__")).startswith("optima.")


def _plainly(model: nn.Module) -> dict[str, bool]:
    """What keeps a forward pass from doing more than the blocks need, as its configuration may ask."""
    configs = (model.config, *(getattr(model.config, name, None) for name in ("text_config", "decoder")))
    options = {}
    if any(getattr(config, "use_cache", None) is not None for config in configs):
        options["use_cache"] = False  # what one block keeps would be handed to the others
    if "output_router_logits" in arguments_of(model):
        options["output_router_logits"] = False  # a loss of its own would be made of them, which single blocks lack
    if getattr(model.config, "return_dict", True) is False:
        options["return_dict"] = True  # or logits have no name
    return options


def forward(model: nn.Module, batch: Batch, **options: Any) -> Any:
    """What the model's own forward pass on a batch returns, where its embedding is.

    Raises:
        ModelError: if the model asks for something else.
    """
    device = next(model.parameters()).device  # the embedding is the first parameter of every model of the library
    options |= _plainly(model)
    given = {name: tensor.to(device) for name, tensor in arguments(model, batch).items()}
    # Processors return float32, and not every model rounds it to its own dtype.
    own = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    given |= {name: tensor.to(own) for name, tensor in given.items() if tensor.is_floating_point()}
    try:
        return model(**given, **options)
    except RuntimeError as error:
        _refuse_kernels(model, error)
        raise
    except (TypeError, ValueError) as error:  # what the library raises where other inputs are missing
        _refuse_kernels(model, error)
        what = "token ids alone" if isinstance(batch, Tensor) else "what it is given for calibration"
        raise ModelError(f"{type(model).__name__} cannot run on {what}: {error}") from error


@torch.inference_mode(False)  # inside it, tensors do not count their changes
@torch.no_grad()
def look(model: nn.Module, stack: Stack, batch: Batch) -> Probe:
    """Run the whole model once, as it is, on a small batch, and watch ``stack``.

    Raises:
        ModelError: if it does not call the blocks once each, in order, on hidden states.
    """
    calls: list[_Called] = []
    given = Given()

    def note(index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        calls.append((index, args, kwargs, output))
        given.release()

    with ExitStack() as hooks:
        for block in stack.blocks:
            handle = block.module.register_forward_hook(partial(note, block.index), with_kwargs=True)
            hooks.callback(handle.remove)
            hooks.enter_context(block.linearized())
            for linear in block.linears:
                hooks.callback(linear.observe(partial(given.add, linear.name)).remove)
        try:
            with one_memory_error():
                forward(model, batch.clone() if isinstance(batch, Tensor) else batch)
        except torch.OutOfMemoryError:
            raise
        except (AttributeError, RuntimeError) as error:
            if _is_ours(error):
                raise
            raise ModelError(
                f"the forward pass of {type(model).__name__} itself fails in transformers {transformers.__version__} "
                f"({type(error).__name__}: {error}): try another release, or another class in architectures of "
                "config.json"
            ) from error
    _check_calls(model, stack, [index for index, *_ in calls], isinstance(batch, Tensor))
    _check_chain(model, stack, calls)
    outputs = [output for *_, output in calls]
    samples, length = stack_size(model, stack, batch)
    sample_dim, sequence_first, length = _layout(model, hidden_of(outputs[0]), samples, length)
    names = [linear.name for block in stack.blocks for linear in block.linears]
    routed = {kind(name) for name in names if given.tokens[name] != samples * length}
    return Probe(
        _groups(stack, given),
        outputs,
        _carried(calls),
        sample_dim,
        sequence_first,
        frozenset(name for name in names if kind(name) in routed),
        frozenset(name for name in names if len(given.inputs[name]) > 1),
    )


def _check_calls(model: nn.Module, stack: Stack, called: Sequence[int], of_text: bool) -> None:
    """Each block runs once, in its turn."""
    names = [block.name for block in stack.blocks]
    skipped = [name for index, name in enumerate(names) if index not in called]
    if skipped and of_text and list(called) == sorted(set(called)):  # Mllama
        raise ModelError(
            f"{type(model).__name__} does not call {some(skipped)} on text alone: if they read images or sounds, give "
            "prune(..., calibration=...) batches of its processor's outputs, from Python"
        )
    if list(called) != list(range(len(names))):
        raise ModelError(
            f"{type(model).__name__} does not call each of {names[0]} .. {names[-1]} exactly once, in order, in a "
            "forward pass (shared or skipped blocks), which this tool cannot prune"
        )


def _check_chain(model: nn.Module, stack: Stack, calls: Sequence[_Called]) -> None:
    """What leaves a block is what enters the next: no model may change it in between, as some do that see."""
    for (index, *_, output), (_, args, kwargs, _) in pairwise(calls):
        entering, left = args[0] if args else kwargs.get("hidden_states"), hidden_of(output)
        if isinstance(entering, Tensor) and not _same(entering, left):
            raise ModelError(
                f"{type(model).__name__} changes the hidden states between {stack.blocks[index].name} and the next "
                "block, which this tool cannot prune"
            )


def _same(entering: Tensor, left: Tensor) -> bool:
    """The same numbers; NaN equals NaN, of which a loss will tell."""
    if entering is left:
        return True
    alike = (entering.shape, entering.dtype, entering.device) == (left.shape, left.dtype, left.device)
    return alike and torch.allclose(entering, left, rtol=0.0, atol=0.0, equal_nan=True)


def hidden_of(output: Any) -> Tensor:
    """The hidden states that a block returned, bare or in front of others."""
    hidden: Tensor = output[0] if isinstance(output, (tuple, list)) else output
    return hidden


def with_hidden(output: Any, hidden: Tensor) -> Any:
    """What a block would return in the place of ``output`` if its hidden states were ``hidden``."""
    return type(output)([hidden, *output[1:]]) if isinstance(output, (tuple, list)) else hidden


def _layout(model: nn.Module, hidden: object, samples: int, length: int | None) -> tuple[int, bool, int]:
    """``sample_dim`` and ``sequence_first``, and the length, which may not have been known."""
    counts = tuple(hidden.shape[:-1]) if isinstance(hidden, Tensor) else ()
    if length is None and len(counts) == 2:
        length = counts[1]
    if length is not None and counts[:2] == (samples, length):  # DeepSeek-V4: several streams of a token behind them
        return 0, False, length
    if length is not None and counts == (length, samples):
        return 1, True, length
    if length is not None and counts[1:] == (samples, length):  # Gemma 3n: several versions of the hidden states
        return 1, False, length
    shape = tuple(hidden.shape) if isinstance(hidden, Tensor) else type(hidden).__name__
    raise ModelError(f"the blocks of {type(model).__name__} return {shape}, not the hidden states of {length} tokens")


def _carried(calls: Sequence[_Called]) -> list[dict[int | str, Place]]:
    """Arguments that are, as objects, what an earlier block returned besides hidden states."""
    returned: dict[int, Place] = {}
    carried: list[dict[int | str, Place]] = []
    for index, args, kwargs, output in calls:
        named: list[tuple[int | str, Any]] = [*enumerate(args[1:] if args else ()), *kwargs.items()]
        carried.append({key: returned[id(value)] for key, value in named if id(value) in returned})
        for place, item in enumerate(output if isinstance(output, (tuple, list)) else ()):
            if place and isinstance(item, Tensor):
                returned.setdefault(id(item), (index, place))
    return carried


def _groups(stack: Stack, given: Given) -> list[list[tuple[Linear, ...]]]:
    """Linears that were given the same tensors; one that was not reached is grouped as another of its kind."""
    first: dict[tuple[object, ...], str] = {}
    leaders = {name: first.setdefault(tuple(inputs), name) for name, inputs in given.inputs.items()}
    siblings = {kind(name): name for name in leaders}
    names = {linear.name for block in stack.blocks for linear in block.linears}
    found = []
    for block in stack.blocks:
        groups: defaultdict[str, list[Linear]] = defaultdict(list)
        for name, linear in ((linear.name, linear) for linear in block.linears):
            leader = leaders.get(name)
            if leader is None and (sibling := siblings.get(kind(name))) is not None:
                leader = _renumbered(name, sibling, leaders[sibling])
                leader = leader if leader in names and leader not in leaders else None
            groups[leader or name].append(linear)
        found.append([tuple(group) for group in groups.values()])
    return found


def _renumbered(name: str, sibling: str, leader: str) -> str | None:
    """What stands to ``name`` as ``leader`` stands to ``sibling``; None if those two differ in their numbers."""
    if NUMBER.findall(leader) != NUMBER.findall(sibling):
        return None
    numbers = iter(NUMBER.findall(name))
    return NUMBER.sub(lambda match: next(numbers), leader)


def agree(found: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """Equal but for the rounding of products of another shape; NaN equals NaN (a loss will report it).

    ``dtype``: of the weights, which may be coarser than that of a residual stream.
    """
    if found.shape != expected.shape:
        return False
    own, coarsest = expected.float().cpu(), max(torch.finfo(each).eps for each in (found.dtype, dtype))
    tolerance = max(1e-4, 8 * coarsest) * own.nan_to_num(0, 0, 0).abs().max().item()
    return torch.allclose(found.float().cpu(), own, rtol=0, atol=tolerance, equal_nan=True)
