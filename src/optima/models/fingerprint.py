"""Which weights these are: a commit of the hub, a hash of the files, or one of tensors.

For the first two the model must be on this disk, as it is after a load.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from torch import Tensor

from optima.files import digest
from optima.models.load import Source, weight_files


def commit_of(source: Source) -> str | None:
    """The commit of a hub snapshot, read from the hub's cache; None for other directories. Call it after a load."""
    directory = _directory(source)
    return directory.name if directory.parent.name == "snapshots" else None


def fingerprint(source: Source) -> str:
    """A hash of the source's weights, to tell whether two runs read the same ones. Call it after a load.

    See ``fingerprint_files``: of its safetensors files, or the GGUF file.
    """
    directory = _directory(source)
    if source.gguf_file:
        return fingerprint_files([directory / source.gguf_file])
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    if config.get("transformers_weights"):
        return fingerprint_files(sorted(directory.glob("*.safetensors")))
    return fingerprint_files(weight_files(directory))


def fingerprint_files(files: Iterable[Path]) -> str:
    """SHA-256 over the name of each file and that of its content: half a second a gigabyte, several at a time."""
    files = list(files)
    with ThreadPoolExecutor() as pool:  # hashing lets other threads work
        lines = [f"{file.name} {content}\n" for file, content in zip(files, pool.map(digest, files), strict=True)]
    return f"sha256-of-files:{hashlib.sha256(''.join(lines).encode()).hexdigest()}"


def hash_tensors(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 in hex over the name, dtype, shape and bytes of each tensor."""
    found = hashlib.sha256()
    for name, tensor in tensors:
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(bytes_of(tensor).numpy().data)
    return found.hexdigest()


def bytes_of(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, in main memory, one after another."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def _directory(source: Source) -> Path:
    if source.local:
        return Path(source.path).resolve()
    one = source.gguf_file or "config.json"  # the cache need not have all of the repository
    return Path(snapshot_download(source.path, allow_patterns=one, local_files_only=True, **source.of_hub))
