"""Runs the commands and the code of a page as a reader would, on tiny models and short texts, without a hub.

* ``optima`` runs in this process, but for tasks. What a command reads and does not exist is made first: models, texts,
  outputs. Recipes are limited to a few short sequences, evaluations to short windows.
* ``pip`` and ``make`` are not run: what they name must exist. Other commands go to bash.
* Python runs in one namespace per page, which has a ``model``, its ``tokenizer``, a ``recipe`` and ``documents``, next
  to a directory ``model`` and a file ``text.txt``.

Before a block, ``<!-- file: NAME -->`` writes it to a file, and ``<!-- not run: why -->`` skips it.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny import LINES, SPECIAL, load_weights, make_llama, make_tokenizer, save_model
from torch import Tensor
from transformers import GenerationConfig

import optima
from optima.cli import main
from optima.evaluation.perplexity import evaluation_windows
from optima.recipe import Recipe, RunOptions

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"(?:^<!-- (file|not run): (.*?) -->\n)?^```(bash|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MOST = {"num_calibration_samples": 4, "max_seq_length": 32}
WINDOW = 64  # tokens of an evaluation's window
DOCUMENTS = [f"{LINES[i % 3]} {i} " * 20 for i in range(40)]
NOT_RUN = {"git", "python3", "hf", "cd", "."}
TEXTS = (".txt", ".jsonl", ".json", ".parquet")
PACKED_MASKS = "mask_compressed.npz"


class Snippet(NamedTuple):
    """A block of a page; ``about``: the name of the file that it is, or why it is not run."""

    mark: str
    about: str
    language: str
    text: str


def snippets(page: Path) -> list[Snippet]:
    """The blocks of a page, in order."""
    return [Snippet(*found) for found in BLOCK.findall(page.read_text(encoding="utf-8"))]


def short_windows(documents: Iterable[str], tokenizer: Any, length: int, *options: Any) -> Tensor:
    return evaluation_windows(documents, tokenizer, min(length, WINDOW), *options)


class World:
    """The reader's machine: the current directory, in which the files that a page names are made."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, dense: Path, pruned: Path) -> None:
        self.dense, self.pruned = dense, pruned
        before = RunOptions.__init__

        def init(recipe: RunOptions, **values: Any) -> None:
            before(recipe, **values)
            for name, most in MOST.items():
                if (value := getattr(recipe, name)) is not None:
                    vars(recipe)[name] = min(value, most)

        monkeypatch.setattr(RunOptions, "__init__", init)
        monkeypatch.setattr("optima.evaluation.evaluate.evaluation_windows", short_windows)
        monkeypatch.setattr("datasets.load_dataset_builder", lambda *_, **__: Builder())
        monkeypatch.syspath_prepend(str(Path.cwd()))

    def run(self, snippet: Snippet) -> None:
        """Run one block; an error fails the test."""
        if snippet.mark == "not run":
            return
        if snippet.mark == "file":
            Path(snippet.about).write_text(snippet.text, encoding="utf-8")
            sys.modules.pop(Path(snippet.about).stem, None)
        elif snippet.language == "python":
            if PACKED_MASKS in snippet.text:
                self._write_packed_masks()
            exec(snippet.text, self.namespace)
        else:
            for line in snippet.text.replace("\\\n", " ").splitlines():
                if words := shlex.split(line, comments=True):
                    self.command(line, words)

    @cached_property
    def namespace(self) -> dict[str, Any]:
        """What the Python of a page may use without defining it."""
        self._model("model")
        write_text(Path("text.txt"))
        return {
            "__name__": "snippets",
            "optima": optima,
            "model": make_llama(max_position_embeddings=256),
            "tokenizer": make_tokenizer(),
            "recipe": Recipe(selector="wanda", objective="sink"),
            "documents": DOCUMENTS,
        }

    def command(self, line: str, words: list[str]) -> None:
        """Run one line of bash."""
        if words[0] == "torchrun":  # one process of it; tests of ranks start several
            words = words[words.index("optima") :]
        match words:
            case ["optima", "eval", *_] if "--tasks" in words:
                pass  # test_tasks.py has items
            case ["optima", command, *arguments]:
                if {"--neurons", "--blocks"} & set(words):  # a model that has something to lose
                    arguments[0] = f"{arguments[0]}-deep"
                    deep = make_llama(num_hidden_layers=5, intermediate_size=512, max_position_embeddings=256)
                    save_model(Path(arguments[0]), deep)
                arguments = [self._argument(*pair) for pair in zip(["", *arguments], arguments, strict=False)]
                self._models(command, arguments)
                try:
                    status = main([command, *arguments])
                except SystemExit as stopped:  # --help
                    status = int(stopped.code or 0)
                assert status == 0, line
            case ["make", *targets]:
                known = (ROOT / "Makefile").read_text(encoding="utf-8")
                assert all("=" in target or re.search(rf"^{target}:", known, re.MULTILINE) for target in targets), line
            case ["pip", "install", *_]:
                known = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
                assert all(f"\n{extra} = [" in known for extra in re.findall(r"\[(\w+)\]", line)), line
            case ["python", script, *_] if (ROOT / script).exists():
                pass  # a benchmark: test_benchmarks.py runs it
            case [first, *_] if first not in NOT_RUN:
                subprocess.run(["bash", "-c", line], check=True, capture_output=True)

    def _argument(self, option: str, value: str) -> str:
        """Make the file that an argument names; a GPU is a CPU here."""
        if option == "--device":
            return "cpu"
        file = Path(value)
        if option == "--mask-from" and not file.exists() and file.suffix != ".safetensors":
            shutil.copytree(self.pruned, file)
        elif file.suffix == ".safetensors" and not file.exists():
            save_file({name: weight != 0 for name, weight in self._pruned_weights().items()}, file)
        elif file.suffix in TEXTS and option != "--output" and not file.exists():
            write_text(file)
        return value

    def _models(self, command: str, arguments: list[str]) -> None:
        """Make the models and outputs that a command reads: its arguments before the first option."""
        end = next((place for place, each in enumerate(arguments) if each.startswith("-")), len(arguments))
        for place, name in enumerate(arguments[:end]):
            if command != "restore" and not name.endswith(TEXTS):
                self._model(name, pruned=command in ("report", "compress") or (command == "eval" and place > 0))

    def _model(self, name: str, pruned: bool = False) -> None:
        if not Path(name).exists():
            shutil.copytree(self.pruned if pruned else self.dense, name)

    def _pruned_weights(self) -> dict[str, Tensor]:
        return {name: weight for name, weight in load_weights(self.pruned).items() if "_proj" in name}

    def _write_packed_masks(self) -> None:
        """As MaskLLM publishes them."""
        bits = {f"{name}.mask": np.packbits(weight.numpy() != 0) for name, weight in self._pruned_weights().items()}
        np.savez_compressed(PACKED_MASKS, **bits)


