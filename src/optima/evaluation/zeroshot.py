"""Zero-shot accuracy by lm-eval, on tasks of the hub or on items in local files.

Prompts, choices and metrics are those of lm-eval's own definition of a task; a local file only replaces its data, and
must have the columns of the task's published dataset.

Shapes: B requests in a batch, L tokens in the longest of them, V vocabulary.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import logging
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import yaml
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from optima.calibration.records import READ_ERRORS
from optima.calibration.text import special_tokens, token_ids
from optima.device import evaluating
from optima.errors import OTHER_DTYPE, CalibrationError, ModelError, NumericalError, OptimaError, RecipeError
from optima.evaluation.logits import check_causal
from optima.evaluation.record import Estimate, TaskRecord
from optima.evaluation.settings import CHOICES
from optima.models.reading import in_slices

METRICS = ("acc", "acc_norm")
READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
SPLIT = "test"
PROBE = "Any text of some words shows whether a model reads it from its beginning to its end."


@dataclass(frozen=True)
class Tasks:
    """Tasks that are loaded, items and all.

    Attributes:
        names: as asked for, with the tasks that each stands for: itself, or those of a group.
        loaded: as lm-eval's evaluator takes them.
    """

    names: dict[str, tuple[str, ...]]
    loaded: dict[str, Any]


def zero_shot(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Tasks,
    *,
    limit: int | None = None,
    batch_size: int = CHOICES,
) -> tuple[TaskRecord, ...]:
    """Accuracy on multiple-choice tasks.

    Args:
        model: a causal language model; runs where it is, in its own dtype, and is left as it was.
        tokenizer: the model's; what it adds to a text (BOS) it adds to every prompt.
        tasks: from ``load_tasks``; they can be used again.
        limit: use the first items of each task only; None uses all.
        batch_size: choices in one forward pass.

    Returns:
        One record a task: ``acc`` (the likeliest choice is the right one) and ``acc_norm`` (likelihoods per character
        of the choice), as far as the task defines them.

    Raises:
        ModelError: if the model predicts no next tokens, if a choice is longer than what it reads, or if the tokenizer
            has no token that begins or ends a text (lm-eval needs one).
        NumericalError: if a likelihood is NaN.
        RecipeError: if ``limit`` is less than 1.
    """
    from lm_eval import evaluator

    if limit is not None and limit < 1:
        raise RecipeError(f"--task-limit must be at least 1, got {limit}: leave it out to use every item")
    check_tokenizer(tokenizer)
    check_causal(model, torch.tensor(token_ids([PROBE], tokenizer)))
    # lm-eval gives a tokenizer without padding one, and switches the model to evaluation.
    with evaluating(model), _warnings_only_from("lm_eval"):
        read = language_model(model, copy.deepcopy(tokenizer), batch_size)
        found = evaluator.evaluate(read, tasks.loaded, limit=limit)
    return tuple(
        task_record(name, leaves, found, sum(read.cut[leaf] for leaf in leaves)) for name, leaves in tasks.names.items()
    )


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, model: str = "the model") -> None:
    """Raise ``ModelError`` if the tokenizer of ``model`` lacks what lm-eval needs."""
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise ModelError(
            f"the tokenizer of {model} names neither a bos_token nor an eos_token: set one in tokenizer_config.json"
        )


def find_files(names: Sequence[str], directory: str | Path) -> dict[str, Path]:
    """The file of items of each task: ``piqa.jsonl``, ``piqa_validation.jsonl``, ``piqa-test.parquet``, ...

    Raises:
        CalibrationError: if a task has no file there, or more than one.
    """
    directory = Path(directory).expanduser()
    if not directory.is_dir():
        raise CalibrationError(f"--task-data {directory} is no directory: name the one that holds the tasks' items")
    files: dict[str, Path] = {}
    for name in names:
        starts = (f"{name}_", f"{name}-", f"{name}.")
        found = sorted(p for p in directory.iterdir() if p.suffix in READERS and f"{p.stem}.".startswith(starts))
        # arc_easy_test is no file of a task arc, where arc_easy is asked for too
        longer = tuple(other for other in names if other != name and other.startswith(name))
        found = [file for file in found if not (longer and file.stem.startswith(longer))]
        if len(found) != 1:
            what = ", ".join(file.name for file in found) or "no file"
            raise CalibrationError(
                f"task {name} has {what} in {directory}: keep one file of its items there, called {name}_SPLIT.jsonl "
                f"(or {', '.join(list(READERS)[1:])})"
            )
        files[name] = found[0]
    return files


def load_tasks(tasks: Mapping[str, str | Path | None]) -> Tasks:
    """Load lm-eval's tasks with their items; a check before long work.

    Args:
        tasks: lm-eval's name of a task or a group (``piqa``, ``mmlu``) -> file of its items; None reads the hub.

    Raises:
        OptimaError: if lm-eval is not installed.
        RecipeError: if lm-eval has no such task, or one that is not multiple choice.
        CalibrationError: if a file is missing or lacks the columns of its task; if the hub cannot be read.
    """
    _check_installed()
    for name, file in tasks.items():
        if file is not None and not Path(file).is_file():
            raise CalibrationError(f"task {name}: there is no file {file}")
        if file is not None and Path(file).suffix not in READERS:
            raise CalibrationError(f"task {name}: {file} must be one of {', '.join(READERS)}")
    with _warnings_only_from("lm_eval"):
        manager = _manager()
        for name in tasks:
            _check_known(manager, name)
        parts = {
            name: _from_hub(manager, name) if file is None else manager.load([_on_file(manager, name, Path(file))])
            for name, file in tasks.items()
        }
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    for name, part in parts.items():
        _check_choices(name, part)
        for key, members in part.items():
            loaded[key] |= members
    return Tasks({name: tuple(part["tasks"]) for name, part in parts.items()}, loaded)


@cache
def _manager() -> Any:
    """lm-eval's index of its tasks, which takes seconds to make."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _check_known(manager: Any, name: str) -> None:
    known = [*manager.all_subtasks, *manager.all_groups]
    if name not in known:
        close = difflib.get_close_matches(name, known, 1)
        meant = f" (did you mean {close[0]}?)" if close else ""
        raise RecipeError(f"lm-eval has no task {name}{meant}: list them with lm-eval ls tasks")


