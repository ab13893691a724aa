"""Read a pretrained model: a hub id, a local directory, or a GGUF file."""

from __future__ import annotations

import copy
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from optima.console import warn
from optima.errors import ModelError
from optima.files import COMPRESSED, TEMPLATES, TOKENIZERS, shards, stamps, usable_path

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# What the client of the hub raises when it is refused, offline or cut off.
HUB_FAILURES: tuple[type[Exception], ...] = (OSError, *HfHubHTTPError.__bases__)
# Files that are missing, damaged or contradict each other, and packages that remote code or GGUF files need.
UNREADABLE: tuple[type[Exception], ...] = (
    *(*HUB_FAILURES, ValueError, ImportError, SafetensorError),
    *(StrictDataclassError, struct.error),
)
AUXILIARY = (
    *(*TOKENIZERS, f"{TEMPLATES}/*.jinja"),
    # The licence of many models asks to be passed on with them.
    *("LICENSE*", "License*", "license*", "LICENCE*", "NOTICE*", "Notice*", "USE_POLICY*"),
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
    # Of sentence encoders; their pooling and dense modules are in directories of their own.
    *("modules.json", "sentence_*config.json", "config_sentence_transformers.json"),
    *("[0-9]_*/*.json", "[0-9]_*/*.txt", "[0-9]_*/*.safetensors"),
)
CODE, README = "*.py", "README.md"
SMALL_FILES = ["*.json", "*.txt", *AUXILIARY, README]  # of a hub model, before its weights
# Weights that published checkpoints may lack: sentence encoders are often saved without the pooler of their class.
OPTIONAL_PARTS = ("pooler",)
# What the library leaves out, or makes up, is logged and not raised: it names no weight otherwise.
LOADING = {"output_loading_info": True, "ignore_mismatched_sizes": True}
NO_PICKLES = (
    "convert pickle files, which can run any code when opened, first (load with torch and save with "
    "model.save_pretrained)"
)


@dataclass(frozen=True)
class Source:
    """Where a model comes from.

    Attributes:
        name: what the user typed.
        path: its directory on this disk; of a hub model that in the cache, without the weights until they are needed.
        gguf_file: the GGUF file inside it, if it is one.
        trust_remote_code: run the checkpoint's own modelling code.
        repo: the repository of a hub model.
    """

    name: str
    path: str
    gguf_file: str | None = None
    trust_remote_code: bool = False
    repo: str | None = None

    @property
    def place(self) -> Path:
        """Its directory or GGUF file."""
        return Path(self.path, self.gguf_file or "")

    @property
    def commit(self) -> str | None:
        """The commit of a directory in the hub's cache; None of other directories."""
        home = Path(self.path).resolve()
        return next((each.name for each in (home, *home.parents) if each.parent.name == "snapshots"), None)

    @property
    def arguments(self) -> dict[str, Any]:
        """Keyword arguments that every ``from_pretrained`` call shares."""
        of_gguf = {"gguf_file": self.gguf_file} if self.gguf_file else {}
        return {"trust_remote_code": self.trust_remote_code, **of_gguf}


def find_source(name: str, trust_remote_code: bool = False) -> Source:
    """The model that the user named: a local directory, a GGUF file, or a hub id, as ``NAME`` or ``NAME@REVISION``.

    All files of a hub model but its weights are downloaded; GGUF files are downloaded whole.

    Raises:
        ModelError: if there is none, or a directory has no safetensors weights.
    """
    path = usable_path(name, "the model", "give a hub id, a local model directory or a GGUF file")
    if path.is_dir():
        _check_directory(path)
        return Source(name, str(path), None, trust_remote_code)
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(f"{name} is a file: give the directory that it is in, {path.parent}, or a GGUF file")
        return Source(name, str(path.parent), path.name, trust_remote_code)
    repo, _, revision = name.partition("@")
    source = Source(name, "", None, trust_remote_code, repo)
    with explain_read_errors(source, "model"):
        if repo.endswith(".gguf"):
            *parts, file_name = repo.split("/", 2)
            file = Path(hf_hub_download("/".join(parts), file_name, revision=revision or None))
            return replace(source, path=str(file.parent), gguf_file=file.name, repo="/".join(parts))
        code = [CODE] if trust_remote_code else []
        return replace(source, path=str(_download(repo, revision or None, [*SMALL_FILES, *code])))


