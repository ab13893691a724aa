"""One run from a checkpoint to a sparse checkpoint: every check first, then the pipeline, then the output's name."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from optima.build import build, build_allocation, build_tuning, default_scope
from optima.calibration.capture import capture
from optima.calibration.inputs import Batch, Calibration, given_batches
from optima.calibration.loss_weights import WORDS, LossWeights, NotDifferentiableError, loss_weights
from optima.calibration.streams import Streams
from optima.device import PeakMemory, describe_device, evaluating, find_device, unswitched
from optima.errors import ModelError, RecipeError
from optima.identity import contents, identity
from optima.linalg.statistics import Statistics
from optima.linear import Methods
from optima.models.destination import Destination
from optima.models.files import explain_write_errors, interruptible, sync
from optima.models.journal import Journal
from optima.models.skeleton import skeleton
from optima.models.source import (
    Source,
    commit_of,
    find_source,
    fingerprint,
    load_model,
    load_tokenizer,
    note_of_dtype,
)
from optima.models.stacks import Linear, Stack
from optima.models.writer import Writer, prepare
from optima.pipeline import Dump, Job
from optima.preflight import (
    Preflight,
    batch_size,
    check_dump,
    check_finite,
    chosen_stacks,
    find_calibration,
    preflight,
    sequence_length,
)
from optima.recipe import SINK_WEIGHT, Recipe
from optima.reporting.html import render_html
from optima.reporting.markdown import render_markdown
from optima.reporting.progress import make_progress
from optima.reporting.record import Report, RunRecord, library_versions

DUMP_DIRECTORY = "layers"
GIVEN_NOTE = "the calibration text was given by the caller: the recipe's data set was not read"


def prune(
    model: str | Path | PreTrainedModel,
    recipe: Recipe | None = None,
    *,
    output_dir: str | Path | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    calibration: Tensor | Sequence[str] | Sequence[Mapping[str, Tensor]] | None = None,
    overwrite: bool = False,
    dump_layer: str | None = None,
    resume: bool | None = None,
) -> Report:
    """Prune a model in one shot.

    Args:
        model: a hub id, a local directory, a GGUF file, or a model in memory (pruned in place).
        recipe: what to do; the default prunes 50%, in units of the model's loss.
        output_dir: where the sparse checkpoint, the report and the recipe are written; may be None for a model
            in memory.
        tokenizer: for a model in memory; a path brings its own.
        calibration: documents, or token ids of shape (samples, length), instead of the recipe's dataset. For models
            that read more than text, batches of their processor's outputs: the arguments of a forward pass by name.
        overwrite: replace ``output_dir`` if it holds an earlier output.
        dump_layer: regex; the hessian and dense weight of every linear whose name matches are written to
            ``output_dir/layers``, for benchmarks and research.
        resume: what becomes of the blocks that an unfinished run into ``output_dir`` committed. True: go on behind the
            last of them, to the very bits of a run that was not interrupted; False: delete them; None: say that they
            are there. A model in memory must be given as it was at the start of that run.

    Returns:
        The report: what was lost where.

    Raises:
        OptimaError: for anything that cannot be done, before the long work begins wherever it can be known.
            Nothing is left half-written. What is interrupted after the first block can be resumed; a model in memory
            is left partly pruned.
    """
    started = time.perf_counter()
    calibration = given_batches(calibration) or calibration
    checked = _check(model, recipe, output_dir, calibration, dump_layer)
    recipe, source, found = checked.recipe, checked.source, checked.found
    with ExitStack() as stack:
        stack.enter_context(unswitched())
        destination = None
        if output_dir is not None:
            stack.enter_context(interruptible())
            run = identity(recipe, checked.device, checked.structure, dump_layer)
            destination = stack.enter_context(_claim(checked, output_dir, overwrite, run, resume))
        if source is not None and tokenizer is None:
            tokenizer = load_tokenizer(source)
        text = find_calibration(recipe, tokenizer, calibration)
        text.check(checked.structure)
        network, origin = _network(checked)
        job = Job(checked.methods, found.patterns, checked.device, recipe.damping, recipe.sink_weight or 0.0)
        job.tuning, job.expert_tokens = build_tuning(recipe), recipe.expert_tokens
        job.notes.extend(found.notes)
        if calibration is not None:
            job.notes.append(GIVEN_NOTE)
        if source is None and recipe.dtype not in ("auto", _name(network.dtype)):
            job.notes.append(f"the model was given in {_name(network.dtype)}, and is not {recipe.dtype} as asked")
        job.progress = stack.enter_context(make_progress())
        if destination is not None:
            run |= contents(recipe, network, origin.get("model_fingerprint"), text.hash)
            with explain_write_errors(destination.journal):
                journal = Journal(destination.journal, run)
            prepare(network, tokenizer, source, destination.directory)
            names = [block.name for block in found.blocks]
            job.writer = Writer(network, names, destination.directory, journal)
            job.notes.extend([*destination.notes, *job.writer.notes])
            if dump_layer is not None:
                job.dump = _dump_into(destination.directory / DUMP_DIRECTORY, dump_layer)
        memory = PeakMemory(checked.device)
        assert recipe.batch_size is not None
        _prune_stacks(network, checked, text.batches(recipe.batch_size), job)
        seconds = time.perf_counter() - started + job.resumed_seconds
        report = _report(network, origin, checked, text, job, memory.peak(), seconds)
        if job.writer is not None:
            job.writer.publish(lambda directory: _write_reports(recipe, report, directory))
    return report


@dataclass(frozen=True)
class _Checked:
    """What is known of a run before anything is opened."""

    recipe: Recipe
    methods: Methods
    device: torch.device
    source: Source | None
    structure: PreTrainedModel
    found: Preflight


def _check(model: object, recipe: object, output_dir: object, calibration: object, dump_layer: str | None) -> _Checked:
    recipe = Recipe() if recipe is None else recipe
    if not isinstance(recipe, Recipe):
        raise RecipeError(f"recipe must be a Recipe, got {type(recipe).__name__}: build one, or read it by load_recipe")
    device, methods = find_device(recipe.device), build(recipe)
    length = sequence_length(recipe, calibration)
    if isinstance(model, PreTrainedModel):
        source, structure = None, model
        if any(parameter.is_meta for parameter in model.parameters()):
            raise ModelError("the model has weights that are not in memory (offloaded, or on meta): load it whole")
    elif isinstance(model, str | Path):
        source = find_source(str(model), recipe.trust_remote_code, recipe.revision)
        structure = skeleton(source)[0]
        if output_dir is None:
            raise RecipeError("output_dir is missing: a model that is read from disk must be written somewhere")
    else:
        raise ModelError(f"model must be a path, a hub id or a model of transformers, got {type(model).__name__}")
    recipe = recipe.resolved(scope=default_scope(recipe, methods.selector))
    recipe = replace(recipe, batch_size=batch_size(recipe, device.type == "cpu", length))
    found = preflight(structure, recipe, methods, length)
    if dump_layer is not None:
        check_dump(dump_layer, output_dir is not None, found.linears)
    return _Checked(recipe, methods, device, source, structure, found)


def _claim(
    checked: _Checked, output_dir: str | Path, overwrite: bool, run: dict[str, Any], resume: bool | None
) -> AbstractContextManager[Destination]:
    named = [checked.source and checked.source.local, checked.recipe.mask_from, *checked.recipe.dataset]
    inputs = [path for path in named if path and os.path.lexists(os.path.expanduser(path))]
    num_bytes = sum(p.numel() * p.element_size() for p in checked.structure.parameters())
    return Destination.open(output_dir, overwrite, inputs, num_bytes, run, resume)


def _network(checked: _Checked) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model with its weights, and what the report says of where they are from: read now, for files may go."""
    source = checked.source
    if source is None:
        return checked.structure, {"model": type(checked.structure).__name__}
    network = load_model(source, checked.recipe.dtype)
    revision, weights = commit_of(source), fingerprint(source)
    return network, {"model": source.name, "model_revision": revision, "model_fingerprint": weights}


