"""Read a pretrained model: a hub id, a local directory, or a GGUF file."""

from __future__ import annotations

import logging
import struct
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, StrictDataclassError
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, enable_progress_bars
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
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import has_file

from optima.errors import ModelError
from optima.files import PACKED, shards, stamps, usable_path
from optima.models.ordered import ORDERING_NAME, read_orders

_logger = logging.getLogger("optima")

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# What the client of the hub raises when it is refused, offline or cut off.
HUB_FAILURES: tuple[type[Exception], ...] = (OSError, *HfHubHTTPError.__bases__)
# Files that are missing, damaged, cut off or contradict each other. struct: of a GGUF file.
UNREADABLE: tuple[type[Exception], ...] = (
    *HUB_FAILURES,
    ValueError,
    SafetensorError,
    StrictDataclassError,
    struct.error,
)
LANGUAGE_MODEL, LANGUAGE_MODELS = "AutoModelForCausalLM", ("ForCausalLM", "LMHeadModel")
# Weights that published checkpoints may lack: sentence encoders are often saved without the pooler of their class.
OPTIONAL_PARTS = ("pooler",)
HUB_REMEDY = (
    "no directory here has that name; for a model of the hub check the spelling, the network and, if it is private or "
    "gated, your login (hf auth login)"
)
# What the library leaves out, or makes up, is logged and not raised: it names no weight otherwise.
LOADING = {"output_loading_info": True, "ignore_mismatched_sizes": True}


@dataclass(frozen=True)
class Source:
    """Where a model comes from, in the words of ``from_pretrained``.

    Attributes:
        name: what the user typed.
        path: hub id or directory.
        gguf_file: the GGUF file inside it, if it is one.
        trust_remote_code: run the checkpoint's own modelling code.
        revision: branch, tag or commit of a hub model; None for its main branch.
    """

    name: str
    path: str
    gguf_file: str | None = None
    trust_remote_code: bool = False
    revision: str | None = None

    @property
    def local(self) -> Path | None:
        """Its directory or GGUF file on this disk; None if it lives on the hub."""
        return Path(self.path, self.gguf_file or "") if Path(self.path).is_dir() else None

    @property
    def of_hub(self) -> dict[str, Any]:
        """Keyword arguments that every call to the hub shares."""
        return {"revision": self.revision} if self.revision else {}

    @property
    def arguments(self) -> dict[str, Any]:
        """Keyword arguments that every ``from_pretrained`` call shares."""
        of_gguf = {"gguf_file": self.gguf_file} if self.gguf_file else {}
        return {"trust_remote_code": self.trust_remote_code, **self.of_hub, **of_gguf}


def find_source(name: str, trust_remote_code: bool = False) -> Source:
    """The model that the user named: a local directory, a GGUF file, or a hub id, as ``NAME`` or ``NAME@REVISION``.

    Raises:
        ModelError: if a local path does not hold a safetensors or GGUF checkpoint.
    """
    path = usable_path(name, "the model", "give a hub id, a local model directory or a GGUF file")
    revision = None
    if "@" in name and not path.exists():
        name, _, revision = name.partition("@")
        path = Path(name).expanduser()
    place: dict[str, str] = {"path": name}
    parts = name.split("/")
    if path.is_dir():
        _check_directory(path)
        place = {"path": str(path)}
    elif path.is_file() and name.endswith(".gguf"):
        place = {"path": str(path.parent), "gguf_file": path.name}
    elif path.is_file():
        raise ModelError(f"{name} is a file: give the directory that it is in, {path.parent}, or a GGUF file")
    elif name.endswith(".gguf") and len(parts) > 2 and not path.is_absolute() and parts[0] not in (".", "..", "~"):
        place = {"path": "/".join(parts[:2]), "gguf_file": "/".join(parts[2:])}
    elif name.endswith(".gguf"):
        raise ModelError(f"there is no file {name}: give a local GGUF file, or owner/repository/file.gguf on the hub")
    elif path.is_absolute() or name.startswith((".", "~")) or len(parts) > 2:
        raise ModelError(f"there is no directory {name}: give a hub id, a local model directory or a GGUF file")
    source = Source(name, trust_remote_code=trust_remote_code, revision=revision or None, **place)
    if source.revision is not None and source.local:
        raise ModelError(f"{name} is a local model and has no revision {revision!r}: leave out @{revision}")
    if source.gguf_file and find_spec("gguf") is None:
        raise ModelError(f"{name} is read with the package gguf, which is not installed: pip install gguf")
    return source


