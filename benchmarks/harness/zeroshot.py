"""Zero-shot accuracy by lm-eval, on tasks whose items are in a local file: nothing is looked up on a hub.

Prompts, choices and metrics are those of lm-eval's own definition of a task; only its data are replaced. The rows of
the file must have the columns of the task's published dataset.

Shapes: B requests in a batch, L tokens in the longest of them, V vocabulary.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import yaml
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from optima.device import evaluating
from optima.errors import CalibrationError, ModelError, OptimaError, RecipeError

METRICS = ("acc", "acc_norm")
BATCH_SIZE = 8
LOGITS_BYTES = 256 * 2**20  # float32 logits of a batch, of which a softmax makes copies: 256 positions of 262k tokens
READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
SPLIT = "test"


def zero_shot(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Mapping[str, str | Path],
    limit: int | None = None,
    batch_size: int = BATCH_SIZE,
) -> dict[str, dict[str, float]]:
    """Accuracy on multiple-choice tasks.

    Args:
        model: a causal language model; runs where it is, in its own dtype, and is left as it was.
        tokenizer: the model's; what it adds to a text (BOS) it adds to every prompt.
        tasks: lm-eval's name of a task (``piqa``, ``arc_easy``) -> .jsonl, .json or .parquet file of its items.
        limit: use the first items only; None uses all.
        batch_size: most choices in one forward pass; fewer where their logits would take over ``LOGITS_BYTES``.

    Returns:
        task -> ``acc`` (the likeliest choice is the right one), ``acc_norm`` (likelihoods per byte of the choice), the
        standard error of each (``acc_stderr``), and ``items``, the number of items; what the task does not define is
        left out.

    Raises:
        OptimaError: if lm-eval is not installed.
        ModelError: if the tokenizer has no token that begins or ends a text (lm-eval needs one).
        RecipeError: if lm-eval has no such task, or one that is not multiple choice.
        CalibrationError: if a file is missing or lacks the columns of its task.
    """
    _check_installed()
    from lm_eval import evaluator

    if limit is not None and limit < 1:
        raise RecipeError(f"the limit of a task must be at least 1, got {limit}: leave it out to use every item")
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise ModelError("the tokenizer names neither a bos_token nor an eos_token: set one in tokenizer_config.json")
    loaded = load_tasks(tasks)
    # lm-eval gives a tokenizer without padding one, and switches the model to evaluation.
    with evaluating(model), _warnings_only_from("lm_eval"):
        language_model = _language_model(model, copy.deepcopy(tokenizer), batch_size)
        results = evaluator.evaluate(language_model, loaded, limit=limit, log_samples=False)
    return {name: _accuracies(results["results"][name], results["n-samples"][name]) for name in tasks}


def load_tasks(tasks: Mapping[str, str | Path]) -> dict[str, Any]:
    """lm-eval's tasks on the items of local files, as its evaluator takes them; a check before long work.

    Raises:
        OptimaError: as ``zero_shot``.
    """
    _check_installed()
    from lm_eval.tasks import TaskManager

    for name, file in tasks.items():
        if not Path(file).is_file():
            raise CalibrationError(f"task {name}: there is no file {file}")
        if Path(file).suffix not in READERS:
            raise CalibrationError(f"task {name}: {file} must be one of {', '.join(READERS)}")
    with _warnings_only_from("lm_eval"):
        manager = TaskManager()
        if unknown := [name for name in tasks if name not in manager.all_subtasks]:
            raise RecipeError(f"lm-eval has no task {unknown[0]}: list them with lm-eval ls tasks")
        return dict(manager.load([_on_file(manager, name, Path(file)) for name, file in tasks.items()]))


def _on_file(manager: Any, name: str, file: Path) -> Any:
    """The task as lm-eval defines it, but for where its items come from."""
    definition = manager.task_index[name].yaml_path
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
    if task.OUTPUT_TYPE != "multiple_choice":
        raise RecipeError(
            f"task {name} is no multiple choice but {task.OUTPUT_TYPE}: only choices can be compared here"
        )
    return task


def _undefined_error() -> type[Exception]:
    from jinja2 import UndefinedError

    return UndefinedError


def _accuracies(results: Mapping[str, Any], samples: Mapping[str, int]) -> dict[str, float]:
    """lm-eval names a number ``metric,filter``."""
    found: dict[str, float] = {"items": samples["effective"]}
    for metric in METRICS:
        for name in (metric, f"{metric}_stderr"):
            # A standard error of a single item is the text "N/A".
            if isinstance(value := results.get(f"{name},none"), float):
                found[name] = value
    return found


def _language_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> Any:
    """The model as lm-eval sees it, with logits of the positions that are scored and no others.

    With a large vocabulary the head costs more than the body, and most positions belong to the prompt.
    """
    from lm_eval.models.huggingface import HFLM

    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, backend="causal")
    positions = LOGITS_BYTES // (4 * int(model.config.get_text_config().vocab_size))

    class LastLogits(HFLM):  # type: ignore[misc]
        scored = 0  # positions, from the end of the padded batch, that hold every continuation of it

        def _loglikelihood_tokens(
            self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **options: Any
        ) -> list[tuple[float, bool]]:
            sizes = [(len(context) + len(continuation) - 1, len(continuation)) for _, context, continuation in requests]
            answers: list[Any] = [None] * len(requests)
            for batch, self.scored in batches(sizes, batch_size, positions):
                found = super()._loglikelihood_tokens([requests[i] for i in batch], disable_tqdm=True, **options)
                for i, answer in zip(batch, found, strict=True):
                    answers[i] = answer
            return answers

        def _model_call(self, inps: Tensor, **options: Any) -> Tensor:
            # Missing positions at the front are understood: lm-eval counts from the end of what it gets.
            with torch.no_grad():
                logits_BLV: Tensor = self.model(inps, logits_to_keep=self.scored).logits
            return logits_BLV

    return LastLogits(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, backend="causal")


def batches(sizes: Sequence[tuple[int, int]], batch_size: int, positions: int) -> Iterator[tuple[list[int], int]]:
    """Requests of similar length together, the longest first, while their scored logits fit.

    Args:
        sizes: of each request, its tokens, and those at its end that are scored.
        batch_size: most requests in a batch.
        positions: most scored positions in a batch of more than one.

    Yields:
        Indices of requests, and how many positions at the end of the padded batch hold all that is scored.
    """
    batch: list[int] = []
    longest = scored = 0
    for i in sorted(range(len(sizes)), key=lambda i: sizes[i][0], reverse=True):
        length, wanted = sizes[i]
        grown = max(scored, longest - length + wanted)
        if batch and (len(batch) == batch_size or (len(batch) + 1) * grown > positions):
            yield batch, scored
            batch = []
        if not batch:
            longest, grown = length, wanted
        batch.append(i)
        scored = grown
    if batch:
        yield batch, scored


def _check_installed() -> None:
    try:
        import lm_eval.models.huggingface  # noqa: F401
    except ImportError as error:
        raise OptimaError(
            f"zero-shot tasks need lm-eval, which cannot be imported ({error}): pip install 'optima-prune[bench]'"
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
