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

from optima.calibration.text import TextSource, calibration_tokens, data_hash, read_documents
from optima.device import PeakMemory, describe_device, find_device
from optima.errors import CalibrationError, NumericalError, RecipeError
from optima.models.destination import Destination
from optima.models.files import explain_write_errors, interruptible
from optima.models.source import Source, find_source, load_model, load_tokenizer
from optima.models.stacks import Block, Linear, find_blocks
from optima.models.writer import Writer, check_shared, prepare
from optima.pipeline import Commit, Dump, Pruner
from optima.plan import check_model, skeleton, uncovered_notes
from optima.qp import Hessian
from optima.recipe import Recipe, check_regexes
from optima.reporting.markdown import render_markdown
from optima.reporting.progress import make_progress
from optima.reporting.record import LinearRecord, Report, RunRecord, library_versions

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
    recipe = recipe or Recipe()
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
    planned = check_model(structure, recipe, length)
    if dump_layer is not None:
        _check_dump(dump_layer, output_dir, planned)
    with ExitStack() as stack:
        destination = None
        if output_dir is not None:
            num_bytes = sum(p.numel() * p.element_size() for p in structure.parameters())
            stack.enter_context(interruptible())
            inputs = [source.local] if source is not None and source.local is not None else []
            destination = stack.enter_context(Destination.open(output_dir, overwrite, inputs, num_bytes))
        if source is not None and tokenizer is None:
            tokenizer = load_tokenizer(source)
        tokens = find_tokens(recipe, tokenizer, calibration)
        check_vocabulary(tokens, structure)
        network = model if isinstance(model, PreTrainedModel) else _load(source, recipe)
        blocks = check_model(network, recipe, length)
        check_finite(blocks)
        names = [block.name for block in find_blocks(network)]
        check_shared(network, names)
        writer = None if destination is None else _writer(network, names, tokenizer, source, destination)
        dump = None
        if destination is not None and dump_layer is not None:
            dump = _dump_into(destination.directory / DUMP_DIRECTORY, dump_layer)
        memory = PeakMemory(device)
        progress = stack.enter_context(make_progress())
        notes = uncovered_notes(blocks) + ([] if destination is None else destination.notes)
        pruner = Pruner(recipe, device, progress, dump, None if writer is None else _commit_to(writer), notes=notes)
        pruner.run(network.eval(), blocks, tokens.split(recipe.batch_size))
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
        )
        report = Report(run, tuple(pruner.records))
        if writer is not None:
            writer.publish(lambda directory: _write_reports(recipe, report, directory))
    return report


def _load(source: Source | None, recipe: Recipe) -> PreTrainedModel:
    assert source is not None
    return load_model(source, recipe.dtype)


def _writer(
    network: PreTrainedModel,
    names: list[str],
    tokenizer: PreTrainedTokenizerBase | None,
    source: Source | None,
    destination: Destination,
) -> Writer:
    prepare(network, tokenizer, source, destination.directory)
    return Writer(network, names, destination.directory, destination.journal)


def _commit_to(writer: Writer) -> Commit:
    def commit(block: Block, records: Sequence[LinearRecord]) -> None:
        tensors = block.module.state_dict(prefix=f"{block.name}.")
        writer.commit(block.name, tensors, [record.name for record in records])

    return commit


def _write_reports(recipe: Recipe, report: Report, directory: Path) -> None:
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
    if calibration is None:
        calibration = read_documents(text_source(recipe), recipe.seed)
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
    """The recipe's dataset; allenai/c4 is read in English unless the recipe says otherwise."""
    config = recipe.dataset_config
    if config is None and recipe.dataset == ["allenai/c4"]:
        config = "en"
    return TextSource(tuple(recipe.dataset), config, recipe.split, recipe.text_column)


def check_finite(blocks: Sequence[Block]) -> None:
    """Raise ``NumericalError`` naming the first linear whose weight has NaN or Inf."""
    for block in blocks:
        for linear in block.linears:
            if not linear.weight_OD.isfinite().all():
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
            tensors = {"hessian": hessian.matrix_DD, "weight": linear.weight_OD}
            file = directory / f"{linear.name}.safetensors"
            with explain_write_errors(file):
                directory.mkdir(exist_ok=True)
                save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, file)

    return dump
