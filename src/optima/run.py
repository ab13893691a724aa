"""One run from a checkpoint to a sparse checkpoint: every check first, then the blocks, then the output's name."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Generic

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from optima.calibration.store import make_store
from optima.checkpointing import ENVIRONMENT, Destination, check_alike
from optima.data.calibration import Calibration, add_generated, load_calibration
from optima.data.text import data_hash
from optima.device import (
    PeakMemory,
    default_torch_settings,
    describe_device,
    dtype_name,
    give_back_freed_memory,
    memory_explained,
)
from optima.distributed import Ranks, joined
from optima.errors import RecipeError
from optima.files import stamps
from optima.models.auxiliary import copies_tokenizer, to_save
from optima.models.inspect import check_vocabulary
from optima.models.load import load_tokenizer, weights_of
from optima.models.masks import MaskFiles
from optima.models.save import open_writer, prepare
from optima.patterns import Unstructured
from optima.plan import Plan, Planned, chosen_stacks, load_weights, plan_run, resolve_recipe
from optima.pruning import prune_model
from optima.recipe import Recipe, RunOptions
from optima.reporting.callbacks import Callback, Callbacks, Progress, RunStart, make_progress
from optima.reporting.html import render_html
from optima.reporting.markdown import render_markdown
from optima.reporting.model_card import write_card
from optima.reporting.record import Report, RunRecord, library_versions
from optima.state import RunState
from optima.stopping import interruptible

CALLER_NOTE = "the caller passed the calibration data: the recipe's dataset was not read"
SAVED = ("_name_or_path", "architectures", "dtype", "transformers_version")  # of a configuration, no part of identity


@dataclass
class OpenRun(Generic[Planned]):
    """A run whose inputs are checked and read.

    Attributes:
        plan: what is done.
        network: the model, whose weights ``state`` brings.
        text: the calibration data.
        batches: those of this rank.
        state: settings and records.
        started: when it began, see ``time.perf_counter``.
        report: of the run, once ``publish`` has made it.
    """

    plan: Planned
    network: PreTrainedModel
    text: Calibration
    batches: Sequence[Tensor]
    state: RunState
    started: float
    report: Report | None = None

    def publish(self, applied: RunOptions, smaller: bool = False) -> Report:
        """Make the report, and write the rest of the output.

        Args:
            applied: the options as they were applied.
            smaller: the configuration has changed, see ``Writer.publish``.
        """
        run, ranks, plan = self.state, self.state.ranks, self.plan
        run.note(*(note for notes in ranks.gather(run.store.notes) for note in notes))
        peak = max(*ranks.gather(0 if run.memory is None else run.memory.peak()), run.resumed_peak)
        seconds = time.perf_counter() - self.started + run.resumed_seconds
        report = ranks.on_rank0(lambda: _report(self, applied, peak, seconds))
        if run.writer is not None:
            base = None if plan.source is None else plan.source.repo
            run.writer.publish(lambda directory: _write_reports(applied, report, directory, base), smaller)
        self.report = report
        return report


@contextmanager
def open_run(
    model: object,
    resolve: Callable[..., Planned],
    *,
    output_dir: str | Path | None,
    tokenizer: PreTrainedTokenizerBase | None,
    calibration: Tensor | Iterable[str] | None,
    device: str,
    trust_remote_code: bool,
    callbacks: Sequence[Callback] = (),
    progress: bool = True,
    resume: bool | None = None,
    whole: str | None = None,
) -> Iterator[OpenRun[Planned]]:
    """Open a run: every check first, then the output directory, the text and the weights.

    The output gets its name when the context ends without an error. Arguments: see ``optima.prune``.

    Args:
        resolve: makes the plan, see ``plan_run``.
        whole: why all weights must be in main memory, if they must.
    """
    started = time.perf_counter()
    _check_arguments(output_dir, resume, callbacks)
    with ExitStack() as outer:  # the end is reported only once the output has its name
        with ExitStack() as stack:
            ranks = stack.enter_context(joined())
            stack.enter_context(torch.inference_mode(False))  # the caller's: gradients are taken
            stack.enter_context(default_torch_settings())
            plan = plan_run(model, resolve, output_dir, calibration, ranks, device, trust_remote_code)
            stack.enter_context(memory_explained())
            identified = _identity(plan, ranks, output_dir is not None)
            destination = None
            if output_dir is not None:
                outer.enter_context(interruptible())
                if ranks.first:
                    opened = Destination.open(output_dir, plan.output_bytes, identified, resume)
                    destination = stack.enter_context(opened)
            own_tokenizer = _tokenizer(plan, tokenizer)
            display = make_progress() if progress and ranks.first else Progress()
            display.reading(None if plan.source is None else plan.source.name)
            text = ranks.on_rank0(lambda: load_calibration(plan.options, own_tokenizer, plan.calibration))
            check_vocabulary(plan.model, text.tokens_NL)
            network, weights = load_weights(plan, whole)
            run = RunState(plan.options, plan.device, weights=weights, ranks=ranks)
            run.note(*plan.notes, *weights.notes, *_notes(plan, network))
            if ranks.first:
                run.progress = outer.enter_context(Callbacks([display, *callbacks]))
                run.progress.start(_start(plan))
            run.memory = PeakMemory(plan.device)  # before the model generates text, whole on the device
            if destination is not None:
                prepare(network, to_save(plan.source, tokenizer, own_tokenizer), plan.source, destination.directory)
            text = add_generated(text, network, own_tokenizer, plan.options, plan.device, ranks, run.progress)
            run.note(*text.notes)
            batches = text.tokens_NL[ranks.part(len(text.tokens_NL))].split(plan.batch_size)
            if identified:
                identified["tokens"] = data_hash(text.tokens_NL)
                check_alike(identified, ranks)
            if destination is not None:
                run.writer = open_writer(network, plan.blocks, destination, identified, weights)
                run.note(*destination.notes, *run.writer.notes)
            give_back_freed_memory()
            if ranks.size > 1:
                run.note(f"{ranks.size} processes shared the work: sums, and masks where saliencies tie, may differ")
            run.progress.notes(run.notes)
            run.store = make_store(None if destination is None else destination.partial, ranks)
            opened_run = OpenRun(plan, network, text, batches, run, started)
            yield opened_run
        if opened_run.report is not None:
            run.progress.end(opened_run.report)


def prune(
    model: str | Path | PreTrainedModel,
    recipe: Recipe | None = None,
    *,
    output_dir: str | Path | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    calibration: Tensor | Iterable[str] | None = None,
    device: str = "auto",
    trust_remote_code: bool = False,
    callbacks: Sequence[Callback] = (),
    progress: bool = True,
    resume: bool | None = None,
) -> Report:
    """Prune a model in one shot.

    In processes that torchrun started, all of them must call this, with the same arguments: they share the work, rank 0
    writes, and each returns the report and, of a model in memory, has the result.

    Args:
        model: a hub id (``NAME`` or ``NAME@REVISION``), a local directory, a GGUF file, or a model in memory (pruned in
            place).
        recipe: what to do; the default prunes 50%, with Fisher weights.
        output_dir: where the sparse checkpoint, the report and the recipe are written; may be None for a model
            in memory.
        tokenizer: for a model in memory; a path brings its own.
        calibration: instead of the recipe's dataset: documents, of which as many are read as are needed; or token ids,
            integers of shape (samples, length), all of which are used.
        device: auto, cpu, cuda or cuda:N.
        trust_remote_code: run code that comes with the checkpoint, or that the recipe's selector names.
        callbacks: called for each linear and block, see ``optima.Callback``.
        progress: draw a live line on stderr, or print a line a block where that is no terminal.
        resume: what happens to the blocks that an unfinished run into ``output_dir`` committed. True: continue after
            the last of them, with the bits of an uninterrupted run, on CUDA as far as its kernels are reproducible;
            False: delete them; None: refuse. A model in memory must be as it was at the start of that run.

    Returns:
        The report: what was lost where.

    Raises:
        OptimaError: for anything that cannot be done, before the long work begins wherever possible. Nothing is left
            half-written. A run that is interrupted after the first block can be resumed; a model in memory is left
            partly pruned.
    """
    with open_run(
        model,
        partial(resolve_recipe, recipe=Recipe() if recipe is None else recipe),
        output_dir=output_dir,
        tokenizer=tokenizer,
        calibration=calibration,
        device=device,
        trust_remote_code=trust_remote_code,
        callbacks=callbacks,
        progress=progress,
        resume=resume,
    ) as opened:
        plan = opened.plan
        stacks = chosen_stacks(opened.network, plan.options)
        patterns = prune_model(opened.network, stacks, opened.batches, plan, opened.state)
        scopes = {pattern.scope for pattern in patterns.values() if isinstance(pattern, Unstructured)}
        # A default scope stays open where there were no gradients, so that the recipe gives the same run again.
        by_default = not plan.scope_named and not scopes <= {plan.options.scope}
        report = opened.publish(plan.options.replace(scope=None) if by_default else plan.options)
    return report


def _check_arguments(output_dir: object, resume: bool | None, callbacks: object) -> None:
    if output_dir is None and resume:
        raise RecipeError("resume needs the output_dir of the unfinished run")
    if not isinstance(callbacks, Sequence) or not all(isinstance(each, Callback) for each in callbacks):
        raise RecipeError("callbacks must be a list of optima.Callback objects")


def _tokenizer(plan: Plan, tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase | None:
    """The caller's, or the model's own; not read where it would only be copied: large vocabularies take seconds."""
    source = plan.source
    if tokenizer is not None or source is None or (isinstance(plan.calibration, Tensor) and copies_tokenizer(source)):
        return tokenizer
    return load_tokenizer(source)


def _notes(plan: Plan, network: PreTrainedModel) -> list[str]:
    options, notes, selector = plan.options, [], getattr(plan.options, "selector", "")
    if plan.calibration is not None:
        notes.append(CALLER_NOTE)
    if not isinstance(selector, str):
        notes.append(f"the selector is an object, and recipe.yaml has its class alone: {selector!r}")
    if plan.source is None and options.dtype not in ("auto", dtype_name(network.dtype)):
        notes.append(f"the model is in {dtype_name(network.dtype)}, not {options.dtype} as asked")
    return notes


def _identity(plan: Plan, ranks: Ranks, written: bool) -> dict[str, Any]:
    """What identifies the run, for ``--resume`` and for the other processes; empty if nobody asks."""
    if not written and ranks.size == 1:
        return {}
    config = {key: value for key, value in plan.model.config.to_dict().items() if key not in SAVED}
    weights = hash_tensors(plan.model.state_dict().items()) if plan.source is None else weights_of(plan.source)
    masks_from = getattr(plan.options, "mask_from", None)
    masks = masks_from and stamps({file for file, _ in MaskFiles(masks_from).files.values()})
    found: dict[str, Any] = {
        "recipe": plan.identity,
        "selector": re.sub(r" at 0x[0-9a-f]+", "", repr(getattr(plan.options, "selector", ""))),  # no addresses
        "class": type(plan.model).__name__,
        "configuration": hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest(),
        "weights": weights,
        "masks": masks,
        ENVIRONMENT: {
            "versions": library_versions(),
            "device": describe_device(plan.device),
            "number of processes": ranks.size,
        },
    }
    check_alike(found, ranks)
    return found


def hash_tensors(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 in hex over the name, dtype, shape and bytes of each tensor."""
    found = hashlib.sha256()
    for name, tensor in tensors:
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _start(plan: Plan) -> RunStart:
    return RunStart(
        model=plan.name,
        device=describe_device(plan.device),
        recipe=plan.options.to_dict(),
        blocks=sum(bool(block.linears) for block in plan.blocks),
        linears=len(plan.linears),
        task=plan.task,
        samples=plan.options.samples(),
        length=plan.options.max_seq_length,
    )


