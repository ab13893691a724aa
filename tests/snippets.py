"""Runs the commands and the code of a page as a reader would, on stand-ins: tiny models, little text, no hub.

* ``optima`` runs in this process, on what the page names. A model, a text or an output that is not there is made first.
* Recipes are cut to a few short sequences, evaluations to short windows.
* ``pip`` and ``make`` are not called: what they name must exist. No environment is made, and nothing downloaded.
  Everything else goes to bash.
* Python runs in one namespace a page, which has a ``model``, its ``tokenizer``, a ``recipe`` and ``documents``. There
  are a directory ``model`` and a file ``text.txt``.

A comment in front of a block says otherwise: ``<!-- file: NAME -->`` (the block is a file), ``<!-- not run: why -->``.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from optima.recipe import Recipe

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"(?:^<!-- (file|not run): (.*?) -->\n)?^```(bash|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SAMPLES, LENGTH = 4, 32  # of calibration
WINDOW = 64  # tokens of an evaluation's window
DOCUMENTS = [f"{LINES[i % 3]} {i} " * 20 for i in range(40)]
UNCALLED = {("git", "clone"), ("python3", "-m"), ("hf", "download")}
TEXTS = (".txt", ".jsonl", ".json", ".parquet")
PACKED_MASKS = "mask_compressed.npz"


@dataclass(frozen=True)
class Snippet:
    """A block of a page."""

    language: str
    text: str
    mark: str  # file, not run, or nothing
    about: str  # the file's name, or the reason
    line: int


def snippets(page: Path) -> list[Snippet]:
    """The blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    return [
        Snippet(found[3], found[4], found[1] or "", found[2] or "", text[: found.start(3)].count("\n") + 1)
        for found in BLOCK.finditer(text)
    ]


def short_windows(documents: Iterable[str], tokenizer: Any, length: int, *options: Any) -> Tensor:
    """Windows of at most ``WINDOW`` tokens."""
    return evaluation_windows(documents, tokenizer, min(length, WINDOW), *options)


