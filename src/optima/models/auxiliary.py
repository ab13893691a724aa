"""The auxiliary files of a model that transformers, sentence-transformers and the hub know by name.

Nothing else is copied, no other directories, and nothing through a link that leaves the model: what is copied may be
published. Code is copied only if it was trusted.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

import yaml
from huggingface_hub import metadata_load, metadata_save, snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from transformers import PreTrainedTokenizerBase

from optima.files import TEMPLATES, TOKENIZERS, explain_write_errors
from optima.models.load import Source, explain_read_errors, find_file
from optima.models.ordered import ORDERING_NAME
from optima.models.own_code import code_files, names_code

_logger = logging.getLogger("optima")

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"  # of the tokenizers library
TEMPLATE_FILES = ("*.jinja",)
PROCESSORS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
MODULES = "modules.json"  # of sentence encoders: names the directories of their pooling and dense modules
SENTENCES = (MODULES, "sentence_*config.json", "config_sentence_transformers.json")
MODULE_FILES = ("*.json", "*.txt", "*.safetensors")
WITH_WEIGHTS = ("Dense", "LayerNorm", "LSTM", "CNN", "WeightedLayerPooling")
# The licence of many models asks to be passed on with them.
LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
COPIED = (*TOKENIZERS, *PROCESSORS, *SENTENCES, *LICENCES, ORDERING_NAME)
# The hub heeds the case of letters.
ANY_CASE = ["".join(f"[{c}{c.lower()}]" if c.isupper() else c for c in pattern) for pattern in LICENCES]
README = "README.md"  # of the dense model: of its text nothing is passed on
# What of its head is true of the pruned model too; the card is made at the end of a run (reporting/model_card.py).
CARD_KEYS = (
    *("license", "license_name", "license_link", "base_model", "tags", "language"),
    *("pipeline_tag", "library_name"),
)


def copy_auxiliary_files(source: Source, directory: Path) -> None:
    """Copy the auxiliary files of ``source`` into ``directory``, and ``CARD_KEYS`` of its README; a GGUF file has none.

    Raises:
        ModelError: if one cannot be copied.
    """
    if source.gguf_file is not None:
        return
    with explain_read_errors(source, "model"):
        templates = [f"{TEMPLATES}/{pattern}" for pattern in TEMPLATE_FILES]
        code = ["config.json", "*.py"] if source.trust_remote_code else []
        origin = _fetch_known(source, [*COPIED, *ANY_CASE, README, *templates, *code])
        if modules := _modules(origin):
            origin = _fetch(source, [f"{module}/{pattern}" for module in modules for pattern in MODULE_FILES])
            _warn_of_pickles(source, origin, modules)
        trusted = code_files(origin) if source.trust_remote_code else []
    with explain_write_errors(directory):
        _copy(origin, "", COPIED, directory)
        _copy(origin, "", [file.name for file in trusted], directory)
        _copy(origin, TEMPLATES, TEMPLATE_FILES, directory)
        for module in modules:
            _copy(origin, module, MODULE_FILES, directory)
        card = _card(origin / README)
        if source.local is None:  # a later run reads this from a local directory, and cannot know
            card["base_model"] = source.path
        if card:
            metadata_save(directory / README, card)


def copies_tokenizer(source: Source) -> bool:
    """Whether ``copy_auxiliary_files`` copies the whole tokenizer: a file without code, and its configuration."""
    if source.gguf_file is not None:
        return False
    with explain_read_errors(source, "tokenizer"):
        file = find_file(source, TOKENIZER)
        settings = find_file(source, TOKENIZER_CONFIG) if source.trust_remote_code else None
    if settings is not None and names_code(settings):
        return False
    return file is not None and (source.local is None or _inside(file, source.local))


def to_save(
    source: Source | None, given: PreTrainedTokenizerBase | None, read: PreTrainedTokenizerBase | None
) -> PreTrainedTokenizerBase | None:
    """The tokenizer that has to be saved: the caller's, or the one that was read, unless its own files are copied.

    What transformers writes anew is in the words of its own release, which others may not know.
    """
    return None if given is None and source is not None and copies_tokenizer(source) else read


def _fetch(source: Source, patterns: list[str]) -> Path:
    return source.local or Path(snapshot_download(source.path, allow_patterns=patterns, **source.of_hub))


def _fetch_known(source: Source, patterns: list[str]) -> Path:
    """As far as the cache has them, if the hub cannot be reached: of such files few models have all."""
    try:
        return _fetch(source, patterns)
    except LocalEntryNotFoundError as error:
        config = find_file(source, "config.json")
        if config is None:
            raise
        _logger.warning("some auxiliary files of %s are not copied: %s", source.name, error)
        return config.parent


def _copy(origin: Path, below: str, patterns: Iterable[str], directory: Path) -> None:
    """The files of one directory whose names match, whatever the case of the letters."""
    if not (origin / below).is_dir():
        return
    for file in sorted((origin / below).iterdir()):
        named = any(fnmatchcase(file.name.lower(), pattern.lower()) for pattern in patterns)
        if named and file.is_file():
            if not _inside(file, origin):
                _logger.warning("%s is a link that leaves the model's directory and is not copied", file)
                continue
            (directory / below).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, directory / below / file.name)


def _inside(file: Path, origin: Path) -> bool:
    """True if ``file`` is below ``origin`` itself or, in a snapshot of the hub's cache, in the same repository."""
    home = origin.resolve()
    if home.parent.name == "snapshots":
        home = home.parent.parent
    return file.resolve().is_relative_to(home)


def _modules(origin: Path) -> dict[str, str]:
    """The directories that a sentence encoder names, but for the model's own, and what is in each."""
    file = origin / MODULES
    if not file.is_file() or not _inside(file, origin):
        return {}
    try:
        modules = json.loads(file.read_text(encoding="utf-8"))
        kinds = {PurePosixPath(each["path"]): str(each.get("type", "")).rpartition(".")[2] for each in modules}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        _logger.warning("%s names no modules (%s): no directory is copied for it", file, error)
        return {}
    inside = (path for path in kinds if path.parts and not path.is_absolute() and ".." not in path.parts)
    return {str(path): kinds[path] for path in inside}


def _warn_of_pickles(source: Source, origin: Path, modules: dict[str, str]) -> None:
    """Code can hide in pickles, so they are not copied."""
    for module, kind in modules.items():
        if kind in WITH_WEIGHTS and not list((origin / module).glob("*.safetensors")):
            _logger.warning(
                "%s has no safetensors file in %s, whose weights are not copied: sentence-transformers cannot read the "
                "output before it has them",
                source.name,
                module,
            )


def _card(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        found = metadata_load(file) or {}
    except (ValueError, yaml.YAMLError) as error:
        _logger.warning("the head of %s cannot be read (%s): no card data is passed on", file, error)
        return {}
    card = {key: found[key] for key in CARD_KEYS if key in found}
    if "language" in card:  # what YAML 1.1 makes of no, Norwegian
        card["language"] = _texts("no" if each is False else each for each in _listed(card["language"]))
    if "tags" in card:
        card["tags"] = _texts(_listed(card["tags"]))
    if "base_model" in card:
        card["base_model"] = [name for name in _listed(card["base_model"]) if _on_hub(name)]
    return {key: value for key, value in card.items() if value not in (None, [])}


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _texts(values: Iterable[Any]) -> list[str]:
    return [value for value in values if isinstance(value, str)]


def _on_hub(name: Any) -> bool:
    """Whether the hub takes it for a model: trainers write down directories of their machine."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return isinstance(name, str) and not Path(name).exists()