def _report(opened: OpenRun[Any], applied: RunOptions, peak: int, seconds: float) -> Report:
    network, plan, text, run = opened.network, opened.plan, opened.text, opened.state
    record = RunRecord(
        model=plan.name,
        model_revision=None if plan.source is None else plan.source.commit,
        processes=run.ranks.size,
        recipe=applied.to_dict(),
        versions=library_versions(),
        seed=plan.options.seed,
        data_hash=data_hash(text.tokens_NL),
        num_tokens=text.tokens_NL.numel(),
        dataset_revision=text.revision,
        calibration_given=plan.calibration is not None,
        selector_is_object=not isinstance(getattr(plan.options, "selector", ""), str),
        weights_left_out=run.weights.left_out,
        device=describe_device(plan.device),
        dtype=", ".join(sorted({dtype_name(p.dtype) for p in network.parameters()})),
        peak_memory_bytes=peak,
        seconds=seconds,
        stages=run.stages(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        notes=tuple(run.notes),
    )
    return Report(record, tuple(run.linears), tuple(run.blocks), tuple(run.units), plan.sizes)


def _write_reports(options: RunOptions, report: Report, directory: Path, base_model: str | None) -> None:
    write_card(directory, report, base_model)
    report.save(directory)
    (directory / "report.html").write_text(render_html(report), encoding="utf-8")
    (directory / "report.md").write_text(render_markdown(report), encoding="utf-8")
    options.save(directory / "recipe.yaml", CALLER_NOTE if report.run.calibration_given else "")
