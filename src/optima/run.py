"""One run from a checkpoint to a sparse checkpoint: every check first, then the blocks, then the output's name."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from optima.allocate import with_shares
from optima.calibration.activations import capture
from optima.calibration.fisher import LOGITS, fisher_batches, fisher_weights
from optima.calibration.lm_head import LmHead, outside_device
from optima.calibration.store import Store
from optima.checkpointing import Destination, check_alike, identity
from optima.data.batches import Batches, Calibration
from optima.data.datasets import Documents, load_documents
from optima.data.generate import generate_tokens
from optima.data.text import calibration_tokens, special_tokens
from optima.device import (
    PeakMemory,
    describe_device,
    dtype_name,
    evaluating,
    full_precision,
    give_back_freed_memory,
    memory_explained,
    unswitched,
)
from optima.distributed import Ranks, joined
from optima.errors import CalibrationError, ModelError, NotDifferentiableError, RecipeError
from optima.files import stamps
from optima.main_memory import available_memory, total_memory
from optima.models.auxiliary import copies_tokenizer, to_save
from optima.models.blocks import Stack, count_parameters, is_expert
from optima.models.inputs import Batch
from optima.models.load import commit_of, find_source, load_tokenizer, pinned, skeleton, weights_of
from optima.models.masks import MaskFiles
from optima.models.offload import Resident, Weights, open_weights
from optima.models.save import open_writer, prepare
from optima.patterns import Pattern, Unstructured
from optima.plan import Plan, check_in_memory, chosen_stacks, default_scope, make_tuning, resolve, sparsity_of
from optima.prune import Job
from optima.recipe import FISHER_FRACTION, SINK_WEIGHT, Recipe
from optima.reporting.callbacks import Callback, Callbacks, Progress, RunStart, make_progress
from optima.reporting.html import render_html
from optima.reporting.markdown import render_markdown
from optima.reporting.model_card import write_card
from optima.reporting.record import Report, RunRecord, library_versions
from optima.sharing import describe
from optima.stopping import interruptible

FREE_SHARE = 0.5  # of the main memory that is free, for activations: the rest of them is in files
CACHE_SHARE = 0.125  # of the main memory, for the KV cache while the model generates
MOST_UNEVEN = 1.25  # the largest part of the sequences that a rank takes, relative to equal parts
GIVEN_NOTE = "the caller passed the calibration data: the recipe's dataset was not read"


def prune(
    model: str | Path | PreTrainedModel,
    recipe: Recipe | None = None,
    *,
    output_dir: str | Path | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    calibration: Tensor | Iterable[str] | Batches | None = None,
    device: str = "auto",
    trust_remote_code: bool = False,
    callbacks: Sequence[Callback] = (),
    progress: bool = True,
    overwrite: bool = False,
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
        calibration: instead of the recipe's dataset: documents; token ids of shape (samples, length); or batches of
            token ids, such as a ``DataLoader`` yields: tensors (batch, length), or dicts with them as ``input_ids``.
            At most ``recipe.num_calibration_samples`` sequences of documents and batches are used. Other dicts, as the
            processor of a vision-language model returns them, are arguments of the forward pass, and all are used.
        device: auto, cpu, cuda or cuda:N.
        trust_remote_code: run code that comes with the checkpoint, or that the recipe's selector names.
        callbacks: called for each linear and block, see ``optima.Callback``.
        progress: draw a live line on stderr, or print a line a block where that is no terminal.
        overwrite: replace ``output_dir`` if it holds an earlier output.
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
    started = time.perf_counter()
    with ExitStack() as outer:  # the end is reported only once the output has its name
        with ExitStack() as stack:
            ranks = stack.enter_context(joined())
            stack.enter_context(unswitched())
            callbacks = tuple(callbacks) if isinstance(callbacks, Iterable) else callbacks
            _check_arguments(output_dir, resume, tokenizer, callbacks)
            plan = make_run_plan(model, recipe, output_dir, calibration, ranks, device, trust_remote_code)
            recipe, source = plan.recipe, plan.source
            stack.enter_context(memory_explained(plan.device))
            run = _identity(plan, ranks, output_dir is not None)
            destination = None
            if output_dir is not None:
                outer.enter_context(interruptible())
                if ranks.first:
                    destination = stack.enter_context(claim(plan, output_dir, overwrite, run, resume))
            reader = _tokenizer(plan, tokenizer)
            shown = make_progress() if progress and ranks.first else Progress()
            shown.reading(None if source is None else source.name)
            network, weights, text = read(plan, reader, ranks)
            job = _job(plan, network, weights)
            if ranks.first:
                job.progress = outer.enter_context(Callbacks([shown, *callbacks]))
                job.progress.start(_start(plan, output_dir))
            job.memory = PeakMemory(plan.device)  # before the model generates text, whole on the device
            if destination is not None:
                prepare(network, to_save(source, tokenizer, reader), source, destination.directory)
            text = generated(plan, network, reader, text, ranks, job.progress)
            job.notes.extend(text.notes)
            assert recipe.batch_size is not None
            batches, alike = own_batches(text, recipe.batch_size, ranks)
            if run:
                run["tokens"] = text.hash
                check_alike(run, ranks)
            if destination is not None:
                job.writer = open_writer(network, plan.blocks, destination, run, weights)
                job.notes.extend(destination.notes)
            del tokenizer, reader  # of a large vocabulary: 0.2 GB
            give_back_freed_memory()
            if ranks.first:
                job.notes += _share_notes(job, describe(ranks, None if alike else network.dtype, job.writer))
            job.progress.notes(job.notes)
            job.store = make_store(destination, ranks)
            patterns = _prune_stacks(network, plan, batches, job, ranks)
            applied = _applied(plan, patterns)
            job.notes.extend(dict.fromkeys(note for notes in ranks.gather(job.store.notes) for note in notes))
            seconds = time.perf_counter() - started + job.resumed_seconds
            peak = max(*ranks.gather(job.memory.peak()), job.resumed_peak)
            report = ranks.on_rank0(lambda: _report(network, plan, applied, text, job, peak, seconds, ranks))
            if job.writer is not None:
                base = source.path if source is not None and source.local is None else None
                job.writer.publish(lambda directory: _write_reports(applied, report, directory, base))
        job.progress.end(report)
    return report


def _check_arguments(
    output_dir: str | Path | None,
    resume: bool | None,
    tokenizer: PreTrainedTokenizerBase | None,
    callbacks: object,
) -> None:
    if output_dir is None and resume:
        raise RecipeError("resume needs the output_dir of the unfinished run")
    if output_dir is not None and not isinstance(output_dir, str | Path):
        raise RecipeError(f"output_dir must be a path, got {type(output_dir).__name__}")
    if tokenizer is not None and not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise RecipeError(f"tokenizer must be one of transformers, got {type(tokenizer).__name__}")
    if not isinstance(callbacks, Iterable) or not all(isinstance(each, Callback) for each in callbacks):
        raise RecipeError("callbacks must be a list of optima.Callback objects")


def _tokenizer(plan: Plan, given: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase | None:
    """The caller's, or the model's own; not read where it would only be copied: large vocabularies take seconds."""
    source = plan.source
    if given is not None or source is None or (isinstance(plan.calibration, Tensor) and copies_tokenizer(source)):
        return given
    return load_tokenizer(source)


def _job(plan: Plan, network: PreTrainedModel, weights: Weights) -> Job:
    recipe = plan.recipe
    sink_weight = SINK_WEIGHT if recipe.objective == "sink" else 0.0
    job = Job(plan.methods, plan.device, recipe.damping, sink_weight, weights=weights)
    job.notes += [*plan.notes, *weights.notes]
    if plan.calibration is not None:
        job.notes.append(GIVEN_NOTE)
    if not isinstance(recipe.selector, str):
        job.notes.append(f"the selector is an object, and recipe.yaml has its class alone: {recipe.selector!r}")
    if plan.source is None and recipe.dtype not in ("auto", dtype_name(network.dtype)):
        job.notes.append(f"the model is in {dtype_name(network.dtype)}, not {recipe.dtype} as asked")
    return job


def _share_notes(job: Job, text: str) -> list[str]:
    """What is said of the processes of this run and of earlier ones that it continues."""
    if job.writer is None:
        return [text] if text else []
    if text:
        job.writer.note(text)
    return job.writer.notes


def make_run_plan(
    model: object,
    recipe: object,
    output_dir: object,
    calibration: object,
    ranks: Ranks,
    device: str = "auto",
    trust_remote_code: bool = False,
) -> Plan:
    """Make every check that needs neither weights nor text; arguments as of ``prune``."""
    recipe = Recipe() if recipe is None else recipe
    if not isinstance(recipe, Recipe):
        raise RecipeError(f"recipe must be a Recipe, got {type(recipe).__name__}: build one, or use load_recipe")
    where = ranks.on(device)
    if isinstance(model, PreTrainedModel):
        check_in_memory(model)
        plan = resolve(model, recipe, where, None, calibration, trust_remote_code)
    elif isinstance(model, str | Path):
        source = find_source(str(model), trust_remote_code)
        structure = skeleton(source)
        if output_dir is None:
            raise RecipeError("output_dir is missing: a model that is read from disk must be written somewhere")
        plan = resolve(structure, recipe, where, pinned(source), calibration, trust_remote_code)
    else:
        raise ModelError(f"model must be a path, a hub id or a model of transformers, got {type(model).__name__}")
    check_shared(plan.recipe.num_calibration_samples, ranks)
    return plan


def check_shared(count: int | None, ranks: Ranks) -> None:
    """Raise ``RecipeError`` unless each process has one of ``count`` sequences."""
    if count is not None and count < ranks.size:
        raise RecipeError(
            f"{ranks.size} processes share {count} calibration sequences: start {count} at most, or raise "
            "--num-calibration-samples"
        )


def _identity(plan: Plan, ranks: Ranks, written: bool) -> dict[str, Any]:
    """What identifies the run, for ``--resume`` and for the other processes; empty if nobody asks."""
    if not written and ranks.size == 1:
        return {}
    recipe = plan.recipe if plan.scope_named else plan.recipe.replace(scope=None)
    selector, masks = recipe.selector, recipe.mask_from
    run = identity(
        recipe.to_dict(),
        None if isinstance(selector, str) else selector,
        plan.model,
        None if plan.source is None else weights_of(plan.source),
        None if masks is None else stamps({file for file, _ in MaskFiles(masks).files.values()}),
        {"versions": library_versions(), "device": describe_device(plan.device)},
    )
    check_alike(run, ranks)
    return run


def claim(
    plan: Plan, output_dir: str | Path, overwrite: bool, run: dict[str, Any], resume: bool | None
) -> AbstractContextManager[Destination]:
    """The output's place; arguments as of ``Destination.open``."""
    named = [plan.source and plan.source.local, plan.recipe.mask_from, *plan.recipe.dataset]
    inputs = [path for path in named if path and os.path.lexists(os.path.expanduser(path))]
    num_bytes = count_parameters(plan.model) * plan.dtype.itemsize
    return Destination.open(output_dir, overwrite, inputs, num_bytes, run, resume)


