"""One run from a checkpoint to a sparse checkpoint: every check first, then the pipeline, then the output's name."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from optima.allocate import with_shares
from optima.build import build_tuning, sparsity_of
from optima.calibration.capture import capture
from optima.calibration.fisher import sensitivity_batches
from optima.calibration.lm_head import embedding_device
from optima.checkpointing import Destination, check_alike, identity
from optima.data.batches import Batch, Batches, Calibration
from optima.device import (
    PeakMemory,
    describe_device,
    dtype_name,
    evaluating,
    give_back_freed_memory,
    memory_explained,
    unswitched,
)
from optima.distributed import Ranks, joined
from optima.errors import RecipeError
from optima.files import stamps
from optima.models.blocks import has_experts
from optima.models.companions import copies_tokenizer, to_save
from optima.models.load import load_tokenizer, note_of_dtype, weights_of
from optima.models.masks import MaskFiles
from optima.models.offload import Weights
from optima.models.save import Writer, open_writer, prepare
from optima.patterns import Pattern
from optima.pipeline import Job
from optima.preflight.checks import chosen_stacks
from optima.preflight.opening import (
    Checked,
    check,
    claim,
    generated,
    own_batches,
    read,
    store_of,
)
from optima.recipe import EXPERT_TOKENS, FISHER_FRACTION, SINK_WEIGHT, Recipe
from optima.reporting.callbacks import Callback, Callbacks, Progress, RunStart, make_progress
from optima.reporting.html import render_html
from optima.reporting.markdown import render_markdown
from optima.reporting.model_card import write_card
from optima.reporting.record import Report, RunRecord, library_versions
from optima.sharing import describe
from optima.stopping import interruptible
from optima.weighing import rank_without_loss, sweep


def prune(
    model: str | Path | PreTrainedModel,
    recipe: Recipe | None = None,
    *,
    output_dir: str | Path | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    calibration: Tensor | Iterable[str] | Batches | None = None,
    callbacks: Sequence[Callback] = (),
    progress: bool = True,
    overwrite: bool = False,
    resume: bool | None = None,
) -> Report:
    """Prune a model in one shot.

    In processes that torchrun started, all of them must call this, with the same arguments: they share the work, the
    first writes, and each returns the report and, of a model in memory, has the result.

    Args:
        model: a hub id, a local directory, a GGUF file, or a model in memory (pruned in place).
        recipe: what to do; the default prunes 50%, in units of the model's loss.
        output_dir: where the sparse checkpoint, the report and the recipe are written; may be None for a model
            in memory.
        tokenizer: for a model in memory; a path brings its own.
        calibration: instead of the recipe's dataset: documents; token ids of shape (samples, length); or batches of
            token ids, such as a ``DataLoader`` gives: tensors (batch, length), or dicts that hold them as
            ``input_ids``. At most ``recipe.num_calibration_samples`` sequences are taken of documents and batches.
            Dicts of other things, as the processor of a model that sees or hears returns them, are the arguments of its
            forward pass, and all are taken.
        callbacks: told of each linear and block, see ``optima.Callback``.
        progress: draw a live line on stderr, or print a line a block where that is no terminal.
        overwrite: replace ``output_dir`` if it holds an earlier output.
        resume: what becomes of the blocks that an unfinished run into ``output_dir`` committed. True: go on behind the
            last of them, to the very bits of a run that was not interrupted, on CUDA as far as its kernels are
            reproducible; False: delete them; None: say that they are there. A model in memory must be given as it was
            at the start of that run.

    Returns:
        The report: what was lost where.

    Raises:
        OptimaError: for anything that cannot be done, before the long work begins wherever it can be known.
            Nothing is left half-written. What is interrupted after the first block can be resumed; a model in memory
            is left partly pruned.
    """
    started = time.perf_counter()
    with ExitStack() as told:  # callbacks hear of the end only once the output has its name
        with ExitStack() as stack:
            ranks = stack.enter_context(joined())
            stack.enter_context(unswitched())
            callbacks = _check_arguments(output_dir, resume, tokenizer, callbacks)
            checked = check(model, recipe, output_dir, calibration, ranks)
            recipe, source = checked.recipe, checked.source
            stack.enter_context(memory_explained(checked.device))
            run = _identity(checked, ranks, output_dir is not None)
            destination = None
            if output_dir is not None:
                told.enter_context(interruptible())
                if ranks.first:
                    destination = stack.enter_context(claim(checked, output_dir, overwrite, run, resume))
            reader = _tokenizer(checked, tokenizer)
            shown = make_progress() if progress and ranks.first else Progress()
            shown.reading(None if source is None else source.name)
            network, weights, origin, text = read(checked, reader, ranks)
            assert recipe.batch_size is not None
            origin["processes"] = ranks.size
            job = _job(checked, network, weights, calibration is not None)
            if ranks.first:
                job.progress = told.enter_context(Callbacks([shown, *callbacks]))
                job.progress.start(_start(checked, origin["model"], output_dir))
            job.memory = PeakMemory(checked.device)  # before the model generates text, whole on the device
            if destination is not None:
                prepare(network, to_save(source, tokenizer, reader), source, destination.directory)
            text = generated(checked, network, reader, text, ranks, job.progress)
            job.notes.extend(text.notes)
            batches, alike = own_batches(text, recipe.batch_size, ranks)
            if run:
                run["tokens"] = text.hash
                check_alike(run, ranks)
            if destination is not None:
                _write_into(destination, job, network, checked, run)
            del tokenizer, reader  # of a large vocabulary: 0.2 GB that nothing needs from here on
            give_back_freed_memory()
            if ranks.first:
                dtype = None if alike else network.dtype
                shared = describe(ranks, dtype, job.writer)
                job.notes.extend(_shared(shared, job.writer))
            job.progress.notes(job.notes)
            job.store = store_of(checked, weights, destination, ranks)
            patterns = _prune_stacks(network, checked, batches, job, ranks)
            applied = checked.as_applied(patterns)
            job.notes.extend(dict.fromkeys(note for notes in ranks.gather(job.store.notes) for note in notes))
            seconds = time.perf_counter() - started + job.resumed_seconds
            most = max(*ranks.gather(job.memory.peak()), job.resumed_peak)
            report = ranks.on_rank0(lambda: _report(network, origin, checked, applied, text, job, most, seconds))
            if job.writer is not None:
                base = source.path if source is not None and source.local is None else None
                job.writer.publish(lambda directory: _write_reports(applied, report, directory, base))
        job.progress.end(report)
    return report


def _check_arguments(
    output_dir: str | Path | None,
    resume: bool | None,
    tokenizer: PreTrainedTokenizerBase | None,
    callbacks: Iterable[Callback],
) -> tuple[Callback, ...]:
    """The callbacks; ``RecipeError`` for what would do nothing, or fail once the weights are read."""
    if output_dir is None and resume:
        raise RecipeError("resume goes on with what a run left beside its output_dir: name that")
    if output_dir is not None and not isinstance(output_dir, str | Path):
        raise RecipeError(f"output_dir must be a path, got {type(output_dir).__name__}")
    if tokenizer is not None and not isinstance(tokenizer, PreTrainedTokenizerBase):
        got = repr(str(tokenizer)) if isinstance(tokenizer, str | Path) else type(tokenizer).__name__
        raise RecipeError(f"tokenizer must be one of transformers, got {got}: AutoTokenizer.from_pretrained reads it")
    found: tuple[object, ...] = tuple(callbacks) if isinstance(callbacks, Iterable) else (callbacks,)
    for each in found:
        if not isinstance(each, Callback) or not isinstance(callbacks, Iterable):
            raise RecipeError(f"callbacks must be a list of optima.Callback objects, got {type(each).__name__}")
    return tuple(each for each in found if isinstance(each, Callback))


def _identity(checked: Checked, ranks: Ranks, written: bool) -> dict[str, Any]:
    """What tells this run from others, the same in all processes, else they would not exchange the same.

    Nothing if nobody asks: of one process, unless something is ``written``.
    """
    named = checked.recipe if checked.scope_named else checked.recipe.replace(scope=None)
    if not written and ranks.size == 1:
        return {}
    fields = {name: value for name, value in named.to_dict().items() if name != "device"}
    selector, masks = checked.recipe.selector, checked.recipe.mask_from
    run = identity(
        fields,
        None if isinstance(selector, str) else selector,
        checked.structure,
        None if checked.source is None else weights_of(checked.source),
        None if masks is None else stamps({file for file, _ in MaskFiles(masks).files.values()}),
        {"versions": library_versions(), "device": describe_device(checked.device)},
    )
    check_alike(run, ranks)
    return run


def _tokenizer(checked: Checked, given: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase | None:
    """The caller's, else the model's own, if that is read from disk."""
    if given is not None:
        return given
    # Large vocabularies take seconds; where tokens were given, the file is copied as it is.
    ready, source = isinstance(checked.calibration, Tensor), checked.source
    return None if source is None or (ready and copies_tokenizer(source)) else load_tokenizer(source)


def _shared(text: str, writer: Writer | None) -> list[str]:
    """Notes: ``text`` if there is one, and what earlier runs left, which this one goes on from."""
    if writer is None:
        return [text] if text else []
    if text:
        writer.note(text)
    return writer.notes


def _job(checked: Checked, network: PreTrainedModel, weights: Weights, given: bool) -> Job:
    """What is done, with the notes that can be made beforehand; ``given``: the caller brought the text."""
    recipe, found = checked.recipe, checked.found
    job = Job(
        checked.methods,
        checked.device,
        recipe.damping,
        SINK_WEIGHT if recipe.objective == "sink" else 0.0,
        weights=weights,
        tuning=build_tuning(recipe),
        expert_tokens=EXPERT_TOKENS,
    )
    job.notes.extend([*found.notes, *weights.notes])
    if given:
        job.notes.append("the caller passed the calibration data: the recipe's dataset was not read")
    if checked.source is None and recipe.dtype not in ("auto", dtype_name(network.dtype)):
        job.notes.append(f"the model was given in {dtype_name(network.dtype)}, and is not {recipe.dtype} as asked")
    return job


def _write_into(
    destination: Destination,
    job: Job,
    network: PreTrainedModel,
    checked: Checked,
    run: dict[str, Any],
) -> None:
    """Have ``job`` write what becomes of the blocks, if it goes on with what is there."""
    job.notes.extend(_object_note(checked.recipe, run))
    job.writer = open_writer(network, checked.found.blocks, destination, run, job.weights)
    job.notes.extend(destination.notes)


def _object_note(recipe: Recipe, run: dict[str, Any]) -> list[str]:
    """That a recipe's file does not hold the settings of a selector, and what they are."""
    if isinstance(recipe.selector, str):
        return []
    return [f"the selector is an object, and recipe.yaml has its class alone: {run['selector']}"]