def write_text(file: Path) -> None:
    """A text of a few thousand tokens."""
    file.parent.mkdir(parents=True, exist_ok=True)
    records = "".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS)
    file.write_text(records if file.suffix == ".jsonl" else "\n\n".join(DOCUMENTS), encoding="utf-8")


class Builder:
    """Stands for a dataset of the hub."""

    hash = "0" * 40

    def as_streaming_dataset(self, split: str) -> Builder:
        return self

    def shuffle(self, **_: int) -> Builder:
        return self

    def __iter__(self) -> Any:
        return ({"text": text} for text in DOCUMENTS)


def make_models(directory: Path) -> tuple[Path, Path]:
    """A dense checkpoint and a 2:4 sparse one of it, in ``directory``."""
    model = make_llama(max_position_embeddings=256)
    model.generation_config = GenerationConfig(bos_token_id=SPECIAL.index("<s>"), eos_token_id=SPECIAL.index("</s>"))
    dense, pruned = save_model(directory / "dense", model), directory / "pruned"
    make_tokenizer(bos_token="<s>", eos_token="</s>").save_pretrained(dense)
    recipe = Recipe(pattern="2:4", selector="wanda", objective="sink", max_seq_length=16, num_calibration_samples=4)
    tokens = torch.randint(4, 200, (4, 16), generator=torch.Generator().manual_seed(0))
    optima.prune(dense, recipe, output_dir=pruned, calibration=tokens, progress=False)
    return dense, pruned