def make_store(destination: Destination | None, ranks: Ranks) -> Store:
    """For activations, with half of the free memory; its files are in the staging directory if it is here."""
    directory = ranks.on_rank0(lambda: None if destination is None else destination.partial)
    budget = int(FREE_SHARE * available_memory() / ranks.here())
    return Store(budget, directory if directory is not None and directory.is_dir() else None)


def read(
    plan: Plan, tokenizer: PreTrainedTokenizerBase | None, ranks: Ranks, whole: str | None = None
) -> tuple[PreTrainedModel, Weights, Calibration]:
    """The model, its weights, and the calibration data of the dataset or the caller.

    ``whole``: why the weights must be in main memory, if they must.
    """
    text = ranks.on_rank0(lambda: find_calibration(plan.recipe, tokenizer, plan.calibration))
    text.check(plan.model)
    if plan.source is None:
        return plan.model, Resident(plan.model), text
    if plan.recipe.self_generated:
        whole = whole or "it generates calibration data"
    return *open_weights(plan.source, plan.model, plan.recipe.dtype, whole), text


def find_calibration(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase | None, given: Tensor | Calibration | Iterable[Any] | None
) -> Calibration:
    """The calibration data: of the caller, or of the resolved recipe's datasets, without what the model generates.

    Raises:
        CalibrationError: if there is no text, too little of it, or no tokenizer to read it with.
    """
    if isinstance(given, Tensor):
        return Calibration(given.cpu().long())
    if isinstance(given, Calibration):
        return given
    if tokenizer is None:
        raise CalibrationError("a model in memory needs its tokenizer, or calibration token ids as a tensor")
    documents = load_documents(recipe.dataset, tokenizer, seed=recipe.seed) if given is None else given
    samples = recipe.num_calibration_samples
    assert samples is not None, "a run resolves it"
    if recipe.self_generated:
        samples -= min(max(int(recipe.self_generated * samples), 1), samples - 1)
    tokens_NL = calibration_tokens(documents, tokenizer, samples, recipe.max_seq_length)
    return Calibration(tokens_NL, revision=documents.revision if isinstance(documents, Documents) else None)