def _check_choices(name: str, part: Mapping[str, Any]) -> None:
    for task in part["tasks"].values():
        if task.OUTPUT_TYPE != "multiple_choice":
            raise RecipeError(
                f"task {name} is no multiple choice but {task.OUTPUT_TYPE}: only choices can be compared here"
            )
    if name in part["groups"]:
        known = {each.metric for each in part["groups"][name].aggregate_metric_list or []}
    else:
        known = {each["metric"] for task in part["tasks"].values() for each in task.config.metric_list or []}
    if not known & set(METRICS):
        has = ", ".join(sorted(known)) or "nothing"
        raise RecipeError(f"lm-eval measures {has} of {name}, and no accuracy: choose another, or name its tasks")


def _from_hub(manager: Any, name: str) -> Any:
    try:
        part = manager.load([name])
    except READ_ERRORS as error:
        raise CalibrationError(
            f"the items of task {name} cannot be read from the hub ({error}): check the network, or give them as a "
            "file in --task-data"
        ) from error
    for task in part["tasks"].values():
        task.set_config("num_fewshot", 0)
    return part


def _on_file(manager: Any, name: str, file: Path) -> Any:
    """The task as lm-eval defines it, but for where its items come from."""
    definition = manager.task_index[name].yaml_path
    if name in manager.all_groups:
        raise RecipeError(f"{name} is a group of tasks, and {file} can only hold the items of one: name its tasks")
    if definition is None:
        raise RecipeError(f"task {name} is defined by code in lm-eval, which reads its own data: choose another")
    overrides = {
        "include": str(definition),
        "task": name,
        "dataset_path": READERS[file.suffix],
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {SPLIT: str(file.resolve())}},
        "training_split": None,
        "validation_split": None,
        "test_split": SPLIT,
        "fewshot_split": None,
        "num_fewshot": 0,
    }
    try:
        with TemporaryDirectory() as directory:
            changed = Path(directory) / f"{name}.yaml"
            changed.write_text(yaml.safe_dump(overrides), encoding="utf-8")
            (task,) = manager.load([str(changed)])["tasks"].values()
    # lm-eval renders its templates on the first item while it loads a task.
    except (KeyError, TypeError, ValueError, IndexError, ImportError, _undefined_error()) as error:
        raise CalibrationError(
            f"{file} does not hold items of {name} with the columns of its published dataset "
            f"({type(error).__name__}: {error})"
        ) from error
    return task


def _undefined_error() -> type[Exception]:
    from jinja2 import UndefinedError

    return UndefinedError