def _prune_stacks(
    network: PreTrainedModel, checked: Checked, batches: Sequence[Batch], job: Job, ranks: Ranks
) -> dict[str, Pattern]:
    """Prune all stacks; the patterns as applied."""
    patterns = checked.found.patterns
    stacks = chosen_stacks(network, checked.recipe)
    by_loss = checked.recipe.objective == "loss"
    with evaluating(network):
        needed = [stack for stack in stacks if stack.needed]
        for stack in stacks:
            if not stack.needed:
                job.earlier += len(stack.blocks)
                continue
            # The decoder's when its turn comes: it reads what the pruned encoder made.
            with job.clock("forward"), job.weights.outside(embedding_device(network, checked.device, batches)):
                acts = capture(network, stack, batches, by_loss, ranks, job.store, job.batch_size)
            job.loss, job.words, job.tuning = None, None, build_tuning(checked.recipe)
            if by_loss:
                told = sweep(job, network, stack, acts, checked.recipe)
                if job.loss is None:
                    patterns, note = rank_without_loss(
                        stack, patterns, checked.recipe, job.methods.selector, checked.scope_named
                    )
                    told += note
                job.notes.extend(dict.fromkeys(filter(None, ranks.gather(told))))
            if checked.recipe.allocation == "loss" and job.loss is not None:
                experts = any(has_experts(block.linears) for block in stack.blocks)
                # Those of the gradient pass, whose tokens' own weights are known, tell linears from each other well.
                taken = sensitivity_batches(acts, FISHER_FRACTION, experts)
                patterns = with_shares(patterns, job.survey(stack, acts, sparsity_of(checked.recipe), taken))
            job.prune(stack, acts, patterns, runs_again=stack is not needed[-1])
    return patterns


