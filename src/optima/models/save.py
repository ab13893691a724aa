"""Write a checkpoint block by block, and read back what is written: one shard a block, the index last.

transformers' own ``save_pretrained`` writes every tensor, so that names and forms on disk are its own (it renames,
splits fused experts, and saves tied weights once).
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from optima.checkpointing import Destination, Journal
from optima.device import give_back_freed_memory
from optima.errors import ModelError
from optima.files import digest, explain_write_errors, read_header, sync
from optima.models.auxiliary import copy_auxiliary_files, forget_missing_code
from optima.models.blocks import Block
from optima.models.load import INDEX, WEIGHTS, Source, no_bars
from optima.models.offload import Weights
from optima.stopping import stop_if_asked

ONE_FILE = 2**62  # bytes in a shard: no shard is split
OUTSIDE = ""  # the group of the tensors outside the blocks
LARGE_BYTES = 2**30  # an embedding above this has a file of its own, so that no more is in memory at a time


def prepare(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, source: Source | None, directory: Path
) -> None:
    """Write all of a checkpoint but its weights: what transformers refuses to save is refused before the long work.

    Args:
        model: its configuration, generation configuration and, if trusted, its own code are saved.
        tokenizer: saved with them.
        source: its auxiliary files are copied (see ``auxiliary``); None for a model in memory.
        directory: it exists; of what an earlier run left there, shards stay.

    Raises:
        ModelError: if something cannot be saved, or the disk fails.
    """
    # Elsewhere first: save_pretrained deletes the shards that it finds.
    with explain_write_errors(directory), TemporaryDirectory(dir=directory.parent) as scratch, no_bars():
        saved = Path(scratch, "saved")  # whose mode, unlike the scratch directory's, is anybody's to read
        saved.mkdir()
        if source is not None:
            copy_auxiliary_files(source, saved)
        try:
            model.save_pretrained(saved, state_dict={})
            if tokenizer is not None:
                tokenizer.save_pretrained(saved)
        except ValueError as error:  # of a generation configuration that contradicts itself
            raise ModelError(f"transformers cannot save this {type(model).__name__}: {error}") from error
        (saved / WEIGHTS).unlink(missing_ok=True)
        forget_missing_code(saved)
        shutil.copytree(saved, directory, dirs_exist_ok=True)


def open_writer(
    model: PreTrainedModel, blocks: Sequence[Block], destination: Destination, run: dict[str, Any], weights: Weights
) -> Writer:
    """A writer into ``destination`` for ``blocks``; its journal goes on if it is that of this ``run``."""
    with explain_write_errors(destination.journal.file):
        destination.journal.begin(run)
    return Writer(model, [block.name for block in blocks], destination.directory, destination.journal, weights)


class Writer:
    """The weights of a checkpoint, a file a block, each whole and on the disk before its line is in the journal.

    Args:
        model: as it will be when ``publish`` is called.
        blocks: full names of all blocks, in order.
        directory: where the shards go; ``prepare`` fills it.
        journal: on the same disk but outside ``directory``. The blocks in it are checked against their files; from the
            first that is damaged on, all are forgotten, and done again.
        weights: gives what is still to be written when all blocks are done; None: the model has it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        blocks: Sequence[str],
        directory: Path,
        journal: Journal,
        weights: Weights | None = None,
    ) -> None:
        self.model, self.directory, self.journal = model, directory, journal
        self.weights = weights or Weights(model)
        self._scratch, self._all = journal.file.parent, tuple(blocks)
        self.rename({block: block for block in blocks})
        self._lines: dict[str, dict[str, Any]] = {}
        if journal.resumed:
            with explain_write_errors(journal.file):
                self._resume()

    def rename(self, blocks: Mapping[str, str]) -> None:
        """Write only these blocks, in this order, each under the name that it has here."""
        self._blocks = dict(blocks)
        self._names = _groups(self.model, [*blocks], self._all)
        count = len(self._names)
        self._files = {
            group: f"model-{number:05d}-of-{count:05d}.safetensors" for number, group in enumerate(self._names, 1)
        }

    def _renamed(self, block: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {self._blocks[block] + name.removeprefix(block): tensor for name, tensor in tensors.items()}

    @property
    def done(self) -> dict[str, Any]:
        """The record of each committed block, by the block's name."""
        return {block: line["record"] for block, line in self._lines.items()}

    @property
    def notes(self) -> list[str]:
        """Where this and earlier runs continued, for the report."""
        return list(dict.fromkeys(line["note"] for line in self.journal.lines if "note" in line))

    def _resume(self) -> None:
        problem = self.journal.problem
        for number, line in enumerate(self.journal.lines):
            if "block" not in line:
                continue
            damaged = [name for name, sha256 in line["files"].items() if digest(self._place(name)) != sha256]
            if damaged:
                problem = f"{self._place(damaged[0])} is missing or not what was written"
                self.journal.keep(number)
                break
            self._lines[line["block"]] = line
        last = f"after {[*self._lines][-1]}" if self._lines else "from the first block on"
        self.journal.append({"note": f"resumed {last}" + (f": {problem}" if problem else "")})

    def _place(self, name: str) -> Path:
        """The path of a shard, or of a file that only a resumed run reads."""
        return (self._scratch if name.startswith("block-") else self.directory) / name

    def commit(
        self, block: str, tensors: Mapping[str, Tensor], record: object, changed: Collection[str] | None = None
    ) -> None:
        """Write a block so that neither a kill nor a loss of power can take it back.

        Args:
            block: its full name.
            tensors: its state by full names, as ``block.module.state_dict(prefix=f"{block.name}.")`` gives it.
            record: what to remember of it, as JSON.
            changed: names of the tensors that differ from the model's as it was read: what ``read`` will give. None:
                all.

        Raises:
            ModelError: if the disk fails.
        """
        with explain_write_errors(self.directory):
            shard = self._write(self._files[block], self._renamed(block, tensors))
            wanted = {name: tensors[name] for name in (tensors if changed is None else changed)}
            there = _written_plainly(shard, self._renamed(block, wanted))
            plain = [block + name.removeprefix(self._blocks[block]) for name in there]
            # What transformers renames, splits, fuses or transposes is kept as it is in the model, too. Clones:
            # safetensors refuses tensors that share memory.
            rest = {
                name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
                for name, tensor in wanted.items()
                if name not in plain
            }
            names = [shard.name]
            if rest:
                names.append(f"block-{[*self._names].index(block):05d}.safetensors")
                save_file(rest, self._place(names[1]))
                sync(self._place(names[1]), self._scratch)
            files = {name: digest(self._place(name)) for name in names}
            line = {"block": block, "files": files, "plain": plain, "record": record}
            self.journal.append(line)
        self._lines[block] = line
        stop_if_asked()

    def read(self, block: str) -> dict[str, Tensor]:
        """The tensors of a committed block that had changed, by their names in the model, as they were written."""
        line = self._lines[block]
        shard, *rest = (self._place(name) for name in line["files"])
        with safe_open(shard, framework="pt") as opened:
            found = {name: opened.get_tensor(self._blocks[block] + name.removeprefix(block)) for name in line["plain"]}
        return found | (load_file(rest[0]) if rest else {})

    def publish(self, write_reports: Callable[[Path], object] | None = None, smaller: bool = False) -> None:
        """Write the blocks that were not committed and everything outside blocks, the reports, and last the index.

        Args:
            write_reports: is called with the directory, to write other files.
            smaller: the configuration has changed since ``prepare``, and is written anew.

        Raises:
            ModelError: if the disk fails.
        """
        give_back_freed_memory()  # embeddings are large, and copied as they are written
        with explain_write_errors(self.directory):
            for group, file in self._files.items():
                if group not in self._lines and self._names[group]:
                    with self.weights.state(self._names[group]) as tensors:
                        self._write(file, tensors)
            if smaller:
                self.model.config.save_pretrained(self.directory)
                forget_missing_code(self.directory)
            if write_reports is not None:
                write_reports(self.directory)
            self._write_index()

    def _write(self, name: str, tensors: Mapping[str, Tensor]) -> Path:
        with TemporaryDirectory(dir=self._scratch) as scratch, no_bars():
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
        size = parameters = 0
        for file in (file for group, file in self._files.items() if self._names[group]):
            header = read_header(self.directory / file)
            header.pop("__metadata__", None)
            weight_map |= dict.fromkeys(header, file)
            parameters += sum(math.prod(entry["shape"]) for entry in header.values())
            size += max((entry["data_offsets"][1] for entry in header.values()), default=0)
        metadata = {"total_parameters": parameters, "total_size": size}
        text = json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2, sort_keys=True) + "\n"
        (self.directory / INDEX).write_text(text, encoding="utf-8")


def _groups(model: PreTrainedModel, blocks: Sequence[str], every: Sequence[str]) -> dict[str, list[str]]:
    """The tensors of each file: of a block; of those in none of ``every`` block, in one file but for large ones."""
    groups: dict[str, list[str]] = {block: [] for block in [*blocks, OUTSIDE]}
    large: dict[int, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        owner = next((block for block in every if name.startswith(f"{block}.")), OUTSIDE)
        if owner != OUTSIDE and owner not in groups:  # a block that is not written
            continue
        if owner == OUTSIDE and tensor.nbytes > LARGE_BYTES:
            owner = large.setdefault(id(tensor), name)  # tied weights go together
        groups.setdefault(owner, []).append(name)
    return groups


def _written_plainly(shard: Path, tensors: Mapping[str, Tensor]) -> list[str]:
    with safe_open(shard, framework="pt") as opened:
        there = tensors.keys() & set(opened.keys())
        return [name for name in tensors if name in there and opened.get_tensor(name).equal(tensors[name].cpu())]
