"""What a model can read: token sequences, how long, of which vocabulary. Asked before long work.

Shapes: N sequences, L tokens in each, V vocabulary, E hidden size.
"""

from __future__ import annotations

import inspect

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from optima.errors import CalibrationError, ModelError


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether the model has two stacks, the second of which reads what the first made."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def head_of(model: nn.Module) -> nn.Module | None:
    """The LM head; some vision-language models leave it to the language model inside (Nemotron-H Omni)."""
    if not isinstance(model, PreTrainedModel):
        return None
    own: nn.Module | None = model.get_output_embeddings()
    inner = None if own is not None or is_encoder_decoder(model) else model.get_decoder()
    return head_of(inner) if inner is not None and inner is not model else own


def in_slices(model: nn.Module) -> bool:
    """Whether the model can be asked for the logits of some positions alone."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def arguments_of(model: nn.Module) -> list[str]:
    """What the model's forward pass takes, by its class: one that someone put in its place may not say."""
    return list(inspect.signature(type(model).forward).parameters)[1:]


def needed_arguments(model: nn.Module) -> set[str]:
    """What the model's forward pass insists on."""
    parameters = inspect.signature(type(model).forward).parameters
    return {name for name in arguments_of(model) if parameters[name].default is inspect.Parameter.empty}


def check_forward(model: nn.Module) -> None:
    """Raise ``ModelError`` if ``model``, or its skeleton, only has parts that run, as the Omni models of Qwen."""
    if type(model).forward is nn.Module.forward:
        parts = ", ".join(name for name, part in model.named_children() if isinstance(part, PreTrainedModel))
        raise ModelError(
            f"{type(model).__name__} has no forward pass of its own: load it in Python, give prune the part that reads "
            f"text ({parts or 'it names none'}), and save the whole"
        )


def check_length(model: nn.Module, length: int) -> None:
    """Raise ``ModelError`` if ``model``, or its skeleton, reads no token sequences of ``length``."""
    check_forward(model)
    what = ""
    if "input_ids" not in arguments_of(model):
        what = f"{getattr(model, 'main_input_name', 'nothing')}, not text"
    elif hasattr(model, "get_text_features"):  # CLIP and those after it: a tower for each of what they compare
        what = "text with images or sounds, not text alone"
    if what:
        raise ModelError(
            f"{type(model).__name__} reads {what}: from Python, give prune(..., calibration=...) batches of its "
            "processor's outputs"
        )
    if is_encoder_decoder(model):
        if length < 2:
            raise ModelError(f"{type(model).__name__} reads the two halves of a text: use --max-seq-length 2 or more")
        length = length - length // 2
    positions = num_positions(model)
    if positions is not None and length > positions:
        raise ModelError(
            f"sequences of {length} tokens exceed the {positions} positions of {type(model).__name__}: "
            f"use --max-seq-length {positions} or less"
        )


def num_positions(model: nn.Module) -> int | None:
    """The longest sequence that the model has positions for; None if it names no limit."""
    config = getattr(model, "config", None)
    if isinstance(config, PretrainedConfig):
        config = config.get_text_config()
    positions = getattr(config, "max_position_embeddings", getattr(config, "max_seq_len", None))  # MPT's name
    if not isinstance(positions, int) or positions < 1:  # XLNet says -1
        return None
    # RoBERTa's family counts positions from behind the padding's.
    names = (name for name, _ in model.named_modules() if "position" in name)
    unused = [getattr(model.get_submodule(name), "padding_idx", None) for name in names]
    return positions - max((index + 1 for index in unused if index is not None), default=0)


def check_vocabulary(model: nn.Module, tokens_NL: Tensor) -> None:
    """Raise ``CalibrationError`` if ``tokens_NL`` hold an id that ``model``, or its skeleton, has no embedding for."""
    assert isinstance(model, PreTrainedModel)
    try:
        embedding_VE = model.get_input_embeddings().weight
    except NotImplementedError:  # a class that names none
        return
    assert isinstance(embedding_VE, Tensor)
    if not len(tokens_NL):
        return
    lowest, largest = int(tokens_NL.min()), int(tokens_NL.max())
    if lowest < 0 or largest >= len(embedding_VE):
        raise CalibrationError(
            f"the tokens run from {lowest} to {largest}, but {type(model).__name__} has a vocabulary of "
            f"{len(embedding_VE)}: use the tokenizer that was published with the model"
        )