def _start(checked: Checked, model: str, output_dir: str | Path | None) -> RunStart:
    samples, length = checked.recipe.num_calibration_samples, checked.recipe.max_seq_length
    assert samples is not None, "a run resolves it"
    return RunStart(
        model=model,
        output_dir=None if output_dir is None else str(output_dir),
        device=describe_device(checked.device),
        recipe=checked.recipe.to_dict(),
        blocks=sum(bool(block.linears) for block in checked.found.blocks),
        linears=len(checked.found.linears),
        samples=samples,
        length=length,
    )


def _report(
    network: PreTrainedModel,
    origin: dict[str, Any],
    checked: Checked,
    applied: Recipe,
    text: Calibration,
    job: Job,
    peak_bytes: int,
    seconds: float,
) -> Report:
    source, recipe = checked.source, checked.recipe
    note = None if source is None else note_of_dtype(source, network.dtype)
    run = RunRecord(
        **origin,
        recipe=applied.to_dict(),
        versions=library_versions(),
        seed=recipe.seed,
        data_hash=text.hash,
        num_tokens=text.num_tokens,
        dataset_revision=text.revision,
        calibration_given=checked.calibration is not None,
        selector_is_object=not isinstance(recipe.selector, str),
        weights_left_out=job.weights.left_out,
        device=describe_device(checked.device),
        dtype=", ".join(sorted({dtype_name(p.dtype) for p in network.parameters()})),
        peak_memory_bytes=peak_bytes,
        seconds=seconds,
        stages=job.stages(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        notes=(*job.notes, *([note] if note else [])),
    )
    return Report(run, tuple(job.linears), tuple(job.blocks))


def _write_reports(recipe: Recipe, report: Report, directory: Path, base_model: str | None) -> None:
    write_card(directory, report, base_model)
    report.save(directory)
    (directory / "report.html").write_text(render_html({report.run.model: report}), encoding="utf-8")
    (directory / "report.md").write_text(render_markdown(report), encoding="utf-8")
    given = "The caller passed the calibration data; the dataset was not read."
    recipe.save(directory / "recipe.yaml", given if report.run.calibration_given else "")
