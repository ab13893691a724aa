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
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, StrictDataclassError
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, enable_progress_bars
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
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
from optima.files import COMPRESSED, TEMPLATES, TOKENIZERS, shards, stamps, usable_path

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
# The licence of many models asks to be passed on with them; in letters of either case.
LICENCES = [
    "".join(f"[{c}{c.lower()}]" if c.isupper() else c for c in pattern)
    for pattern in ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
]
AUXILIARY = (
    *(*TOKENIZERS, f"{TEMPLATES}/*.jinja", *LICENCES),
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
    # Of sentence encoders; their pooling and dense modules are in directories of their own.
    *("modules.json", "sentence_*config.json", "config_sentence_transformers.json"),
    *("[0-9]_*/*.json", "[0-9]_*/*.txt", "[0-9]_*/*.safetensors"),
)
CODE, README = "*.py", "README.md"
SMALL_FILES = ["*.json", "*.txt", *AUXILIARY, README]  # of a hub model, before its weights
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

    Of a hub model all but the weights is downloaded; of GGUF files, all.

    Raises:
        ModelError: if there is none, or it has no safetensors or GGUF weights.
    """
    path = usable_path(name, "the model", "give a hub id, a local model directory or a GGUF file")
    if name.endswith(".gguf") and find_spec("gguf") is None:
        raise ModelError(f"{name} is read with the package gguf, which is not installed: pip install gguf")
    if path.is_dir():
        _check_directory(path)
        return Source(name, str(path), None, trust_remote_code)
    if path.is_file() and name.endswith(".gguf"):
        return Source(name, str(path.parent), path.name, trust_remote_code)
    if path.is_file():
        raise ModelError(f"{name} is a file: give the directory that it is in, {path.parent}, or a GGUF file")
    repo, _, revision = name.partition("@")
    if Path(repo).expanduser().exists():
        raise ModelError(f"{repo} is a local model and has no revision {revision!r}: leave out @{revision}")
    return _on_hub(Source(name, "", None, trust_remote_code, repo), revision or None)


def _on_hub(source: Source, revision: str | None) -> Source:
    name, repo = source.name, source.repo or ""
    parts, is_file = repo.split("/"), repo.endswith(".gguf")
    if parts[0] in ("~", "", ".", "..") or (len(parts) < 3 if is_file else len(parts) > 2):
        what = "owner/repository/file.gguf on the hub, or a local file" if is_file else "a hub id, or a local directory"
        raise ModelError(f"there is no {'file' if is_file else 'directory'} {name}: give {what}")
    with explain_read_errors(source, "model"):
        if is_file:
            repo = "/".join(parts[:2])
            file = Path(hf_hub_download(repo, "/".join(parts[2:]), revision=revision))
            return replace(source, path=str(file.parent), gguf_file=file.name, repo=repo)
        code = [CODE] if source.trust_remote_code else []
        source = replace(source, path=str(_download(repo, revision, [*SMALL_FILES, *code])))
        known = (INDEX, WEIGHTS)
        if not any((source.place / each).is_file() or has_file(repo, each, source.commit) for each in known):
            raise ModelError(
                f"{name} has neither {WEIGHTS} nor {INDEX}, and pickle files can run any code when opened: convert "
                "them to safetensors first (load with torch and save with model.save_pretrained), or check the network"
            )
    return source


def _download(repo: str, revision: str | None, patterns: list[str]) -> Path:
    """The directory in the cache with the files that match; without a network, with those that it has."""
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))
    except LocalEntryNotFoundError as error:
        directory = Path(hf_hub_download(repo, "config.json", revision=revision)).parent
        _logger.warning("of %s only the files in the cache are used: %s", repo, error)
        return directory


def _check_directory(path: Path) -> None:
    usable_path(path / "config.json", "the model's", "see the permissions of its directory")
    if not (path / "config.json").is_file():
        ggufs = sorted(p.name for p in path.glob("*.gguf"))
        hint = f"name the GGUF file itself ({ggufs[0]})" if ggufs else "it is not a Hugging Face model directory"
        raise ModelError(f"{path} has no config.json: {hint}")
    weights = [file.name for file in path.glob("*.safetensors")]
    if weights and all(name.endswith(COMPRESSED) for name in weights):
        raise ModelError(f"{path} is compressed: restore it with optima restore {path}")
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
    if missing := [file.name for file in files if not file.is_file()]:
        raise OSError(f"{missing[0]} is missing")
    return files


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


def weights_of(source: Source) -> dict[str, Any]:
    """What identifies the weights of a source: the commit of a hub model, or sizes and times of its files."""
    if source.repo:
        return {"commit": source.commit}
    with explain_read_errors(source, "weights"):
        return stamps([source.place] if source.gguf_file else weight_files(source.place))


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
    found: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if getattr(found, "__name__", "").lower() == names[0].lower():  # published as PhiMoEForCausalLM
        return found
    raise ModelError(
        f"{source.name} is a {names[0]}, which transformers {transformers.__version__} does not have: install a newer "
        "release, or correct architectures in config.json"
    )


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
        if not source.gguf_file:
            fetch_weights(source)
        model, loading = cls.from_pretrained(source.path, dtype=dtype, **LOADING, **source.arguments, **arguments)
    assert isinstance(model, PreTrainedModel)
    check_complete(source, model, loading)
    return model.eval(), frozenset(loading["missing_keys"])


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
        remedy = "check that its files are complete and go together" if source.path else HUB_REMEDY
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
