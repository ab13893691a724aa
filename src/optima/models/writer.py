"""Write a checkpoint block by block: everything but weights first, one shard a block, the index last.

transformers' own ``save_pretrained`` writes every tensor, so that names and forms on disk are its own (it renames,
splits fused experts, and saves tied weights once).
"""

from __future__ import annotations

import hashlib
import json
import mmap
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from optima.errors import ModelError
from optima.models.companions import copy_companions
from optima.models.destination import read_journal
from optima.models.files import explain_write_errors, read_header, sync
from optima.models.source import Source

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ONE_FILE = 2**62  # bytes in a shard: whatever is given goes into one


def prepare(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, source: Source | None, directory: Path
) -> None:
    """Write all of a checkpoint but its weights: what transformers refuses to save is refused before the long work.

    Args:
        model: its configuration, generation configuration and, if trusted, its own code are saved.
        tokenizer: saved beside them.
        source: its companion files are copied (see ``companions``).
        directory: it exists.

    Raises:
        ModelError: if something cannot be saved, or the disk fails.
    """
    if source is not None:
        copy_companions(source, directory)
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ModelError("the model has adapters, which are not written: merge them into its weights first")
    with explain_write_errors(directory), _no_bars():
        try:
            model.save_pretrained(directory, state_dict={})
            if tokenizer is not None:
                tokenizer.save_pretrained(directory)
        except ValueError as error:
            # How transformers refuses a generation configuration that contradicts itself.
            raise ModelError(
                f"transformers cannot save the configuration or tokenizer of this {type(model).__name__} ({error}): "
                "correct it (model.generation_config, for example) before pruning"
            ) from error
    (directory / WEIGHTS).unlink(missing_ok=True)


class Writer:
    """The weights of a checkpoint, a file a block, each whole and on the disk before its line is in the journal.

    Args:
        model: as it will be when ``publish`` is called.
        blocks: full names of all blocks, in order.
        directory: where the shards go; ``prepare`` has filled it.
        journal: file of one JSON line a committed block, on the same disk but outside ``directory``.

    Attributes:
        done: the record of each committed block, by the block's name; read from the journal, if there is one.
    """

    def __init__(self, model: PreTrainedModel, blocks: Sequence[str], directory: Path, journal: Path) -> None:
        self.model, self.directory, self.journal = model, directory, journal
        groups: dict[str | None, None] = dict.fromkeys([*blocks, None])
        self._files = {
            group: f"model-{number:05d}-of-{len(groups):05d}.safetensors" for number, group in enumerate(groups, 1)
        }
        self.done: dict[str, Any] = {
            line["block"]: line["record"]
            for line in read_journal(journal)
            if line["file"] is None or _digest(directory / line["file"]) == line["sha256"]
        }

    def commit(self, block: str, tensors: Mapping[str, Tensor], record: object) -> None:
        """Write a block so that neither a kill nor a loss of power can take it back.

        Args:
            block: its full name.
            tensors: its state by full names, as ``block.module.state_dict(prefix=f"{block.name}.")`` gives it.
            record: what to remember of it, as JSON.

        Raises:
            ModelError: if the disk fails.
        """
        with explain_write_errors(self.directory):
            file = self._write(self._files[block], tensors) if tensors else None
            line = {"block": block, "file": file and file.name, "sha256": file and _digest(file), "record": record}
            with self.journal.open("a", encoding="utf-8") as journal:
                journal.write(json.dumps(line) + "\n")
            sync(self.journal, self.journal.parent)
        self.done[block] = record

    def publish(self, write_reports: Callable[[Path], object] | None = None) -> None:
        """Write the blocks that were not committed and everything outside blocks, the reports, and last the index.

        Args:
            write_reports: is given the directory, to write what else belongs there.

        Raises:
            ModelError: if the disk fails.
        """
        with explain_write_errors(self.directory):
            state: dict[str | None, dict[str, Tensor]] = defaultdict(dict)
            blocks = [group for group in self._files if group is not None]
            for name, tensor in self.model.state_dict().items():
                state[_owner(name, blocks)][name] = tensor
            for group, file in self._files.items():
                if group not in self.done and state[group]:
                    self._write(file, state[group])
            if write_reports is not None:
                write_reports(self.directory)
            self._write_index()

    def _write(self, name: str, tensors: Mapping[str, Tensor]) -> Path:
        """One shard, in a temporary directory first."""
        with TemporaryDirectory(dir=self.journal.parent) as scratch, _no_bars():
            self.model.save_pretrained(scratch, state_dict=dict(tensors), max_shard_size=ONE_FILE)
            shard = Path(scratch, WEIGHTS)
            # safetensors gives its files to their owner alone.
            shard.chmod(Path(scratch, "config.json").stat().st_mode)
            sync(shard)
            file = shard.rename(self.directory / name)
        sync(self.directory)
        return file

    def _write_index(self) -> None:
        weight_map: dict[str, str] = {}
        size = 0
        for file in sorted(self.directory.glob("model-*.safetensors")):
            header, header_bytes = read_header(file)
            names = header.keys() - {"__metadata__"}
            assert not names & weight_map.keys(), f"{file} repeats tensors of another shard"
            weight_map |= dict.fromkeys(names, file.name)
            size += file.stat().st_size - header_bytes
        metadata = {"total_parameters": self.model.num_parameters(), "total_size": size}
        text = json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2, sort_keys=True) + "\n"
        (self.directory / INDEX).write_text(text, encoding="utf-8")


def _owner(name: str, blocks: Sequence[str]) -> str | None:
    return next((block for block in blocks if name.startswith(f"{block}.")), None)


def _digest(file: Path) -> str | None:
    if not file.is_file() or not file.stat().st_size:
        return None
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return hashlib.sha256(content).hexdigest()


@contextmanager
def _no_bars() -> Iterator[None]:
    """Without transformers' bar for each shard."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