def _download(repo: str, revision: str | None, patterns: list[str]) -> Path:
    """The directory in the cache with the files that match; without a network, with those that it has."""
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))
    except LocalEntryNotFoundError as error:
        directory = Path(hf_hub_download(repo, "config.json", revision=revision)).parent
        warn(f"of {repo} only the files in the cache are used: {error}")
        return directory


def _check_directory(path: Path) -> None:
    if not (path / "config.json").is_file():
        ggufs = sorted(p.name for p in path.glob("*.gguf"))
        hint = f"name the GGUF file itself ({ggufs[0]})" if ggufs else "it is not a Hugging Face model directory"
        raise ModelError(f"{path} has no config.json: {hint}")
    weights = [file.name for file in path.glob("*.safetensors")]
    if not weights:
        raise ModelError(f"{path} has no .safetensors weights: {NO_PICKLES}")
    if all(name.endswith(COMPRESSED) for name in weights):
        raise ModelError(f"{path} is compressed: restore it with optima restore {path}")


def weight_files(directory: Path) -> list[Path]:
    """Its safetensors files that are the model's: there may be others, of other programs."""
    if (directory / WEIGHTS).is_file():
        return [directory / WEIGHTS]
    if (index := directory / INDEX).is_file():
        return [directory / name for name in shards(index)]
    return sorted(directory.glob("*.safetensors"))


def fetch_weights(source: Source) -> list[Path]:
    """The safetensors files that transformers would read, downloaded if they are on the hub.

    Raises:
        OSError: if there are none, or one that the index names is missing.
    """
    directory = Path(source.path)
    if source.repo:
        names = shards(directory / INDEX) if (directory / INDEX).is_file() else [WEIGHTS]
        _download(source.repo, source.commit, names)
    files = weight_files(directory)
    if not files:
        raise OSError(f"it has no safetensors weights: {NO_PICKLES}")
    if missing := [file.name for file in files if not file.is_file()]:
        raise OSError(f"{missing[0]} is missing")
    return files


def load_config(source: Source) -> PretrainedConfig:
    """The model's configuration, without its weights.

    Raises:
        ModelError: if it cannot be found or read, or the checkpoint is quantized.
    """
    if source.gguf_file:  # to read the vocabulary in its header takes seconds
        return copy.deepcopy(_gguf_config(source, source.place.stat().st_mtime_ns))
    config = _read_config(source)
    parts = [config, *(getattr(config, name) for name in config.sub_configs if hasattr(config, name))]
    if any(getattr(part, "quantization_config", None) for part in parts):
        raise ModelError(
            f"{source.name} is quantized: prune the unquantized checkpoint, then quantize the result; lm-eval "
            "measures quantized models"
        )
    return config


def _read_config(source: Source) -> PretrainedConfig:
    with explain_read_errors(source, "model"):
        config: PretrainedConfig = AutoConfig.from_pretrained(source.path, **source.arguments)
    return config


@lru_cache(1)
def _gguf_config(source: Source, changed: int) -> PretrainedConfig:
    return _read_config(source)


def weights_of(source: Source) -> dict[str, Any]:
    """What identifies the weights of a source: the commit of a hub model, or ``stamps`` of its files."""
    if source.repo:
        return {"commit": source.commit}
    with explain_read_errors(source, "weights"):
        return stamps([source.place] if source.gguf_file else weight_files(source.place))


