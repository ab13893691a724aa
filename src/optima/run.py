"""One run from a checkpoint to a sparse checkpoint: every check first, then the pipeline, then the atomic write."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from datetime import datetime, timezone
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from optima.build import resolved
from optima.calibration.text import TextSource, calibration_tokens, data_hash, read_documents
from optima.device import PeakMemory, describe_device, evaluating, find_device
from optima.errors import CalibrationError, NumericalError, RecipeError
from optima.models.checkpoint import explain_write_errors, output_directory, write_checkpoint
from optima.models.skeleton import skeleton
from optima.models.source import Source, find_source, load_model, load_tokenizer
from optima.models.stacks import Block, Linear, dense_notes
from optima.pipeline import Dump, Pruner
from optima.plan import check_model
from optima.qp import Hessian
from optima.recipe import Recipe, check_regexes
from optima.reporting.markdown import render_markdown
from optima.reporting.progress import make_progress
from optima.reporting.record import Report, RunRecord, library_versions

DUMP_DIRECTORY = "layers"


def prune(
    model: str | Path | PreTrainedModel,
    recipe: Recipe | None = None,
    *,
    output_dir: str | Path | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    calibration: Tensor | Sequence[str] | None = None,
    overwrite: bool = False,
    dump_layer: str | None = None,
) -> Report:
    """Prune a model in one shot.

    Args:
        model: a hub id, a local directory, a GGUF file, or a model in memory (pruned in place).
        recipe: what to do; the default prunes 50% with Wanda's mask and re-solves the weights.
        output_dir: where the sparse checkpoint, the report and the recipe are written; may be None for a model
            in memory.
        tokenizer: for a model in memory; a path brings its own.
        calibration: documents, or token ids of shape (samples, length), instead of the recipe's dataset.
        overwrite: replace ``output_dir`` if it exists.
        dump_layer: regex; the Hessian and dense weight of every linear whose name matches are written to
            ``output_dir/layers``, for benchmarks and research.

    Returns:
        The report: what was lost where.

    Raises:
        OptimaError: for anything that cannot be done, before the long work begins wherever it can be known.
            Nothing is left half-written; a model in memory is left partly pruned if the run is interrupted.
    """
    started = time.perf_counter()
    recipe = resolved(recipe or Recipe())
    device = find_device(recipe.device)
    source: Source | None = None
    structure: nn.Module
    if isinstance(model, PreTrainedModel):
        structure = model
    else:
        source = find_source(str(model), recipe.trust_remote_code)
        structure = skeleton(source)[0]
        if output_dir is None:
            raise RecipeError("output_dir is missing: a model that is read from disk must be written somewhere")
    length = calibration.shape[-1] if isinstance(calibration, Tensor) else recipe.max_seq_length
    planned = [block for stack in check_model(structure, recipe, length) for block in stack.blocks]
    if dump_layer is not None:
        _check_dump(dump_layer, output_dir, planned)
    with ExitStack() as stack:
        directory = None
        if output_dir is not None:
            num_bytes = sum(p.numel() * p.element_size() for p in structure.parameters())
            directory = stack.enter_context(output_directory(Path(output_dir), overwrite, num_bytes))
        if source is not None and tokenizer is None:
            tokenizer = load_tokenizer(source)
        documents = read_documents(text_source(recipe), recipe.seed) if calibration is None else None
        tokens = find_tokens(recipe, tokenizer, documents if documents is not None else calibration)
        check_vocabulary(tokens, structure)
        network = model if isinstance(model, PreTrainedModel) else _load(source, recipe)
        stacks = check_model(network, recipe, length)
        check_finite([block for stack in stacks for block in stack.blocks])
        memory = PeakMemory(device)
        dump = None if directory is None or dump_layer is None else _dump_into(directory / DUMP_DIRECTORY, dump_layer)
        progress = stack.enter_context(make_progress())
        pruner = Pruner(recipe, device, progress, dump, notes=dense_notes(stacks))
        with evaluating(network):
            pruner.run(network, stacks, tokens.split(recipe.batch_size))
        run = RunRecord(
            model=source.name if source else type(network).__name__,
            recipe=recipe.to_dict(),
            versions=library_versions(),
            seed=recipe.seed,
            data_hash=data_hash(tokens),
            num_tokens=tokens.numel(),
            device=describe_device(device),
            dtype=str(network.dtype).removeprefix("torch."),
            peak_memory_bytes=memory.peak(),
            seconds=time.perf_counter() - started,
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            notes=tuple(pruner.notes),
            dataset_revision=documents.revision if documents else None,
            skipped_records=documents.skipped if documents else 0,
        )
        report = Report(run, tuple(pruner.records))
        if directory is not None:
            with explain_write_errors(Path(str(output_dir))):
                _write(network, tokenizer, source, recipe, report, directory)
    return report


def _load(source: Source | None, recipe: Recipe) -> PreTrainedModel:
    assert source is not None
    return load_model(source, recipe.dtype)


def _write(
    network: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    source: Source | None,
    recipe: Recipe,
    report: Report,
    directory: Path,
) -> None:
    write_checkpoint(network, tokenizer, source, directory)
    report.save(directory)
    (directory / "report.md").write_text(render_markdown(report), encoding="utf-8")
    recipe.save(directory / "recipe.yaml")


def find_tokens(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase | None, calibration: Tensor | Iterable[str] | None
) -> Tensor:
    """Calibration token ids, (samples, length) int64.

    Raises:
        CalibrationError: if there is no text, too little of it, or no tokenizer to read it with.
    """
    if isinstance(calibration, Tensor):
        if calibration.ndim != 2 or calibration.is_floating_point() or not calibration.numel():
            raise CalibrationError(
                f"calibration must be token ids of shape (samples, length), got {tuple(calibration.shape)} "
                f"{calibration.dtype}"
            )
        return calibration.cpu().long()
    if tokenizer is None:
        raise CalibrationError("a model in memory needs its tokenizer, or calibration token ids")
    assert calibration is not None
    return calibration_tokens(calibration, tokenizer, recipe.num_calibration_samples, recipe.max_seq_length)


def check_vocabulary(tokens: Tensor, model: nn.Module) -> None:
    """Raise ``CalibrationError`` if ``tokens`` hold an id that ``model`` (or its skeleton) has no embedding for."""
    assert isinstance(model, PreTrainedModel)
    embedding_VE = model.get_input_embeddings().weight
    assert isinstance(embedding_VE, Tensor)
    vocabulary = embedding_VE.shape[0]
    lowest, largest = int(tokens.min()), int(tokens.max())
    if lowest < 0 or largest >= vocabulary:
        raise CalibrationError(
            f"the calibration tokens run from {lowest} to {largest}, but the model has a vocabulary of {vocabulary}: "
            "use the tokenizer that was published with the model"
        )


def text_source(recipe: Recipe) -> TextSource:
    """The resolved recipe's dataset."""
    return TextSource(
        tuple(recipe.dataset), recipe.dataset_config, recipe.split, recipe.text_column, recipe.dataset_revision
    )