def task_record(name: str, leaves: Sequence[str], found: Mapping[str, Any], cut: int = 0) -> TaskRecord:
    """What lm-eval found of a task or group ``name``, the items of its ``leaves`` in order.

    It names a number ``metric,filter``; a standard error of a single item is the text "N/A".
    """
    results = {**found["results"], **found.get("groups", {})}[name]
    samples = [sample for leaf in leaves for sample in sorted(found["samples"][leaf], key=lambda each: each["doc_id"])]
    metrics, correct = {}, {}
    for metric in METRICS:
        if f"{metric},none" in results:
            stderr = results.get(f"{metric}_stderr,none")
            known = isinstance(stderr, float)
            metrics[metric] = Estimate(float(results[f"{metric},none"]), float(stderr) if known else None)
            answers = [float(sample[metric]) for sample in samples]
            # Some tasks give shares of a point, and some groups a mean over tasks of unequal size: no share of items.
            alike = math.isclose(math.fsum(answers), metrics[metric].value * len(answers), abs_tol=1e-6)
            if set(answers) <= {0.0, 1.0} and alike:
                correct[metric] = "".join(str(int(answer)) for answer in answers)
    digest = hashlib.sha256("".join(sample["doc_hash"] for sample in samples).encode())
    return TaskRecord(name, len(samples), metrics, correct, digest.hexdigest(), cut)


def language_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> Any:
    """The model as lm-eval sees it: its own batches, with logits of the positions that are scored and no others.

    With a large vocabulary the head costs more than the body, and most positions belong to the prompt.
    """
    from lm_eval.models.huggingface import HFLM

    after = special_tokens(tokenizer).after  # behind a prompt they would end the text before the choice

    class Quiet(HFLM):  # type: ignore[misc]
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self.cut: Counter[str] = Counter()  # see TaskRecord, by the name of a task

        def tok_encode(self, string: str, *given: Any, **options: Any) -> list[int]:
            ids: list[int] = super().tok_encode(string, *given, **options)
            return ids[: -len(after)] if after and ids[-len(after) :] == after else ids

        def _loglikelihood_tokens(
            self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **options: Any
        ) -> list[tuple[float, bool]]:
            if (longest := max((len(choice) for *_, choice in requests), default=0)) > self.max_length:
                raise ModelError(
                    f"a choice of the tasks has {longest} tokens, and {type(model).__name__} reads {self.max_length}: "
                    "leave that task out"
                )
            for name, (_, prompt, choice) in zip(self._names, requests, strict=True):
                self.cut[name] += len(prompt) + len(choice) > self.max_length + 1
            found: list[tuple[float, bool]] = super()._loglikelihood_tokens(requests, disable_tqdm=True, **options)
            return found

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            self._names = [request.task_name for request in requests]
            found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
            if any(math.isnan(likelihood) for likelihood, _ in found):  # the first choice would count as the likeliest
                raise NumericalError(f"the likelihood of a choice is NaN: {OTHER_DTYPE}")
            return found

    kind: Any = _with_last_logits(Quiet) if in_slices(model) else Quiet
    return kind(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, backend="causal")


def _with_last_logits(kind: Any) -> Any:
    class LastLogits(kind):  # type: ignore[misc]
        def _loglikelihood_tokens(
            self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **options: Any
        ) -> list[tuple[float, bool]]:
            # What lm-eval will make a row of, and how many of its last positions are scored.
            self._wanted: dict[tuple[int, ...], int] = {}
            for _, context, continuation in requests:
                row = tuple((context + continuation)[-(self.max_length + 1) : -1])
                self._wanted[row] = max(len(continuation), self._wanted.get(row, 0))
            found: list[tuple[float, bool]] = super()._loglikelihood_tokens(requests, **options)
            return found

        def _model_call(self, inps: Tensor, **options: Any) -> Tensor:
            # Missing positions at the front are understood: lm-eval counts from the end of what it gets.
            with torch.no_grad():
                logits_BLV: Tensor = self.model(inps, logits_to_keep=scored_positions(inps, self._wanted)).logits
            return logits_BLV

    return LastLogits


def scored_positions(inputs_BL: Tensor, wanted: Mapping[tuple[int, ...], int]) -> int:
    """How many positions at the end of a batch hold all that is scored in it.

    Args:
        inputs_BL: rows of tokens, filled up to the right.
        wanted: of each row without what fills it up, how many of its last positions are scored.
    """
    most, length = 0, inputs_BL.shape[1]
    for row in inputs_BL.tolist():
        begin = length  # of what may fill the row up: one token, again and again
        while begin and row[begin - 1] == row[-1]:
            begin -= 1
        asked = [
            wanted[own] + length - len(own) for end in range(begin, length + 1) if (own := tuple(row[:end])) in wanted
        ]
        most = max(most, max(asked, default=length))
    return most


def _check_installed() -> None:
    try:
        import lm_eval.models.huggingface  # noqa: F401
    except ImportError as error:
        raise OptimaError(
            f"tasks need lm-eval, which cannot be imported ({error}): pip install 'lm-eval>=0.4.13,<0.5'"
        ) from error


@contextmanager
def _warnings_only_from(name: str) -> Iterator[None]:
    """lm-eval warns of every choice that is made here on purpose."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
