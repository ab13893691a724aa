"""Files: their names and hashes, headers and indices; swapped at one instant, made to outlast a loss of power."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from optima.errors import ModelError

CANNOT_SYNC = (errno.EINVAL, errno.EOPNOTSUPP, errno.EBADF)  # of a directory, as some mounts answer
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
ACTIVATIONS = ".activations-"  # how files begin in which activations wait
PLAIN, INDEX_ENDING = ".safetensors", ".index.json"  # how files of weights end, and behind that those which name them
COMPRESSED = ".compressed.safetensors"  # how the files end that optima compress writes
BITMASK = ".bitmask"  # how the name of a tensor ends that it compressed
TOKENIZERS = (
    *("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt"),
    *("*_vocab.json", "*.spm", "bpe.codes", "*.model", "*.tiktoken", "tekken.json", "normalizer.json"),
    *("chat_template*", "*.jinja"),
)
TEMPLATES = "additional_chat_templates"  # of a tokenizer, in a directory of their own


def usable_path(path: str | Path, what: str, remedy: str) -> Path:
    """``path``, which need not exist, without ``~``. Raises ``ModelError`` if it is no path or cannot be looked at."""
    try:
        expanded = Path(path).expanduser()
        expanded.resolve().exists()
    except (OSError, RuntimeError, TypeError, ValueError) as error:  # also NUL bytes and unknown homes
        raise ModelError(f"{what} {str(path)[:100]!a} cannot be used ({error}): {remedy}") from None
    return expanded


@contextmanager
def explain_write_errors(path: Path, remedy: str = "free some space or choose another --output-dir") -> Iterator[None]:
    """Turn a failure to write into an error that names the destination, and the ``remedy`` for a full disk."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        full = isinstance(error, SafetensorError) or error.errno in DISK_FULL
        raise ModelError(f"writing {path} failed ({error})" + (f": {remedy}" if full else "")) from error


def sync(*paths: Path) -> None:
    """Make files and directories outlast a loss of power; directories where the file system can."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        except OSError as error:
            if error.errno not in CANNOT_SYNC or not path.is_dir():
                raise
        finally:
            os.close(handle)


def write_whole(file: Path, content: bytes) -> None:
    """Write a file under another name and give it its own at one instant, so that no half of it is ever seen."""
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content)
        sync(partial)
        partial.replace(file)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync(file.parent)


def digest(file: Path) -> str | None:
    """SHA-256 of a file's content, in hex; None if it is empty, or no file."""
    if not file.is_file() or not file.stat().st_size:
        return None
    with file.open("rb", buffering=0) as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def stamps(files: Iterable[Path]) -> dict[str, list[Any]]:
    """The identity of each file, by name: size, time of the last change, a hash of its first MiB and some blocks."""
    found: dict[str, list[Any]] = {}
    for file in sorted(files):
        stat = file.stat()
        with file.open("rb") as opened:
            hashed = hashlib.sha256(opened.read(2**20))  # with the header
            for i in range(1, 17):
                opened.seek(max(0, stat.st_size - 2**16) * i // 16)
                hashed.update(opened.read(2**16))
        found[file.name] = [stat.st_size, stat.st_mtime_ns, hashed.hexdigest()]
    return found


def delete(paths: Iterable[Path]) -> None:
    """Remove files and directories; a link, not what it points at."""
    for path in list(paths):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def read_header(file: Path) -> dict[str, Any]:
    """The header of a safetensors file."""
    with file.open("rb") as opened:
        header: dict[str, Any] = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
    return header


def check_shards(directory: Path) -> None:
    """Raise ``ModelError`` if ``directory`` is none, or an index of it names a file or a tensor that is not there."""
    if not directory.is_dir():
        raise ModelError(f"there is no directory {directory}")
    for index in sorted(directory.glob(f"*{PLAIN}{INDEX_ENDING}")):
        file = index
        try:
            names, weight_map = shards(index), json.loads(index.read_bytes())["weight_map"]
            for file in (directory / name for name in names):
                if not file.is_file():
                    raise ValueError(f"{index.name} names it")
                with safe_open(file, "np") as opened:
                    there = set(opened.keys())
                for name, shard in weight_map.items():
                    if shard == file.name and there.isdisjoint((name, name + BITMASK)):
                        raise ValueError(f"{index.name} names its tensor {name}")
        except (OSError, ValueError, SafetensorError) as error:
            raise ModelError(f"{file} is missing or damaged ({error}): fetch it again") from error


def shards(index: Path) -> list[str]:
    """The files that an index names, sorted. Raises ``ValueError`` if it is none, or names one elsewhere."""
    content = json.loads(index.read_text(encoding="utf-8"))
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{index.name} has no weight_map")
    names = sorted(set(weight_map.values()))
    if outside := [name for name in names if Path(name).name != name]:
        raise ValueError(f"{index.name} names {outside[0]}, which is not in the directory of the index")
    return names
