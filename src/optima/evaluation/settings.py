"""What is measured, of which models. No torch is imported here: help and refusals must not wait for it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from optima.errors import RecipeError
from optima.options import DTYPES, is_file
from optima.values import Count, Device, Flag, FrozenNames, Seed, checked, unknown

PROTOCOLS = {
    "windows": "the tokenizer's special tokens (BOS) in every window",
    "sparsegpt": "the tokenizer's special tokens (BOS) once, before the text, as the code of SparseGPT and Wanda does",
}
ABOUT = (
    'Perplexity: documents joined by "\\n\\n" and tokenised once; non-overlapping windows of max-seq-length tokens; '
    "exp of the mean negative log-likelihood of next tokens. Tasks: zero-shot accuracy by lm-eval, which pip install "
    "'.[eval]' in the clone brings. One of --dataset, --tasks and --suite is needed. Every model is compared with the "
    "first on the same windows and items."
)
SUITES = {"paper": ("mmlu", "piqa", "arc_easy", "arc_challenge", "winogrande", "openbookqa")}
WINDOWS, CHOICES = 1, 8  # in one forward pass
OF_TEXT = ("split", "protocol", "max_seq_length", "max_windows")


@dataclass(frozen=True)
class EvaluationSettings:
    """One evaluation; several models are compared with the first. One text stands for a tuple of one.

    Attributes:
        models: hub ids, local directories or GGUF files.
        dataset: hub ids or local files of the text for perplexity; empty measures none.
        revision: commit, tag or branch of the first model, if it is on the hub; None for its newest.
        split: split of a hub dataset.
        protocol: one of ``PROTOCOLS``.
        max_seq_length: tokens in a window.
        max_windows: use the first windows only.
        divergence: measure how far each model's predictions are from the first one's, on the same text.
        tasks: lm-eval's names of multiple-choice tasks or of groups of them.
        suite: the tasks of one of ``SUITES``, besides.
        task_data: directory with a file of items for each task; None reads the hub.
        task_limit: use the first items of each task only; of a group, of each of its tasks.
        batch_size: windows, or choices of a task, in one forward pass; None means ``WINDOWS`` and ``CHOICES``.
        seed: of the bootstrap.
        device: auto, cpu, cuda or cuda:N.
        dtype: load models in this; auto keeps each one's own.
        trust_remote_code: run code that comes with a checkpoint.

    Raises:
        RecipeError: on construction, for what cannot be carried out.
    """

    models: FrozenNames
    dataset: FrozenNames = ()
    revision: str | None = None
    split: str = "test"
    protocol: str = "windows"
    max_seq_length: Count = 2048
    max_windows: Count | None = None
    divergence: Flag = False
    tasks: FrozenNames = ()
    suite: str | None = None
    task_data: str | None = None
    task_limit: Count | None = None
    batch_size: Count | None = None
    seed: Seed = 0
    device: Device = "auto"
    dtype: str = "auto"
    trust_remote_code: Flag = False

    def __post_init__(self) -> None:
        for option in fields(self):
            value = checked(type(self), option.name, getattr(self, option.name), option.default)
            object.__setattr__(self, option.name, value)
        for problem in self._problems():
            raise RecipeError(problem)

    def _problems(self) -> Iterator[str]:
        if not self.models:
            yield "models is empty: name a hub id, a local directory or a GGUF file"
        if self.suite is not None and self.suite not in SUITES:
            yield unknown("suite", self.suite, SUITES)
        if not (self.dataset or self.task_names):
            yield "nothing to measure: name a text with --dataset, or --tasks, or a --suite"
        if self.protocol not in PROTOCOLS:
            yield unknown("protocol", self.protocol, PROTOCOLS)
        if self.dtype not in DTYPES:
            yield unknown("dtype", self.dtype, DTYPES)
        if self.divergence and not (self.dataset and len(self.models) > 1):
            yield "--divergence compares models on a text: name two models or more, and a text with --dataset"
        defaults = {option.name: option.default for option in fields(self)}
        for name, meant in self._idle().items():
            if getattr(self, name) != defaults[name]:
                flag = f"--{name.replace('_', '-')}"
                yield f"{flag} is for {meant}, or leave {flag} out"
        if not self.task_names and (self.task_data is not None or self.task_limit is not None or self.seed):
            yield "--task-data, --task-limit and --seed (of the bootstrap) are for tasks: name some with --tasks"

    def _idle(self) -> dict[str, str]:
        """Options that do nothing, and what they are for."""
        if not self.dataset:
            return dict.fromkeys(OF_TEXT, "a text: name one with --dataset")
        return {"split": "a dataset of the hub: name one"} if all(map(is_file, self.dataset)) else {}

    @property
    def task_names(self) -> tuple[str, ...]:
        """The tasks named and those of the suite, each once."""
        return tuple(dict.fromkeys([*self.tasks, *SUITES.get(self.suite or "", ())]))

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
