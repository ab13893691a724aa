"""Read a pretrained model: a hub id, a local directory, or a GGUF file."""

from __future__ import annotations

import logging
import textwrap
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from optima.errors import ModelError

_logger = logging.getLogger("optima")

PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
# Weights that published checkpoints may lack: sentence encoders are often saved without the pooler of their class.
OPTIONAL_PARTS = ("pooler",)
# Errors by which transformers and its readers say that a checkpoint is missing, incomplete or not understood.
READ_ERRORS = (
    *(OSError, ValueError, KeyError, ImportError, RuntimeError, AttributeError, TypeError),
    *(SafetensorError, StrictDataclassError),
)
REMEDIES = {
    "model": "check the spelling, the network and, for a private model, your login",
    "configuration": "check config.json, and whether a newer release of transformers knows the model",
    "weights": "check that the checkpoint is complete and in safetensors or GGUF format",
    "tokenizer": "copy the tokenizer's files (tokenizer.json, tokenizer_config.json) beside the weights",
}


@dataclass(frozen=True)
class Source:
    """Where a model comes from, in the words of ``from_pretrained``.

    Attributes:
        name: what the user typed.
        path: hub id or directory.
        gguf_file: the GGUF file inside it, if it is one.
        trust_remote_code: run the checkpoint's own modelling code.
    """

    name: str
    path: str
    gguf_file: str | None = None
    trust_remote_code: bool = False

    @property
    def arguments(self) -> dict[str, Any]:
        """Keyword arguments that every ``from_pretrained`` call shares."""
        arguments: dict[str, Any] = {"trust_remote_code": self.trust_remote_code}
        if self.gguf_file:
            arguments["gguf_file"] = self.gguf_file
        return arguments


def find_source(name: str, trust_remote_code: bool = False) -> Source:
    """Understand what the user typed.

    Raises:
        ModelError: if a local path does not hold a safetensors or GGUF checkpoint.
    """
    path = Path(name).expanduser()
    if name.endswith(".gguf"):
        if path.is_file():
            return Source(name, str(path.parent), path.name, trust_remote_code)
        parts = name.split("/")
        if path.is_absolute() or len(parts) < 3:
            raise ModelError(
                f"there is no file {name}: give a local GGUF file, or owner/repository/file.gguf on the hub"
            )
        return Source(name, "/".join(parts[:2]), "/".join(parts[2:]), trust_remote_code)
    if path.is_dir():
        _check_directory(path)
        return Source(name, str(path), None, trust_remote_code)
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise ModelError(f"there is no directory {name}: give a hub id, a local model directory or a GGUF file")
    return Source(name, name, None, trust_remote_code)


def _check_directory(path: Path) -> None:
    if not (path / "config.json").is_file():
        ggufs = sorted(p.name for p in path.glob("*.gguf"))
        hint = f"name the GGUF file itself ({ggufs[0]})" if ggufs else "it is not a Hugging Face model directory"
        raise ModelError(f"{path} has no config.json: {hint}")
    if any(path.glob("*.safetensors")):
        return
    if any((path / name).exists() for name in PICKLES) or any(path.glob("*.bin")):
        raise ModelError(
            f"{path} holds its weights only as pickle files, which can run any code when opened: convert them to "
            "safetensors first (load with torch and save with model.save_pretrained)"
        )
    raise ModelError(f"{path} has a config.json but no .safetensors weights")


def load_config(source: Source) -> PretrainedConfig:
    """The model's configuration, without its weights.

    Raises:
        ModelError: if it cannot be found or read, or the checkpoint is quantized.
    """
    with explain_read_errors(source, "model"):
        config = AutoConfig.from_pretrained(source.path, **source.arguments)
    assert isinstance(config, PretrainedConfig)
    if getattr(config, "quantization_config", None) and not source.gguf_file:
        raise ModelError(f"{source.name} is quantized: prune the unquantized checkpoint, then quantize the result")
    return config


def model_class(config: PretrainedConfig, source: Source) -> Any:
    """The class that the checkpoint was saved from, so that its heads are kept; an Auto class where none is named.

    Raises:
        ModelError: if the class is named, but the library has none of that name.
    """
    if source.gguf_file:
        return AutoModelForCausalLM
    names = config.architectures or []
    if config.__class__.__module__.startswith("transformers_modules"):
        # Remote code registers itself with the Auto classes.
        auto_map = getattr(config, "auto_map", {})
        return AutoModelForCausalLM if "AutoModelForCausalLM" in auto_map else AutoModel
    if not names:
        return AutoModel
    if not hasattr(transformers, names[0]):
        raise ModelError(
            f"{source.name} is a {names[0]}, which transformers {transformers.__version__} does not have: install a "
            "newer release, or correct architectures in config.json"
        )
    return getattr(transformers, names[0])


def load_model(source: Source, dtype: str = "auto") -> PreTrainedModel:
    """Load the weights into main memory, in evaluation mode.

    Args:
        source: where from.
        dtype: ``auto`` keeps the checkpoint's own.

    Raises:
        ModelError: if the weights cannot be found or read, or exist only as pickle files.
    """
    config = load_config(source)
    arguments = source.arguments
    if source.gguf_file:
        arguments |= _dequantize_arguments()
    else:
        arguments["use_safetensors"] = True
        arguments["config"] = config
    kind = model_class(config, source)
    with explain_read_errors(source, "weights"):
        model, loading = kind.from_pretrained(
            source.path,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            output_loading_info=True,
            **arguments,
        )
    assert isinstance(model, PreTrainedModel)
    _check_complete(source, model, loading["missing_keys"], loading["unexpected_keys"])
    model.eval()
    return model


def _check_complete(source: Source, model: PreTrainedModel, missing: Iterable[str], unexpected: Iterable[str]) -> None:
    """The library fills missing weights with random numbers, and drops those that it has no place for."""
    missing = [name for name in missing if not any(part in name for part in OPTIONAL_PARTS)]
    if missing:
        raise ModelError(
            f"the checkpoint {source.name} lacks weights of {type(model).__name__} ({_some(missing)}): download it "
            "again, or correct architectures in config.json"
        )
    if unexpected := list(unexpected):
        lost = f"{source.name} has weights that {type(model).__name__} has no place for ({_some(unexpected)})"
        if not model.config.architectures:
            raise ModelError(f"{lost}: name its architecture in config.json")
        _logger.warning("%s: they are left out", lost)


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _dequantize_arguments() -> dict[str, Any]:
    """Newer releases keep GGUF weights packed unless told otherwise; older ones always unpack."""
    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}


def load_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """The model's tokenizer.

    Raises:
        ModelError: if it is missing or unreadable.
    """
    with explain_read_errors(source, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(source.path, **source.arguments)
    if not isinstance(tokenizer, PreTrainedTokenizerBase) or not len(tokenizer):
        raise ModelError(f"{source.name} has no tokenizer: copy its tokenizer files beside the weights")
    return tokenizer


@contextmanager
def explain_read_errors(source: Source, what: str) -> Iterator[None]:
    """Turn a failure to read one of ``REMEDIES`` into a ``ModelError`` that names the source and the remedy."""
    try:
        yield
    except READ_ERRORS as error:
        kind = f"{type(error).__name__} " if isinstance(error, KeyError) else ""
        detail = textwrap.shorten(kind + str(error), 300, placeholder=" ...") or type(error).__name__
        remedy = REMEDIES[what]
        if "trust_remote_code" in str(error):
            remedy = "if you trust the code that comes with it, run it with --trust-remote-code"
        raise ModelError(f"the {what} of {source.name} cannot be read ({detail}): {remedy}") from error
