"""Write a checkpoint: prepared beside its destination and renamed at the end, so that it is never half there."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from optima.errors import ModelError
from optima.models.source import Source

MAX_SHARD_SIZE = "5GB"
WEIGHT_SUFFIXES = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".index.json", ".ot", ".xml",
)  # fmt: skip
# Small companions of a checkpoint: tokenizer assets, pooling of sentence encoders, custom code, chat templates.
COMPANIONS = ["*.json", "*.txt", "*.model", "*.py", "*.jinja", "*.tiktoken"]


@contextmanager
def output_directory(path: Path, overwrite: bool, num_bytes: int) -> Iterator[Path]:
    """A temporary sibling of ``path`` that takes its place when the context ends without an error.

    Args:
        path: the final directory, or a link to it; it and its parents need not exist.
        overwrite: replace it if it exists.
        num_bytes: space that will be needed, checked now.

    Raises:
        ModelError: if ``path`` exists or cannot be replaced, or its disk is read-only or too full. Nothing is written
            then.
    """
    path = path.expanduser().resolve()
    new_parents = [parent for parent in path.parents if not parent.exists()]
    partial = None
    try:
        try:
            _check_replaceable(path, overwrite)
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.partial-"))
            free = shutil.disk_usage(path.parent).free
        except OSError as error:
            raise ModelError(f"cannot write beside {path} ({error.strerror}): choose another --output-dir") from error
        if free < num_bytes:
            raise ModelError(
                f"{path.parent} has {free / 2**30:.1f} GiB free and the checkpoint needs {num_bytes / 2**30:.1f} GiB: "
                "free some space or choose another --output-dir"
            )
        yield partial
        with explain_write_errors(path):
            _take_place(partial, path)
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
        if not path.exists():
            for parent in new_parents:
                with suppress(OSError):
                    parent.rmdir()


def _check_replaceable(path: Path, overwrite: bool) -> None:
    """Raise ``ModelError`` if ``path`` is in use, or is a directory that cannot be renamed."""
    if path.is_mount() or Path.cwd().is_relative_to(path):
        what = "a mount point" if path.is_mount() else "or holds the current directory"
        raise ModelError(f"{path} is {what}, which cannot be replaced: choose a directory below it")
    occupied = path.exists() and (not path.is_dir() or any(path.iterdir()))
    if occupied and not overwrite:
        raise ModelError(f"{path} exists: choose another --output-dir, or replace it with --overwrite")


@contextmanager
def explain_write_errors(path: Path) -> Iterator[None]:
    """Turn a failure to write into an error that names the destination."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"writing {path} failed ({error}): nothing was left behind; free some space or choose another --output-dir"
        ) from error


def _take_place(partial: Path, path: Path) -> None:
    umask = os.umask(0)
    os.umask(umask)
    partial.chmod(0o777 & ~umask)
    if not path.exists():
        partial.rename(path)
        return
    retired = path.with_name(f"{partial.name}-replaced")
    path.rename(retired)
    try:
        partial.rename(path)
    except BaseException:
        retired.rename(path)
        raise
    if retired.is_dir():
        shutil.rmtree(retired)
    else:
        retired.unlink()


def write_checkpoint(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, source: Source | None, directory: Path
) -> None:
    """Write an ordinary Hugging Face directory.

    Args:
        model: the pruned model.
        tokenizer: saved beside it.
        source: where the model came from; its companion files (not its weights or model card) are copied.
        directory: where to.
    """
    if source is not None and source.gguf_file is None:
        origin = Path(source.path)
        if not origin.is_dir():
            origin = Path(snapshot_download(source.path, allow_patterns=COMPANIONS))
        _copy_companions(origin, directory)
    model.save_pretrained(directory, max_shard_size=MAX_SHARD_SIZE)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)


def _copy_companions(origin: Path, directory: Path) -> None:
    for file in sorted(origin.rglob("*")):
        relative = file.relative_to(origin)
        hidden = any(part.startswith(".") for part in relative.parts)
        wanted = any(file.match(pattern) for pattern in COMPANIONS) and not file.name.endswith(WEIGHT_SUFFIXES)
        if file.is_file() and wanted and not hidden:
            (directory / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, directory / relative)