class World:
    """The reader's machine: the current directory, where what a page names comes to be."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, dense: Path, pruned: Path) -> None:
        self.monkeypatch, self.dense, self.pruned = monkeypatch, dense, pruned
        self._cap(Recipe, "num_calibration_samples", SAMPLES)
        self._cap(Recipe, "max_seq_length", LENGTH)
        monkeypatch.setattr("optima.evaluation.evaluate.evaluation_windows", short_windows)
        monkeypatch.setattr("datasets.load_dataset_builder", lambda *_, **__: Builder())
        monkeypatch.syspath_prepend(str(Path.cwd()))
        self._namespace: dict[str, Any] | None = None

    def _cap(self, kind: type, name: str, most: int) -> None:
        """No value of a field is above ``most`` where a text is read, whoever asks for it."""
        before = kind.__init__  # type: ignore[misc]

        def init(self: Any, **values: Any) -> None:
            before(self, **values)
            if (value := getattr(self, name)) is not None:
                vars(self)[name] = min(value, most)

        self.monkeypatch.setattr(kind, "__init__", init)

    def run(self, snippet: Snippet) -> None:
        """Run one block; what goes wrong fails the test."""
        if snippet.mark == "not run":
            return
        if snippet.mark == "file":
            Path(snippet.about).write_text(snippet.text, encoding="utf-8")
            sys.modules.pop(Path(snippet.about).stem, None)
        elif snippet.language == "python":
            if PACKED_MASKS in snippet.text:
                self._packed_masks()
            exec(compile(snippet.text, f"line {snippet.line}", "exec"), self.namespace)
        else:
            for line in snippet.text.replace("\\\n", " ").splitlines():
                if words := shlex.split(line, comments=True):
                    self.command(line, words)

    @property
    def namespace(self) -> dict[str, Any]:
        """What the Python of a page may use without saying where it is from."""
        if self._namespace is None:
            self.model("model")
            self.text(Path("text.txt"))
            recipe = Recipe(selector="wanda", objective="sink")
            self._namespace = {
                "__name__": "snippets",
                "optima": optima,
                "model": make_llama(max_position_embeddings=256),
                "tokenizer": make_tokenizer(),
                "recipe": recipe,
                "documents": DOCUMENTS,
            }
        return self._namespace

    def command(self, line: str, words: list[str]) -> None:
        """Run one line of bash."""
        if words[0] == "torchrun":  # one rank of it; tests of ranks start several
            words = words[words.index("optima") :]
        match words:
            case ["optima", command, *arguments]:
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
            case ["pip", "install", *packages]:
                known = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
                for package in packages:
                    for extra in re.findall(r"\[(\w+)\]", package):
                        assert f"\n{extra} = [" in known, line
            case _ if tuple(words[:2]) in UNCALLED or words[0] in ("cd", ".", ".venv/bin/pre-commit"):
                pass
            case ["python", script, *_] if (ROOT / script).exists():
                pass  # a benchmark: run by hand
            case _:
                subprocess.run(["bash", "-c", line], check=True, capture_output=True)

    def _argument(self, option: str, value: str) -> str:
        """Make a file that an argument names; a GPU is a CPU here."""
        if option == "--device":
            return "cpu"
        if option == "--task-data":
            self._items(Path(value))
        if value.endswith(TEXTS) and option not in ("--output",) and not Path(value).exists():
            self.text(Path(value))
        if value.endswith(".safetensors") and not Path(value).exists():
            self._masks(Path(value))
        if option == "--mask-from" and not Path(value).exists():
            shutil.copytree(self.pruned, value)
        return value

    def _models(self, command: str, arguments: list[str]) -> None:
        """Make the models and outputs that a command reads."""
        names = []
        for argument in arguments:
            if argument.startswith("-"):
                break
            names.append(argument)
        if command == "unpack" or "--output-dir" in names:
            return
        for place, name in enumerate(names if command in ("eval", "report", "pack") else names[:1]):
            if command in ("prune", "plan", "order", "eval", "report", "pack") and not name.endswith(TEXTS):
                self.model(name, pruned=command in ("report", "pack") or (command == "eval" and place > 0))

    def model(self, name: str, pruned: bool = False) -> None:
        """A tiny model, or one that was pruned, in a directory of that name."""
        if not Path(name).exists():
            shutil.copytree(self.pruned if pruned else self.dense, name)

    def text(self, file: Path) -> None:
        """A text of a few thousand tokens."""
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".jsonl":
            file.write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS), encoding="utf-8")
        else:
            file.write_text("\n\n".join(DOCUMENTS), encoding="utf-8")

    def _items(self, directory: Path) -> None:
        """Items of the tasks whose files the pages name."""
        directory.mkdir(exist_ok=True)
        cuts = [slice(i, i + 8) for i in range(8)]
        piqa = [
            {"goal": LINES[2], "sol1": LINES[0][cut], "sol2": LINES[1][cut], "label": cut.start % 2} for cut in cuts
        ]
        arc = [
            {
                "id": str(cut.start),
                "question": LINES[2],
                "choices": {"text": [LINES[0][cut], LINES[1][cut]], "label": ["A", "B"]},
                "answerKey": "AB"[cut.start % 2],
            }
            for cut in cuts
        ]
        for name, items in ("piqa_validation.jsonl", piqa), ("arc_easy_test.jsonl", arc):
            (directory / name).write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")

    def _masks(self, file: Path) -> None:
        weights = load_weights(self.pruned)
        save_file({name: weight != 0 for name, weight in weights.items() if "_proj" in name}, file)

    def _packed_masks(self) -> None:
        """As MaskLLM publishes them."""
        weights = load_weights(self.pruned)
        bits = {f"{name}.mask": np.packbits(weight.numpy() != 0) for name, weight in weights.items() if "_proj" in name}
        np.savez_compressed(PACKED_MASKS, **bits)


class Builder:
    """The hub's data sets, which are not to be had in a test."""

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