def generated(
    plan: Plan,
    network: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    text: Calibration,
    ranks: Ranks,
    progress: Callbacks,
) -> Calibration:
    """``text``, and the sequences that the model generates."""
    recipe, read_NL = plan.recipe, text.tokens_NL
    if not recipe.self_generated:
        return text
    assert tokenizer is not None
    assert read_NL is not None
    assert recipe.num_calibration_samples is not None
    count = recipe.num_calibration_samples - len(read_NL)
    progress.stage("generate", count)
    tokens_NL = generate_tokens(
        network,
        read_NL,
        count,
        len(special_tokens(tokenizer).before),
        seed=recipe.seed,
        device=plan.device,
        memory=int(CACHE_SHARE * total_memory() / ranks.here()) if plan.device.type == "cpu" else None,
        ranks=ranks,
        progress=progress.progress,
    )
    note = f"self-generated calibration data: {count} of {recipe.num_calibration_samples} sequences"
    return replace(text, tokens_NL=torch.cat([read_NL, tokens_NL]), notes=(*text.notes, note))


def own_batches(text: Calibration, batch_size: int, ranks: Ranks) -> tuple[Sequence[Batch], bool]:
    """The batches of this process, and whether they are those of one process that has them all.

    They are, unless that leaves too much to one of them.
    """
    tokens_NL, batches = text.tokens_NL, text.batches(batch_size)
    count = len(batches) if tokens_NL is None else len(tokens_NL)
    check_shared(count, ranks)
    if tokens_NL is None:
        return batches[ranks.part(count)], True
    most, fair = -(-len(batches) // ranks.size) * batch_size, -(-count // ranks.size)
    if len(batches) >= ranks.size and most <= MOST_UNEVEN * fair:
        return batches[ranks.part(len(batches))], True
    return tokens_NL[ranks.part(count)].split(batch_size), False


def _prune_stacks(
    network: PreTrainedModel, plan: Plan, batches: Sequence[Batch], job: Job, ranks: Ranks
) -> dict[str, Pattern]:
    """Prune all stacks; the patterns as applied."""
    recipe, patterns = plan.recipe, plan.patterns
    stacks = chosen_stacks(network, recipe)
    needed = [stack for stack in stacks if stack.needed]
    with evaluating(network):
        for stack in stacks:
            if not stack.needed:
                job.earlier += len(stack.blocks)
                continue
            # A decoder reads what the pruned encoder made.
            with job.clock("forward"), job.weights.outside(outside_device(network, plan.device, batches)):
                acts = capture(network, stack, batches, recipe.objective == "loss", ranks, job.store, job.batch_size)
            job.loss, job.lm_head, job.tuning = None, None, make_tuning(recipe)
            if recipe.objective == "loss":
                note = find_fisher_weights(job, network, stack, acts, recipe)
                if job.loss is None:
                    patterns, ranked = _rank_without_loss(stack, patterns, plan)
                    note += ranked
                job.notes.extend(dict.fromkeys(filter(None, ranks.gather(note))))
            if recipe.allocation == "loss" and job.loss is not None:
                experts = any(is_expert(linear) for block in stack.blocks for linear in block.linears)
                # The sequences of the gradient pass, whose tokens have weights of their own.
                batches_of_pass = fisher_batches(acts, 1.0 if experts else FISHER_FRACTION)
                shares = job.sensitivity(stack, acts, sparsity_of(recipe), batches_of_pass)
                patterns = with_shares(patterns, shares)
            job.prune(stack, acts, patterns, runs_again=stack is not needed[-1])
    return patterns


def find_fisher_weights(job: Job, network: PreTrainedModel, stack: Stack, acts: Any, recipe: Recipe) -> str:
    """Give ``job`` the Fisher weights of ``stack``, or the sink weight if there are no gradients; returns a note."""
    job.progress.stage("gradients", len(stack.blocks))
    try:
        with job.clock("gradients"), full_precision():
            job.loss = fisher_weights(
                network,
                stack,
                acts,
                recipe.seed,
                residual=job.tuning is not None,
                weights=job.weights,
                share=FISHER_FRACTION,
                progress=job.progress.progress,
                coupled="coupling" in job.methods.needs,
            )
    except NotDifferentiableError as error:
        job.sink_weight = SINK_WEIGHT
        part = "" if stack.part == "whole" else f" in the {stack.part}"
        untuned, job.tuning = "" if job.tuning is None else ", and blocks are not tuned", None
        return f"objective sink replaces objective loss{part}{untuned}, because there are no gradients: {error}"
    if job.loss.loss == LOGITS:
        # In an encoder-decoder a call of the LM head would run the other stack.
        job.lm_head = LmHead(network, stack, job.weights) if stack.part == "whole" else None
        return ""
    return f"objective loss is {job.loss.loss}: the model has no LM head"


def _rank_without_loss(stack: Stack, patterns: Mapping[str, Pattern], plan: Plan) -> tuple[dict[str, Pattern], str]:
    """Patterns by which weights of ``stack`` compete as with objective sink, and a note for the report.

    With Fisher weights rows compete. Without, rows of little energy would be starved.
    """
    found, text, scope = dict(patterns), "", default_scope("sink", plan.methods.selector)
    if not plan.scope_named and plan.recipe.scope not in (None, scope):  # None: external masks, taken as they are
        names = [linear.name for block in stack.blocks for linear in block.linears]
        ranked = {name: each for name in names if isinstance(each := patterns.get(name), Unstructured)}
        found |= {name: replace(pattern, scope=scope) for name, pattern in ranked.items()}
        text += f"; weights are ranked by {scope}" if ranked else ""
    return found, text + ("; all linears have the same sparsity" if plan.recipe.allocation == "loss" else "")


def _applied(plan: Plan, patterns: Mapping[str, Pattern]) -> Recipe:
    """The recipe that gives the same run again: an open scope stays open if there were no Fisher weights."""
    ranked = {each.scope for each in patterns.values() if isinstance(each, Unstructured)}
    own = plan.scope_named or plan.recipe.scope is None or ranked <= {plan.recipe.scope}
    return plan.recipe if own else plan.recipe.replace(scope=None)


def _name(plan: Plan) -> str:
    return type(plan.model).__name__ if plan.source is None else plan.source.name


def _start(plan: Plan, output_dir: str | Path | None) -> RunStart:
    assert plan.recipe.num_calibration_samples is not None, "a run resolves it"
    return RunStart(
        model=_name(plan),
        output_dir=None if output_dir is None else str(output_dir),
        device=describe_device(plan.device),
        recipe=plan.recipe.to_dict(),
        blocks=sum(bool(block.linears) for block in plan.blocks),
        linears=len(plan.linears),
        samples=plan.recipe.num_calibration_samples,
        length=plan.recipe.max_seq_length,
    )


def _report(
    network: PreTrainedModel,
    plan: Plan,
    applied: Recipe,
    text: Calibration,
    job: Job,
    peak_bytes: int,
    seconds: float,
    ranks: Ranks,
) -> Report:
    run = RunRecord(
        model=_name(plan),
        model_revision=None if plan.source is None else commit_of(plan.source),
        processes=ranks.size,
        recipe=applied.to_dict(),
        versions=library_versions(),
        seed=plan.recipe.seed,
        data_hash=text.hash,
        num_tokens=text.num_tokens,
        dataset_revision=text.revision,
        calibration_given=plan.calibration is not None,
        selector_is_object=not isinstance(plan.recipe.selector, str),
        weights_left_out=job.weights.left_out,
        device=describe_device(plan.device),
        dtype=", ".join(sorted({dtype_name(p.dtype) for p in network.parameters()})),
        peak_memory_bytes=peak_bytes,
        seconds=seconds,
        stages=job.stages(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        notes=tuple(job.notes),
    )
    return Report(run, tuple(job.linears), tuple(job.blocks))


def _write_reports(recipe: Recipe, report: Report, directory: Path, base_model: str | None) -> None:
    write_card(directory, report, base_model)
    report.save(directory)
    (directory / "report.html").write_text(render_html({report.run.model: report}), encoding="utf-8")
    (directory / "report.md").write_text(render_markdown(report), encoding="utf-8")
    recipe.save(directory / "recipe.yaml", GIVEN_NOTE if report.run.calibration_given else "")


# Importing the module ``optima.prune`` binds its name in the package, where users expect this function.
setattr(sys.modules["optima"], "prune", prune)  # noqa: B010