def check_finite(blocks: Sequence[Block]) -> None:
    """Raise ``NumericalError`` naming the first linear whose weight has NaN or Inf."""
    for block in blocks:
        for linear in block.linears:
            if not linear.read().isfinite().all():
                raise NumericalError(
                    f"the weight of {linear.name} contains NaN or Inf: repair the checkpoint, or leave the linear out "
                    f"with --ignore '{re.escape(linear.name)}'"
                )


def _check_dump(regex: str, output_dir: str | Path | None, blocks: Sequence[Block]) -> None:
    """Raise ``RecipeError`` if there is nowhere to dump to, or nothing to dump."""
    check_regexes("dump_layer", [regex])
    if output_dir is None:
        raise RecipeError("dump_layer needs an output_dir to write to")
    if not any(re.search(regex, linear.name) for block in blocks for linear in block.linears):
        raise RecipeError(
            f"dump_layer {regex!r} matches none of the linears to prune: list them with optima plan, "
            f"the first is {next(linear.name for block in blocks for linear in block.linears)}"
        )


def _dump_into(directory: Path, regex: str) -> Dump:
    """Write the Hessian and the dense weight of each linear whose name matches."""

    def dump(linear: Linear, hessian: Hessian) -> None:
        if re.search(regex, linear.name):
            tensors = {"hessian": hessian.matrix_DD, "weight": linear.read()}
            file = directory / f"{linear.name}.safetensors"
            with explain_write_errors(file):
                directory.mkdir(exist_ok=True)
                save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, file)

    return dump