def _check_directory(path: Path) -> None:
    usable_path(path / "config.json", "the model's", "see the permissions of its directory")
    if not (path / "config.json").is_file():
        ggufs = sorted(p.name for p in path.glob("*.gguf"))
        hint = f"name the GGUF file itself ({ggufs[0]})" if ggufs else "it is not a Hugging Face model directory"
        raise ModelError(f"{path} has no config.json: {hint}")
    weights = [file.name for file in path.glob("*.safetensors")]
    if weights and all(name.endswith(PACKED) for name in weights):
        raise ModelError(f"{path} is packed: unpack it with optima unpack {path}")
    if not weights:
        raise ModelError(
            f"{path} has no .safetensors weights: convert pickle files, which can run any code when opened, first "
            "(load with torch and save with model.save_pretrained)"
        )
    try:
        weight_files(path)
    except (OSError, ValueError) as error:
        raise ModelError(f"the weights of {path} cannot be read ({error}): copy its index anew") from error


def weight_files(directory: Path) -> list[Path]:
    """Its safetensors files that are the model's: there may be others, of other programs."""
    if (directory / WEIGHTS).is_file():
        return [directory / WEIGHTS]
    if (index := directory / INDEX).is_file():
        return [directory / name for name in shards(index)]
    return sorted(directory.glob("*.safetensors"))


def find_file(source: Source, name: str) -> Path | None:
    """A file of the model, downloaded if it is on the hub; None if there is none of that name."""
    if source.local:
        return path if (path := source.local / name).is_file() else None
    try:
        return Path(hf_hub_download(source.path, name, **source.of_hub))
    except EntryNotFoundError:
        return None


def fetch_weights(source: Source) -> list[Path]:
    """The safetensors files that transformers would read, downloaded if they are on the hub.

    Raises:
        OSError: if there are none, or one that the index names is missing.
    """
    if source.local:
        return weight_files(source.local)
    if file := find_file(source, WEIGHTS):
        return [file]
    index = find_file(source, INDEX)
    if index is None:
        raise OSError(f"there is neither {WEIGHTS} nor {INDEX}")
    found = {name: find_file(source, name) for name in shards(index)}
    if missing := [name for name, path in found.items() if path is None]:
        raise OSError(f"{missing[0]} is missing")
    return [path for path in found.values() if path is not None]


def orders_of(source: Source) -> Any:
    """As ``read_orders``, of a local model or one on the hub."""
    with explain_read_errors(source, "model"):
        file = find_file(source, ORDERING_NAME)
    return read_orders(None if file is None else file.parent)


def load_config(source: Source) -> PretrainedConfig:
    """The model's configuration, without its weights.

    Raises:
        ModelError: if it cannot be found or read, or the checkpoint is quantized.
    """
    with explain_read_errors(source, "model"):
        config = AutoConfig.from_pretrained(source.path, **source.arguments)
    assert isinstance(config, PretrainedConfig)
    parts = [config, *(getattr(config, name) for name in config.sub_configs if hasattr(config, name))]
    if any(getattr(part, "quantization_config", None) for part in parts) and not source.gguf_file:
        raise ModelError(
            f"{source.name} is quantized: prune the unquantized checkpoint, then quantize the result; lm-eval "
            "measures quantized models"
        )
    return config


def pinned(source: Source) -> Source:
    """The same model at the commit of its configuration in the cache: a branch may move while the rest is fetched."""
    file = None if source.local else find_file(source, source.gguf_file or "config.json")
    return source if file is None else replace(source, revision=_commit(file.parent) or source.revision)


def _commit(directory: Path) -> str | None:
    """The commit of a directory in the hub's cache."""
    for folder in (directory, *directory.parents):
        if folder.parent.name == "snapshots":
            return folder.name
    return None


def commit_of(source: Source) -> str | None:
    """The commit of a pinned model of the hub, or of a directory in the hub's cache; None for other directories."""
    if source.local is None:
        return source.revision
    return _commit(Path(source.path).resolve())


def weights_of(source: Source) -> dict[str, Any]:
    """What identifies the weights of a pinned source: the commit, or sizes and times of its files."""
    if source.local is None:
        return {"commit": source.revision}
    with explain_read_errors(source, "weights"):
        return stamps([source.local] if source.gguf_file else weight_files(source.local))