def auto_class(auto_map: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """The Auto class with which a checkpoint's own code registers the class it was saved from.

    Args:
        auto_map: of the configuration.
        names: of the checkpoint's class, as ``architectures`` has them.
    """
    found = (auto for auto, code in auto_map.items() if str(code).rpartition(".")[2] in names[:1])
    return next((auto for auto in found if hasattr(transformers, auto)), None)


def model_class(config: PretrainedConfig, source: Source) -> Any:
    """The class that the checkpoint was saved from, so that its heads are kept; an Auto class where none is known."""
    names, auto_map = [str(name) for name in config.architectures or []], getattr(config, "auto_map", None) or {}
    known = auto_class(auto_map, names) if source.trust_remote_code else None
    if known is None and names and hasattr(transformers, names[0]) and not source.gguf_file:
        known = names[0]
    if known is None:
        language = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or "AutoModelForCausalLM" in auto_map
        known = "AutoModelForCausalLM" if language else "AutoModel"
    return getattr(transformers, known)


def skeleton(source: Source) -> PreTrainedModel:
    """The model's modules on the meta device, in evaluation mode: shapes and names, no weights.

    Raises:
        ModelError: if the configuration cannot be read or built.
    """
    config = load_config(source)
    cls = model_class(config, source)
    with explain_read_errors(source, "configuration"), torch.device("meta"):
        if hasattr(cls, "from_config"):  # an Auto class
            model = cls.from_config(config, trust_remote_code=source.trust_remote_code)
        else:
            model = cls(config)
    assert isinstance(model, PreTrainedModel)
    model.tie_weights()
    model.eval()
    return model


def dtype_as_read(config: PretrainedConfig, dtype: str) -> torch.dtype:
    """What weights are read in, and written in: ``dtype``, or of ``auto`` the configuration's, which may have none."""
    own = config.dtype or config.get_text_config().dtype  # of models that see, the language part's may be the only one
    found = own if dtype == "auto" else dtype
    found = getattr(torch, found) if isinstance(found, str) else found or torch.float32
    assert isinstance(found, torch.dtype)
    return found


def load_model(source: Source, dtype: str = "auto", device: torch.device | None = None) -> PreTrainedModel:
    """Load the weights in evaluation mode; dtype ``auto`` keeps the checkpoint's own.

    Args:
        source: where they are.
        dtype: of the weights.
        device: where they go, without a stay in main memory; None: into that.

    Raises:
        ModelError: if the weights cannot be found or read.
    """
    return load_whole(source, dtype, device)[0]


def load_whole(
    source: Source, dtype: str, device: torch.device | None = None
) -> tuple[PreTrainedModel, list[str], list[str]]:
    """As ``load_model``; returns the model, missing optional weights, and weights without a place in the model."""
    config = load_config(source)
    arguments: dict[str, Any] = {"use_safetensors": True, "config": config, **LOADING, **source.arguments}
    if source.gguf_file and hasattr(transformers, "GgufConfig"):  # newer releases keep weights packed by default
        arguments["quantization_config"] = transformers.GgufConfig(dequantize=True)
    if device is not None and device.type != "cpu":
        arguments["device_map"] = {"": device}
    with explain_read_errors(source, "weights"):
        if not source.gguf_file:
            fetch_weights(source)
        model, loading = model_class(config, source).from_pretrained(source.path, dtype=dtype, **arguments)
    assert isinstance(model, PreTrainedModel)
    check_complete(source, model, loading)
    return model.eval(), sorted(loading["missing_keys"]), sorted(loading["unexpected_keys"])


def check_complete(source: Source, model: PreTrainedModel, loading: Mapping[str, Any]) -> None:
    """Raise ``ModelError`` if weights were missing, or had other shapes: the library fills in random numbers.

    ``loading``: what the library says of how it read ``model``.
    """
    for name, found, wanted in sorted(loading["mismatched_keys"]):
        raise ModelError(
            f"{name} of {source.name} is of shape {tuple(found)}, and by config.json of {tuple(wanted)}: take the "
            "configuration that was published with these weights"
        )
    missing = [name for name in loading["missing_keys"] if not any(part in name for part in OPTIONAL_PARTS)]
    if missing:
        raise ModelError(
            f"the checkpoint {source.name} lacks weights of {type(model).__name__} ({some(missing)}): download it "
            "again, or correct architectures in config.json"
        )
    if unexpected := list(loading["unexpected_keys"]):
        warn(f"{source.name} has weights that {type(model).__name__} has no place for ({some(unexpected)})")


def some(names: Iterable[str]) -> str:
    """The first of ``names``, and how many more."""
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def load_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """The model's tokenizer. Raises ``ModelError`` if it is missing or unreadable."""
    arguments = source.arguments
    if source.gguf_file and (kind := load_config(source).model_type) in TOKENIZER_MAPPING_NAMES:
        arguments["tokenizer_type"] = kind  # else transformers reads the file once more
    with explain_read_errors(source, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(source.path, **arguments)
    if not isinstance(tokenizer, PreTrainedTokenizerBase) or not len(tokenizer):
        raise ModelError(f"{source.name} has no tokenizer: copy its tokenizer files to its directory")
    return tokenizer


@contextmanager
def explain_read_errors(source: Source, what: str) -> Iterator[None]:
    """Turn a failure to read ``what`` into a ``ModelError`` that names the source."""
    try:
        yield
    except UNREADABLE as error:
        where = "" if source.path else f", and there is no directory {source.name}"
        raise ModelError(
            f"the {what} of {source.name} cannot be read{where}: {error or type(error).__name__}"
        ) from error


@contextmanager
def no_bars() -> Iterator[None]:
    """Without transformers' bars for what it reads and writes."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
