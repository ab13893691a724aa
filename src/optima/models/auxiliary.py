"""The auxiliary files of a model that transformers, sentence-transformers and the hub know by name.

Nothing else is copied: what is copied may be published. Code is copied only if it was trusted.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import metadata_load, metadata_save
from transformers import PreTrainedTokenizerBase

from optima.files import explain_write_errors
from optima.models.load import AUXILIARY, CODE, README, Source

TOKENIZER = "tokenizer.json"  # of the tokenizers library
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
    origin, code = Path(source.path), [CODE] if source.trust_remote_code else []
    with explain_write_errors(directory):
        for file in sorted({file for pattern in (*AUXILIARY, *code) for file in origin.glob(pattern)}):
            if file.is_file():
                copy = directory / file.relative_to(origin)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, copy)
        found: dict[str, Any] = (metadata_load(origin / README) if (origin / README).is_file() else None) or {}
        card = {key: found[key] for key in CARD_KEYS if found.get(key)}
        if source.repo:  # a later run reads this from a local directory, and cannot know
            card["base_model"] = source.repo
        if card:
            metadata_save(directory / README, card)


def copies_tokenizer(source: Source) -> bool:
    """Whether ``copy_auxiliary_files`` copies the whole tokenizer."""
    return source.gguf_file is None and Path(source.path, TOKENIZER).is_file()


def to_save(
    source: Source | None, callers: PreTrainedTokenizerBase | None, read: PreTrainedTokenizerBase | None
) -> PreTrainedTokenizerBase | None:
    """The tokenizer that has to be saved: the caller's, or the one that was read, unless its own files are copied.

    What transformers writes anew, other releases of it may not be able to read.
    """
    return None if callers is None and source is not None and copies_tokenizer(source) else read


def forget_missing_code(directory: Path) -> None:
    """Remove from configurations the names of code that was not copied: transformers would look for it."""
    for file in directory.glob("*config.json") if not any(directory.glob(CODE)) else ():
        content = json.loads(file.read_text(encoding="utf-8"))
        if content.pop("auto_map", None):
            file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
