"""Evaluate models on the same text and items, and compare each with the first: every check first, then model by model.

Shapes: N windows, L tokens in each.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from optima.data.datasets import Documents, load_documents
from optima.data.text import data_hash
from optima.device import describe_device, dtype_name, find_device, memory_explained
from optima.errors import ModelError
from optima.evaluation.comparison import compare, estimate
from optima.evaluation.divergence import check_vocabularies, divergence
from optima.evaluation.logits import check_kind, check_text
from optima.evaluation.perplexity import evaluation_windows, exponential, window_losses
from optima.evaluation.record import (
    ComparisonRecord,
    DivergenceRecord,
    Evaluation,
    ModelRecord,
    PerplexityRecord,
)
from optima.evaluation.settings import CHOICES, WINDOWS, EvaluationSettings
from optima.evaluation.tasks import Tasks, find_files, load_tasks
from optima.evaluation.watch import Watch
from optima.evaluation.zeroshot import check_tokenizer, zero_shot
from optima.main_memory import available_memory
from optima.memory import GIB
from optima.models.checkpoint import UnstreamableError, open_checkpoint
from optima.models.fingerprint import commit_of, fingerprint
from optima.models.reading import head_of
from optima.models.skeleton import dtype_as_read, skeleton
from optima.models.source import Source, find_source, load_model, load_tokenizer, pinned
from optima.models.stacks import count_parameters
from optima.reporting.record import library_versions

SMALLEST_ITEM = 2  # bytes of a weight
# A whole model is on the device, and with a divergence two.
REMEDY = "lower --batch-size, leave --divergence out, which keeps two models there, or take --device cpu"


_Measured = tuple[ModelRecord, Tensor | None]  # and the loss on each window


@dataclass(frozen=True)
class _Subject:
    """A model that is to be measured, its skeleton at first; ``tokens_NL`` is None where no text is."""

    source: Source
    structure: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    tokens_NL: Tensor | None
    text: Documents | None


def evaluate(
    settings: EvaluationSettings, watch: Watch | None = None, keep: Callable[[Evaluation], object] = lambda found: None
) -> Evaluation:
    """Measure every model.

    One model is in memory at a time; with ``settings.divergence`` the first one stays.

    Args:
        settings: what is measured, and how.
        watch: told how far it is.
        keep: given what was found so far, once each model is measured, and before its tasks: what is next may fail.

    Raises:
        OptimaError: for what cannot be done; before any weights are loaded wherever that can be known.
    """
    device = find_device(settings.device)
    subjects = _subjects(settings)
    tasks = _tasks(settings, subjects)
    _check_models(settings, subjects)
    if device.type == "cpu":
        _check_room(settings, subjects)
    measured = list[_Measured]()
    reference, watch = None, watch or Watch()
    versions = library_versions() | ({"lm_eval": version("lm_eval")} if tasks else {})

    def found_so_far() -> Evaluation:
        return Evaluation(
            settings=settings.to_dict(),
            versions=versions,
            device=describe_device(device),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            models=tuple(record for record, _ in measured),
            comparisons=tuple(_comparison(measured[0], each, settings.seed) for each in measured[1:]),
        )

    for place, subject in enumerate(subjects, 1):
        watch.model(subject.source.name, place, len(subjects), settings.task_names)
        with memory_explained(device, REMEDY):
            model = load_model(subject.source, settings.dtype, device)
            watch.loaded()
            measured.append(_measure(model, reference, subject, settings, watch))
            if tasks is not None:
                if subject.tokens_NL is not None:
                    keep(found_so_far())
                measured[-1] = _with_tasks(model, subject, measured[-1], tasks, settings)
        if place < len(subjects):  # else the caller has it right away
            watch.measured(measured[-1][0])
            keep(found_so_far())
        if settings.divergence and reference is None:
            reference = model
        del model
    return found_so_far()


def _subjects(settings: EvaluationSettings) -> list[_Subject]:
    revisions = [settings.revision, *[None] * (len(settings.models) - 1)]  # the first is what others were made of
    sources = [
        find_source(m, settings.trust_remote_code, each) for m, each in zip(settings.models, revisions, strict=True)
    ]
    subjects = []
    structures = [skeleton(source) for source in sources]
    for source, (structure, config) in zip(sources, structures, strict=True):
        source = pinned(source, config)
        tokenizer = load_tokenizer(source)
        tokens_NL, documents = None, None
        if settings.dataset:
            documents = load_documents(settings.dataset, tokenizer, split=settings.split)
            size = settings.max_seq_length, settings.max_windows
            tokens_NL = evaluation_windows(documents, tokenizer, *size, settings.protocol)
        subjects.append(_Subject(source, structure, tokenizer, tokens_NL, documents))
    if settings.divergence:
        first = subjects[0]
        for other in subjects[1:]:
            assert first.tokens_NL is not None
            assert other.tokens_NL is not None
            if not torch.equal(first.tokens_NL, other.tokens_NL):
                raise ModelError(
                    f"{other.source.name} and {first.source.name} read the text as different tokens: leave "
                    "--divergence out, or compare models with the same tokenizer"
                )
    return subjects


def _check_models(settings: EvaluationSettings, subjects: Sequence[_Subject]) -> None:
    """What can be known without weights: a model that cannot be measured must not cost what was found of others."""
    for subject in subjects:
        check_kind(subject.structure)
        if subject.tokens_NL is not None:
            check_text(subject.structure, subject.tokens_NL)
    if settings.divergence:
        heads = [head_of(subject.structure) for subject in subjects]
        sizes = [head.out_features for head in heads if isinstance(head, nn.Linear)]
        for size in sizes[1:]:
            check_vocabularies(sizes[0], size)
    for subject in subjects[1:]:  # the first is read next
        with suppress(UnstreamableError):
            open_checkpoint(subject.source, subject.structure, settings.dtype)


def _itemsize(structure: PreTrainedModel, dtype: str) -> int:
    """Bytes a weight takes at least; an old configuration may not tell the dtype of its weights."""
    known = dtype != "auto" or structure.config.dtype is not None
    return dtype_as_read(structure.config, dtype).itemsize if known else SMALLEST_ITEM


def _check_room(settings: EvaluationSettings, subjects: Sequence[_Subject]) -> None:
    """Of main memory: whoever takes more than there is would be killed, without a word."""
    sizes = [count_parameters(each.structure) * _itemsize(each.structure, settings.dtype) for each in subjects]
    kept = sizes[0] if settings.divergence else 0  # beside each of the others
    for size, subject in zip(sizes, subjects, strict=True):
        need, free = size + (kept if subject is not subjects[0] else 0), available_memory()
        if need > free:
            raise ModelError(
                f"{subject.source.name} takes {need / GIB:.1f} GiB of main memory, and {free / GIB:.1f} are free: take "
                "--device cuda, --dtype bfloat16 if its weights are float32, or a larger machine; prune and pack need "
                "no more than a block"
            )


def _tasks(settings: EvaluationSettings, subjects: Sequence[_Subject]) -> Tasks | None:
    names = settings.task_names
    if not names:
        return None
    files = dict.fromkeys(names) if settings.task_data is None else find_files(names, settings.task_data)
    for subject in subjects:
        check_tokenizer(subject.tokenizer, subject.source.name)
    return load_tasks(files)


def _measure(
    model: PreTrainedModel,
    reference: PreTrainedModel | None,
    subject: _Subject,
    settings: EvaluationSettings,
    watch: Watch,
) -> _Measured:
    """The record of one model without tasks, and its loss on each window."""
    source = subject.source
    revision, hashed = commit_of(source), fingerprint(source)
    started = time.perf_counter()
    tokens_NL, loss_N, found = subject.tokens_NL, None, None
    if tokens_NL is not None:
        batch_size, tell = settings.batch_size or WINDOWS, watch.windows
        if reference is None:
            loss_N = window_losses(model, tokens_NL, batch_size=batch_size, tell=tell)
        else:
            apart = divergence(model, reference, tokens_NL, batch_size=batch_size, tell=tell)
            loss_N, found = apart.loss_N, DivergenceRecord(estimate(apart.kl_N), estimate(apart.top1_N))
    record = ModelRecord(
        model=source.name,
        revision=revision,
        fingerprint=hashed,
        dtype=dtype_name(model.dtype),
        seconds=time.perf_counter() - started,
        perplexity=None if loss_N is None else _perplexity(subject, loss_N, settings.protocol),
        divergence=found,
    )
    return record, loss_N


def _with_tasks(
    model: PreTrainedModel, subject: _Subject, measured: _Measured, tasks: Tasks, settings: EvaluationSettings
) -> _Measured:
    record, loss_N = measured
    started = time.perf_counter()
    size = settings.batch_size or CHOICES
    answers = zero_shot(model, subject.tokenizer, tasks, limit=settings.task_limit, batch_size=size)
    return replace(record, tasks=answers, seconds=record.seconds + time.perf_counter() - started), loss_N


def _perplexity(subject: _Subject, loss_N: Tensor, protocol: str) -> PerplexityRecord:
    assert subject.tokens_NL is not None
    assert subject.text is not None
    loss, (num_windows, length) = estimate(loss_N), subject.tokens_NL.shape
    text = data_hash(subject.tokens_NL), subject.text.revision
    return PerplexityRecord(exponential(loss.value), loss, protocol, num_windows, length, *text)


def _comparison(reference: _Measured, subject: _Measured, seed: int) -> ComparisonRecord:
    """Of a model with the first one."""
    (first, first_N), (other, other_N) = reference, subject
    difference = None
    if first_N is not None and other_N is not None and _text(first) == _text(other):
        difference = estimate(other_N - first_N)
    pairs = zip(first.tasks, other.tasks, strict=False)  # those of the other may not be measured yet
    paired = tuple(record for one, two in pairs for record in compare(one, two, seed))
    return ComparisonRecord(other.model, difference, paired)


def _text(record: ModelRecord) -> str | None:
    return None if record.perplexity is None else record.perplexity.data_hash
