"""Evaluate models on the same text and tasks, and compare each with the first. Shapes: N windows, L tokens in each."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from optima.console import pace
from optima.data.datasets import load_documents
from optima.data.text import data_hash
from optima.device import describe_device, dtype_name, find_device, memory_explained
from optima.errors import ModelError, RecipeError
from optima.evaluation.compare import compare, estimate
from optima.evaluation.divergence import divergence as kl_divergence
from optima.evaluation.perplexity import PROTOCOLS, evaluation_windows, window_losses
from optima.evaluation.record import ComparisonRecord, DivergenceRecord, Evaluation, ModelRecord, PerplexityRecord
from optima.evaluation.tasks import BATCH_SIZE, find_items, load_tasks, zero_shot
from optima.models.load import Source, commit_of, find_source, load_model, load_tokenizer, pinned
from optima.reporting.record import library_versions
from optima.stopping import interruptible, stop_if_asked

REMEDY = "lower --batch-size, leave --divergence out (it keeps two models in memory), or use --device cpu"
PROGRESS_SECONDS = 30.0
NO_TEXT = torch.zeros(0, 0, dtype=torch.int64)


class _Subject(NamedTuple):
    """A model to measure, and its windows of text."""

    source: Source
    tokenizer: PreTrainedTokenizerBase
    tokens_NL: Tensor
    dataset_revision: str | None


def evaluate(
    models: str | Sequence[str],
    *,
    dataset: str | Sequence[str] = (),
    split: str = "test",
    protocol: str = "windows",
    max_seq_length: int = 2048,
    max_windows: int | None = None,
    divergence: bool = False,
    tasks: str | Sequence[str] = (),
    task_data: str | None = None,
    task_limit: int | None = None,
    batch_size: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    log: Callable[[str], object] = lambda line: None,
    save: Callable[[Evaluation], object] = lambda found: None,
) -> Evaluation:
    """Measure each model, one after the other, and compare it with the first.

    Args:
        models: hub ids, local directories or GGUF files.
        dataset: text for perplexity: hub ids or local files; empty for none.
        split: of hub datasets.
        protocol: windows or sparsegpt, see ``evaluation_windows``.
        max_seq_length: tokens in a window.
        max_windows: use the first windows only.
        divergence: measure the KL divergence of each model from the first, which stays in memory.
        tasks: tasks, groups or tags of lm-eval.
        task_data: directory with a file of items for each task, see ``load_tasks``; None uses the hub.
        task_limit: use the first items of each task only.
        batch_size: windows (default 1) or choices of a task (default 8) in one forward pass.
        device: auto, cpu, cuda or cuda:N.
        dtype: load the models in this; auto keeps the checkpoint's.
        trust_remote_code: run code that comes with a checkpoint.
        log: called with lines of progress.
        save: called after each model with the results so far.

    Raises:
        OptimaError: for bad input.
    """
    settings = {name: value for name, value in locals().items() if name not in ("log", "save")}
    models, dataset, tasks = ([each] if isinstance(each, str) else list(each) for each in (models, dataset, tasks))
    settings |= {"models": models, "dataset": dataset, "tasks": tasks}
    _check(settings)
    place = find_device(device)
    subjects = list[_Subject]()
    for name in models:
        source = find_source(name, trust_remote_code)
        source = pinned(source)
        tokenizer = load_tokenizer(source)
        tokens_NL, commit = NO_TEXT, None
        if dataset:
            documents = load_documents(dataset, tokenizer, split=split)
            tokens_NL = evaluation_windows(documents, tokenizer, max_seq_length, max_windows, protocol)
            commit = documents.revision
        subjects.append(_Subject(source, tokenizer, tokens_NL, commit))
        if divergence and not torch.equal(tokens_NL, subjects[0].tokens_NL):
            raise ModelError(f"{name} and {models[0]} tokenize the text differently: leave --divergence out")
    items = find_items(tasks, task_data) if task_data else dict.fromkeys(tasks)
    choices = partial(zero_shot, tasks=load_tasks(items), limit=task_limit, batch_size=batch_size or BATCH_SIZE)
    versions = library_versions() | ({"lm_eval": version("lm_eval")} if tasks else {})
    measured: list[tuple[ModelRecord, Tensor]] = []
    reference = None
    with interruptible():
        for subject in subjects:
            log(f"evaluating {subject.source.name} ({len(measured) + 1} of {len(subjects)})")
            with memory_explained(place, REMEDY):
                model = load_model(subject.source, dtype, place)
                model.register_forward_pre_hook(lambda *_: stop_if_asked())
                started = time.perf_counter()
                record, loss_N = _measure_text(model, reference, subject, protocol, batch_size or 1, log)
                answers = choices(model, subject.tokenizer) if tasks else ()
            measured.append((replace(record, tasks=answers, seconds=time.perf_counter() - started), loss_N))
            reference = model if divergence and reference is None else reference
            del model
            found = Evaluation(
                settings=settings,
                versions=versions,
                device=describe_device(place),
                created=datetime.now(UTC).isoformat(timespec="seconds"),
                models=tuple(record for record, _ in measured),
                comparisons=tuple(_compare(measured[0], other) for other in measured[1:]),
            )
            save(found)
    return found


def _check(settings: Mapping[str, Any]) -> None:
    models, dataset = settings["models"], settings["dataset"]
    if not (models and (dataset or settings["tasks"])):
        raise RecipeError("nothing to evaluate: name models, and a text with --dataset or tasks with --tasks")
    if settings["divergence"] and not (dataset and len(models) > 1):
        raise RecipeError("--divergence compares models on a text: name two models or more, and a --dataset")
    if settings["protocol"] not in PROTOCOLS:
        raise RecipeError(f"unknown protocol {settings['protocol']!r}: use one of {', '.join(PROTOCOLS)}")
    for name in ("max_windows", "task_limit", "batch_size"):
        if settings[name] is not None and settings[name] < 1:
            raise RecipeError(f"{name} must be at least 1, got {settings[name]}")


def _measure_text(
    model: PreTrainedModel,
    reference: PreTrainedModel | None,
    subject: _Subject,
    protocol: str,
    batch_size: int,
    log: Callable[[str], object],
) -> tuple[ModelRecord, Tensor]:
    """The record of a model without tasks, and its loss on each window."""
    started = last = time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= PROGRESS_SECONDS:
            last = now
            log(f"window {done}/{total}  {pace(now - started, (now - started) / done * (total - done))}")

    source, tokens_NL = subject.source, subject.tokens_NL
    record = ModelRecord(source.name, commit_of(source), dtype_name(model.dtype), 0.0)
    if not len(tokens_NL):
        return record, torch.zeros(0)
    if reference is None:
        loss_N = window_losses(model, tokens_NL, batch_size=batch_size, progress=progress)
    else:
        apart = kl_divergence(model, reference, tokens_NL, batch_size=batch_size, progress=progress)
        loss_N = apart.loss_N
        record = replace(record, divergence=DivergenceRecord(estimate(apart.kl_N), estimate(apart.top1_N)))
    (num_windows, length), mean = tokens_NL.shape, loss_N.mean().exp().item()
    text = (num_windows, length, data_hash(tokens_NL), subject.dataset_revision)
    return replace(record, perplexity=PerplexityRecord(mean, estimate(loss_N), protocol, *text)), loss_N


def _compare(first: tuple[ModelRecord, Tensor], other: tuple[ModelRecord, Tensor]) -> ComparisonRecord:
    (one, one_N), (two, two_N) = first, other
    texts = [None if each.perplexity is None else each.perplexity.data_hash for each in (one, two)]
    difference = estimate(two_N - one_N) if len(one_N) and texts[0] == texts[1] else None
    paired = (each for a, b in zip(one.tasks, two.tasks, strict=True) for each in compare(a, b))
    return ComparisonRecord(two.model, difference, tuple(paired))