def _prune_stacks(network: PreTrainedModel, checked: _Checked, batches: Sequence[Batch], job: Job) -> None:
    stacks = chosen_stacks(network, checked.recipe)
    check_finite([linear for stack in stacks for block in stack.blocks for linear in block.linears])
    by_loss = checked.recipe.objective == "loss"
    with evaluating(network):
        for stack in stacks:
            if not stack.needed:
                continue
            with job.clock("forward"):  # the decoder's when its turn comes: it reads what the pruned encoder made
                streams = capture(network, stack, batches, whole=by_loss)
            if by_loss:
                with job.clock("sweep"):
                    job.loss = _loss_weights(network, stack, streams, batches, job, checked.recipe.seed)
            if (allocation := build_allocation(checked.recipe)) is not None:
                checked.found.share(job.survey(stack, streams.copy(), allocation))
            job.prune(stack, streams)


def _loss_weights(
    network: PreTrainedModel, stack: Stack, streams: Streams, batches: Sequence[Batch], job: Job, seed: int
) -> LossWeights | None:
    """What the loss feels of each token and row, or a note and the sink weight where it cannot be known."""
    try:
        found = loss_weights(network, stack, streams, batches, job.device, seed, residual=job.tuning is not None)
    except NotDifferentiableError as error:
        job.sink_weight = SINK_WEIGHT
        job.notes.append(f"objective sink took the place of objective loss, for there are no gradients: {error}")
        return None
    if found.loss != WORDS:
        job.notes.append(f"objective loss is {found.loss}: the model has no head that predicts words")
    return found


def _report(
    network: PreTrainedModel,
    origin: dict[str, Any],
    checked: _Checked,
    text: Calibration,
    job: Job,
    peak_bytes: int,
    seconds: float,
) -> Report:
    source, recipe = checked.source, checked.recipe
    note = None if source is None else note_of_dtype(source, network.dtype)
    run = RunRecord(
        **origin,
        recipe=recipe.to_dict(),
        versions=library_versions(),
        seed=recipe.seed,
        data_hash=text.hash,
        num_tokens=text.num_tokens,
        dataset_revision=text.revision,
        skipped_records=text.skipped,
        device=describe_device(checked.device),
        dtype=", ".join(sorted({_name(p.dtype) for p in network.parameters()})),
        peak_memory_bytes=peak_bytes,
        seconds=seconds,
        stages=job.stages(),
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        notes=(*job.notes, *([note] if note else [])),
    )
    return Report(run, tuple(job.linears), tuple(job.blocks))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _write_reports(recipe: Recipe, report: Report, directory: Path) -> None:
    report.save(directory)
    (directory / "report.html").write_text(render_html({report.run.model: report}), encoding="utf-8")
    (directory / "report.md").write_text(render_markdown(report), encoding="utf-8")
    recipe.save(directory / "recipe.yaml")


def _dump_into(directory: Path, regex: str) -> Dump:
    """Write the hessian and the dense weight of each linear whose name matches."""

    def dump(linear: Linear, statistics: Statistics) -> None:
        if re.search(regex, linear.name):
            tensors = {"hessian": statistics.hessian.matrix_DD, "weight": linear.read()}
            file = directory / f"{linear.name}.safetensors"
            with explain_write_errors(file):
                directory.mkdir(exist_ok=True)
                save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, file)
                sync(file, directory, directory.parent)  # a block that is resumed is not dumped again

    return dump
