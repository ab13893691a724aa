"""Code that comes with a checkpoint: which class of transformers it registers (``auto_map``), and its files."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers.dynamic_module_utils import get_relative_imports

_logger = logging.getLogger("optima")

CONFIGURATIONS = "*config.json"
MAP = "auto_map"


def code_files(directory: Path) -> list[Path]:
    """What the configurations of a model name, and what it imports from the same directory."""
    named = {code for _, content in _configurations(directory) for each in content[MAP].values() for code in _of(each)}
    names = [code.partition(".")[0] for code in sorted(named) if "--" not in code]
    return imported_files(*(directory / f"{name}.py" for name in names))


def imported_files(*files: Path) -> list[Path]:
    """Some files of code, and those of the same directory that they import."""
    found, waiting = list[Path](), list(files)
    while waiting:
        file = waiting.pop(0)
        if file not in found and file.is_file():  # what is not there may be wanted nowhere
            found.append(file)
            waiting += (file.parent / f"{name}.py" for name in get_relative_imports(file))
    return found


def names_code(configuration: Path) -> bool:
    """Whether a configuration does."""
    return _content(configuration) is not None


def forget_missing_code(directory: Path) -> None:
    """Take out of configurations what names code that is not in ``directory``, since nobody trusted it.

    With it transformers would not load the model where remote code is allowed. Code on the hub stays named.
    """
    for file, content in _configurations(directory):
        kept = {auto: code for auto, code in content[MAP].items() if _are_there(_of(code), directory)}
        if kept == content[MAP]:
            continue
        _logger.warning("the %s of the output names no code: that of the model was not trusted", file.name)
        content[MAP] = kept
        if not kept:
            del content[MAP]
        file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _configurations(directory: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Those that name code."""
    for file in sorted(directory.glob(CONFIGURATIONS)):
        if (content := _content(file)) is not None:
            yield file, content


def _content(configuration: Path) -> dict[str, Any] | None:
    """None if it names no code."""
    content: Any = None
    with suppress(ValueError):  # copied as it is
        content = json.loads(configuration.read_text(encoding="utf-8"))
    return content if isinstance(content, dict) and isinstance(content.get(MAP), dict) else None


def _of(code: object) -> list[str]:
    """``module.Class``, or each of a slow and a fast tokenizer."""
    return [name for name in (code if isinstance(code, list) else [code]) if isinstance(name, str)]


def _are_there(names: Iterable[str], directory: Path) -> bool:
    """In ``directory``, or on the hub."""
    return all("--" in name or (directory / f"{name.partition('.')[0]}.py").is_file() for name in names)