def auto_class(auto_map: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """The Auto class with which code registered the model that the checkpoint was saved from.

    Args:
        auto_map: of the configuration.
        names: of the checkpoint's class, as ``architectures`` has them.
    """
    codes = {auto: code for auto, code in auto_map.items() if isinstance(code, str) and hasattr(transformers, auto)}
    known = {auto: code.rpartition(".")[2] for auto, code in codes.items()}
    for auto, name in known.items():
        if name in names[:1]:
            return auto
    # The library's own head for another task is not that of the code.
    other = any(hasattr(transformers, name) and not name.endswith(LANGUAGE_MODELS) for name in names[:1])
    return LANGUAGE_MODEL if LANGUAGE_MODEL in known and not other else None


def model_class(config: PretrainedConfig, source: Source) -> Any:
    """The class that the checkpoint was saved from, so that its heads are kept; an Auto class where none is named.

    Raises:
        ModelError: if the class is named, but neither the library nor the code that comes with the model has it.
    """
    if source.gguf_file:
        return AutoModelForCausalLM
    names = [str(name) for name in config.architectures or []]
    own = config.__class__.__module__.startswith("transformers_modules")
    registered = auto_class(getattr(config, "auto_map", None) or {}, names) if own or source.trust_remote_code else None
    if registered is not None:
        return getattr(transformers, registered)
    if own and names:
        raise ModelError(
            f"{source.name} is a {names[0]}, which auto_map in its config.json does not name: add it there, or correct "
            "architectures"
        )
    if own or not names:
        return AutoModel
    if hasattr(transformers, names[0]):
        return getattr(transformers, names[0])
    if names[0].endswith(LANGUAGE_MODELS):  # published under another spelling (PhiMoEForCausalLM)
        return AutoModelForCausalLM
    raise ModelError(
        f"{source.name} is a {names[0]}, which transformers {transformers.__version__} does not have: install a newer "
        "release, or correct architectures in config.json"
    )


def skeleton(source: Source) -> PreTrainedModel:
    """The model's modules on the meta device, in evaluation mode: shapes and names, no weights.

    Raises:
        ModelError: if the configuration cannot be read or built, or no weights go with it.
    """
    config = load_config(source)
    with explain_read_errors(source, "weights"):
        check_safetensors(pinned(source))
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
        ModelError: if the weights cannot be found or read, or exist only as pickle files.
    """
    return load_whole(source, dtype, device)[0]


def load_whole(
    source: Source, dtype: str, device: torch.device | None = None
) -> tuple[PreTrainedModel, frozenset[str]]:
    """As ``load_model``; and names of its weights that the checkpoint may lack, and does: they are random numbers."""
    config = load_config(source)
    arguments: dict[str, Any] = {"use_safetensors": True, "config": config}
    if source.gguf_file:  # newer releases keep its weights packed by default
        settings = getattr(transformers, "GgufConfig", None)
        arguments = {} if settings is None else {"quantization_config": settings(dequantize=True)}
    if device is not None and device.type != "cpu":
        arguments["device_map"] = {"": device}
    cls = model_class(config, source)
    with explain_read_errors(source, "weights"):
        check_safetensors(source)
        model, loading = cls.from_pretrained(source.path, dtype=dtype, **LOADING, **source.arguments, **arguments)
    assert isinstance(model, PreTrainedModel)
    check_complete(source, model, loading)
    return model.eval(), frozenset(loading["missing_keys"])


def check_safetensors(source: Source) -> None:
    """Of a hub model: transformers would load what others propose as a conversion of pickle files.

    Raises:
        ModelError: if it has no weights in safetensors format. None are downloaded.
    """
    if source.local or source.gguf_file:
        return
    if not any(has_file(source.path, name, **source.of_hub) for name in (WEIGHTS, INDEX)):
        raise ModelError(
            f"{source.name} has neither {WEIGHTS} nor {INDEX}, and pickle files can run any code when opened: convert "
            "them to safetensors first (load with torch and save with model.save_pretrained), or check the network"
        )


def check_complete(source: Source, model: PreTrainedModel, loading: Mapping[str, Any]) -> None:
    """The library fills missing weights with random numbers, and drops those that it has no place for.

    Args:
        source: where the weights are.
        model: as it was read.
        loading: what the library says of that.

    Raises:
        ModelError: if weights are missing or have other shapes than the configuration says, or the model names no class
            whose weights these could be.
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
        lost = f"{source.name} has weights that {type(model).__name__} has no place for ({some(unexpected)})"
        if not model.config.architectures:
            raise ModelError(f"{lost}: name its architecture in config.json")
        _logger.warning("%s: they are left out", lost)


def some(names: Iterable[str]) -> str:
    """The first of ``names``, and how many more."""
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def load_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """The model's tokenizer.

    Raises:
        ModelError: if it is missing or unreadable.
    """
    with explain_read_errors(source, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(source.path, **source.arguments)
    if not isinstance(tokenizer, PreTrainedTokenizerBase) or not len(tokenizer):
        raise ModelError(f"{source.name} has no tokenizer: copy its tokenizer files to its directory")
    return tokenizer


@contextmanager
def explain_read_errors(source: Source, what: str) -> Iterator[None]:
    """Turn a failure to read ``what`` into a ``ModelError`` that names the source."""
    try:
        yield
    except UNREADABLE as error:
        remedy = "check that its files are complete and go together" if source.local else HUB_REMEDY
        if "trust_remote_code" in str(error):
            remedy = "if you trust the code that comes with it, run it with --trust-remote-code"
        detail = textwrap.shorten(str(error), 300, placeholder=" ...") or type(error).__name__
        raise ModelError(f"the {what} of {source.name} cannot be read ({detail}): {remedy}") from error


@contextmanager
def no_bars() -> Iterator[None]:
    """Without transformers' bars for what it reads and writes, with which it switches off the hub's."""
    shown, downloads = transformers_logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
        if downloads:
            enable_progress_bars()
