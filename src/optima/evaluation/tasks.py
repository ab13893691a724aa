"""Accuracy on tasks of lm-evaluation-harness, with its own prompts, metrics and model class."""

from __future__ import annotations

import copy
import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from datasets.exceptions import DatasetsError
from jinja2 import UndefinedError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from optima.errors import OTHER_DTYPE, CalibrationError, ModelError, NumericalError, OptimaError, RecipeError
from optima.evaluation.perplexity import PROBE_LENGTH, check_causal
from optima.evaluation.record import Estimate, TaskRecord
from optima.models.forward import evaluating

METRICS = ("acc", "acc_norm")
READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
BATCH_SIZE = 8  # choices in one forward pass


def find_items(names: Sequence[str], directory: str | Path) -> dict[str, Path]:
    """The file of items of each task: ``piqa.jsonl``, ``piqa_validation.jsonl``, ``piqa_test.parquet``, ...

    Raises:
        CalibrationError: if the directory does not have exactly one file for a task.
    """
    place, files = Path(directory).expanduser(), {}
    for name in names:
        own = re.compile(rf"{re.escape(name)}([_-](validation|dev|test))?")
        found = sorted(file for file in place.glob("*") if file.suffix in READERS and own.fullmatch(file.stem))
        if len(found) != 1:
            has = ", ".join(file.name for file in found) or "no file"
            raise CalibrationError(f"--task-data {place} must have one file {name}_SPLIT.jsonl, and has {has}")
        files[name] = found[0]
    return files


def load_tasks(tasks: Mapping[str, Path | None]) -> dict[str, list[Any]]:
    """Load tasks of lm-eval with their items.

    Args:
        tasks: task, group or tag of lm-eval, or path of a YAML file -> file of its items, with the columns of the
            task's published dataset; None reads the hub.

    Returns:
        For each name, the tasks or the group to evaluate.

    Raises:
        OptimaError: if lm-eval is not installed.
        RecipeError: if lm-eval cannot load a task.
    """
    found = {}
    for name, file in tasks.items():
        try:
            part = _manager().load([name if file is None else _with_items(name, file)])
        except (DatasetsError, UndefinedError, LookupError, OSError, StopIteration, TypeError, ValueError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise RecipeError(f"lm-eval cannot load task {name} from {file or 'the hub'}: {reason}") from error
        groups = [] if file is not None else [*part["groups"].values()]
        found[name] = groups[:1] or [*part["tasks"].values()]
    return found


def zero_shot(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Mapping[str, Sequence[Any]],
    *,
    limit: int | None = None,
    batch_size: int = BATCH_SIZE,
) -> tuple[TaskRecord, ...]:
    """Accuracy on tasks by ``lm_eval.simple_evaluate``, with the number of examples that each task defines (mostly 0).

    Args:
        model: a causal language model; it runs where it is, in its own dtype.
        tokenizer: the model's.
        tasks: from ``load_tasks``.
        limit: use the first items of each task only.
        batch_size: choices in one forward pass.

    Raises:
        ModelError: if the model is not causal, or the tokenizer has neither BOS nor EOS, one of which lm-eval needs.
        NumericalError: if a likelihood is NaN.
        RecipeError: if a task has no accuracy.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise ModelError("the tokenizer has neither bos_token nor eos_token: set one in tokenizer_config.json")
    records = []
    with torch.no_grad(), evaluating(model):
        check_causal(model, torch.arange(PROBE_LENGTH)[None])
        tokenizer = copy.deepcopy(tokenizer)  # lm-eval sets its padding token
        # Float32, since the likelihoods of long choices tie in bfloat16.
        lm = HFLM(model, backend="causal", tokenizer=tokenizer, batch_size=batch_size, softmax_dtype="float32")
        for name, parts in tasks.items():
            found = simple_evaluate(model=lm, tasks=list(parts), task_manager=_manager(), limit=limit)
            results, samples = found["results"], found["samples"]
            if name in results:
                samples = {name: [item for each in samples.values() for item in each]}  # a group's tasks together
            records += [_record(task, results[task], items) for task, items in samples.items()]
    return tuple(records)


def _record(task: str, results: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> TaskRecord:
    if any(isinstance(r, tuple) and math.isnan(r[0]) for sample in samples for r in sample["filtered_resps"]):
        raise NumericalError(f"a likelihood in task {task} is NaN: {OTHER_DTYPE}")
    metrics, correct = {}, {}
    for metric in METRICS:
        if (value := results.get(f"{metric},none")) is None:
            continue
        stderr = results.get(f"{metric}_stderr,none")  # "N/A" for a single item
        metrics[metric] = Estimate(float(value), float(stderr) if isinstance(stderr, float) else None)
        answers = [sample[metric] for sample in samples]
        # Some tasks score fractions, and some groups average tasks of different size: neither can be paired.
        if set(answers) <= {0, 1} and math.isclose(sum(answers), value * len(answers), abs_tol=1e-6):
            correct[metric] = "".join(str(int(answer)) for answer in answers)
    if not metrics:
        raise RecipeError(f"task {task} has neither of {', '.join(METRICS)}: use lm-eval itself")
    digest = hashlib.sha256("".join(sample["doc_hash"] for sample in samples).encode())
    return TaskRecord(task, len(samples), metrics, correct, digest.hexdigest())


@cache
def _manager() -> Any:
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise OptimaError(f"tasks need lm-eval ({error}): pip install 'lm-eval>=0.4.13,<0.5'") from error
    return TaskManager()


def _with_items(name: str, file: Path) -> dict[str, Any]:
    if name not in _manager().all_subtasks:
        raise ValueError("items of a file need a single task")
    task = {
        "task": name,
        "dataset_path": READERS[file.suffix],
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {"test": str(file.resolve())}},
        "test_split": "test",
        **dict.fromkeys(("training_split", "validation_split", "fewshot_split")),
    }
    return {"group": "local", "task": [task]}
