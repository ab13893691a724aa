"""Evaluate models on the same text and tasks, and compare each with the first. Shapes: N windows, L tokens in each."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from optima.data.datasets import load_documents
from optima.data.text import data_hash
from optima.device import describe_device, dtype_name, find_device, memory_explained
from optima.errors import ModelError, RecipeError
from optima.evaluation.compare import compare, estimate
from optima.evaluation.perplexity import PROTOCOLS, evaluation_windows, measure_windows
from optima.evaluation.record import ComparisonRecord, DivergenceRecord, Evaluation, ModelRecord, PerplexityRecord
from optima.evaluation.speed import measure_speed
from optima.evaluation.tasks import BATCH_SIZE, find_items, load_tasks, zero_shot
from optima.models.load import Source, find_source, load_model, load_tokenizer
from optima.reporting.record import library_versions
from optima.stopping import interruptible, stop_if_asked

REMEDY = "lower --batch-size, leave --divergence out (it keeps two models in memory), or use --device cpu"


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
    speed: bool = False,
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
        speed: measure tokens per second, with all models in memory and in turn.
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
    _check(**settings)
    place = find_device(device)
    subjects: list[tuple[Source, PreTrainedTokenizerBase, Tensor, str | None]] = []
    for name in models:
        source = find_source(name, trust_remote_code)
        tokenizer = load_tokenizer(source)
        tokens_NL, revision = torch.zeros(0, 0, dtype=torch.int64), None
        if dataset:
            documents = load_documents(dataset, tokenizer, split=split)
            tokens_NL = evaluation_windows(documents, tokenizer, max_seq_length, max_windows, protocol)
            revision = documents.revision
        subjects.append((source, tokenizer, tokens_NL, revision))
        if divergence and not torch.equal(tokens_NL, subjects[0][2]):
            raise ModelError(f"{name} and {models[0]} tokenize the text differently: leave --divergence out")
    loaded = load_tasks(find_items(tasks, task_data) if task_data else dict.fromkeys(tasks))
    versions = library_versions() | ({"lm_eval": version("lm_eval")} if tasks else {})
    measured: list[tuple[ModelRecord, Tensor]] = []
    reference: PreTrainedModel | None = None
    with interruptible():
        for source, tokenizer, tokens_NL, revision in subjects:
            log(f"evaluating {source.name} ({len(measured) + 1} of {len(subjects)})")
            with memory_explained(REMEDY):
                model = load_model(source, dtype, place)
                model.register_forward_pre_hook(lambda *_: stop_if_asked())
                started, loss_N = time.perf_counter(), torch.zeros(0)
                record = ModelRecord(source.name, source.commit, dtype_name(model.dtype), 0.0)
                if dataset:
                    means = measure_windows(model, tokens_NL, reference, batch_size=batch_size or 1, log=log)
                    loss_N, (num_windows, length) = means.loss_N, tokens_NL.shape
                    text = PerplexityRecord(
                        perplexity=loss_N.mean().exp().item(),
                        loss=estimate(loss_N),
                        protocol=protocol,
                        windows=num_windows,
                        length=length,
                        data_hash=data_hash(tokens_NL),
                        dataset_revision=revision,
                    )
                    record = replace(record, perplexity=text)
                    if reference is not None:
                        apart = DivergenceRecord(estimate(means.kl_N), estimate(means.top1_N))
                        record = replace(record, divergence=apart)
                if tasks:
                    answers = zero_shot(model, tokenizer, loaded, limit=task_limit, batch_size=batch_size or BATCH_SIZE)
                    record = replace(record, tasks=answers)
            measured.append((replace(record, seconds=time.perf_counter() - started), loss_N))
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
        if speed:
            with memory_explained("leave --speed out (it keeps all models in memory)"):
                speeds = measure_speed([load_model(source, dtype, place) for source, *_ in subjects])
            records = zip(found.models, speeds, strict=True)
            found = replace(found, models=tuple(replace(record, speed=each) for record, each in records))
            save(found)
    return found


def _check(
    models: Sequence[str], dataset: Sequence[str], tasks: Sequence[str], divergence: bool, protocol: str, **others: Any
) -> None:
    if not (models and (dataset or tasks or others["speed"])):
        raise RecipeError("nothing to evaluate: name models, and a text with --dataset, tasks with --tasks, or --speed")
    if divergence and not (dataset and len(models) > 1):
        raise RecipeError("--divergence compares models on a text: name two models or more, and a --dataset")
    if protocol not in PROTOCOLS:
        raise RecipeError(f"unknown protocol {protocol!r}: use one of {', '.join(PROTOCOLS)}")
    for name in ("max_windows", "task_limit", "batch_size"):
        if others[name] is not None and others[name] < 1:
            raise RecipeError(f"{name} must be at least 1, got {others[name]}")


def _compare(first: tuple[ModelRecord, Tensor], other: tuple[ModelRecord, Tensor]) -> ComparisonRecord:
    (one, one_N), (two, two_N) = first, other
    same = one.perplexity and two.perplexity and one.perplexity.data_hash == two.perplexity.data_hash
    paired = (each for a, b in zip(one.tasks, two.tasks, strict=True) for each in compare(a, b))
    return ComparisonRecord(two.model, estimate(two_N - one_N) if same else None, tuple(paired))
