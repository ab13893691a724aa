"""lm-eval's multiple-choice tasks with their items: of the hub, or of local files, which are looked at whole.

Prompts, choices and metrics are those of lm-eval's own definition of a task; a local file only replaces its data, and
must have the columns of the task's published dataset.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from datasets.exceptions import DatasetsError
from jinja2 import UndefinedError

from optima.errors import CalibrationError, OptimaError, RecipeError
from optima.models.failures import HUB_FAILURES
from optima.models.files import usable_path
from optima.values import shown

READ_ERRORS: tuple[type[Exception], ...] = (*HUB_FAILURES, ValueError, TypeError, RuntimeError, ImportError)

METRICS = ("acc", "acc_norm")
READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
SPLIT = "test"
# What its templates raise of a damaged one.
BAD_ITEM = (KeyError, TypeError, ValueError, IndexError, AttributeError, UndefinedError)


@dataclass(frozen=True)
class Tasks:
    """Tasks that are loaded, items and all.

    Attributes:
        names: as asked for, with the tasks that each stands for: itself, or those of a group.
        loaded: as lm-eval's evaluator takes them.
    """

    names: dict[str, tuple[str, ...]]
    loaded: dict[str, Any]


def find_files(names: Sequence[str], directory: str | Path) -> dict[str, Path]:
    """The file of items of each task: ``piqa.jsonl``, ``piqa_validation.jsonl``, ``piqa-test.parquet``, ...

    Raises:
        CalibrationError: if a task has no file there, or more than one.
    """
    place = usable_path(directory, "--task-data", "name the directory that holds the tasks' items")
    if not place.is_dir():
        raise CalibrationError(f"--task-data {place} is no directory: name the one that holds the tasks' items")
    files: dict[str, Path] = {}
    for name in names:
        starts = (f"{name}_", f"{name}-", f"{name}.")
        found = sorted(p for p in place.iterdir() if p.suffix in READERS and f"{p.stem}.".startswith(starts))
        # arc_easy_test is no file of a task arc, where arc_easy is asked for too
        longer = tuple(other for other in names if other != name and other.startswith(name))
        found = [file for file in found if not (longer and file.stem.startswith(longer))]
        if len(found) != 1:
            what = ", ".join(file.name for file in found) or "no file"
            raise CalibrationError(
                f"task {name} has {what} in {place}: keep one file of its items there, called {name}_SPLIT.jsonl "
                f"(or {', '.join(list(READERS)[1:])}), or name the tasks of a group"
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
        CalibrationError: if a file cannot be read, or has an item that is none of its task; if the hub cannot be read.
    """
    _check_installed()
    with quiet_lm_eval():
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
        if (file := tasks[name]) is not None:
            _check_items(name, part, Path(file))
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
        otherwise = "" if name in manager.all_groups else ", or give them as a file in --task-data"
        raise CalibrationError(
            f"the items of task {name} cannot be read from the hub ({error}): check the network{otherwise}"
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
    except (DatasetsError, StopIteration, OSError) as error:
        text = " ".join(str(error).split()) or "it is empty"
        raise CalibrationError(f"the items of task {name} in {file} cannot be read ({text}): copy it anew") from error
    except (*BAD_ITEM, ImportError) as error:
        raise CalibrationError(
            f"{file} does not hold items of {name} with the columns of its published dataset "
            f"({type(error).__name__}: {error})"
        ) from error
    return task


def _check_items(name: str, part: Mapping[str, Any], file: Path) -> None:
    """What lm-eval would make of each item: one that is damaged must not cost the work on all others."""
    for task in part["tasks"].values():
        if callable(task.config.process_results):
            continue  # which finds the right answer in its own way
        for number, item in enumerate(task.eval_docs, 1):
            try:
                prompt, choices, right = task.doc_to_text(item), task.doc_to_choice(item), task.doc_to_target(item)
            except BAD_ITEM as error:
                told = f"{type(error).__name__}: {error}"
            else:
                told = _wrong(choices, prompt if task.multiple_input else right)
            if told:
                raise CalibrationError(f"item {number} of {file} is none of task {name} ({told}): correct or remove it")


def _wrong(choices: Sequence[str], right: object) -> str:
    """Why no choice is right; empty if one is, or some are."""
    answers = right if isinstance(right, list) else [right]
    known = [answer in choices if isinstance(answer, str) else answer in range(len(choices)) for answer in answers]
    return "" if known and all(known) else f"its answer is {shown(right)}, of {len(choices)} choices"


def _check_installed() -> None:
    try:
        import lm_eval.models.huggingface  # noqa: F401
    except ImportError as error:
        raise OptimaError(
            f"tasks need lm-eval, which cannot be imported ({error}): pip install 'lm-eval>=0.4.13,<0.5'"
        ) from error


@contextmanager
def quiet_lm_eval() -> Iterator[None]:
    """It warns of every choice that is made here on purpose."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
