"""What a run will take on this machine, seconds and memory, from a rehearsal of a few seconds.

What a rehearsal cannot know is in the notes: text and weights that would have to be downloaded, above all.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from optima.device import evaluating, find_device, memory_explained, unswitched
from optima.models.checkpoint import open_checkpoint
from optima.models.random_weights import alike, fill
from optima.models.source import Source, load_tokenizer
from optima.models.stacks import Block
from optima.options import is_file
from optima.plan import Measured, Plan
from optima.preflight.opening import find_calibration
from optima.rehearsal.stages import Peak, Rehearsal


def measure(plan: Plan, source: Source) -> Measured:
    """Rehearse the run that was planned. The plan's model is given random weights for it.

    Raises:
        OptimaError: if the tokenizer or a file of text cannot be read.
    """
    device = find_device(plan.recipe.device)
    notes: list[str] = []
    started = time.perf_counter()
    tokens_NL = _text(plan, source, notes)
    ready = plan.seconds + time.perf_counter() - started
    opening, reading = _reading(plan, source, notes)
    if "gradient" in plan.methods.needs:
        notes.append("the time in which the selector's gradients are taken is not counted")
    structures = alike(plan.found.blocks)
    fill(plan.model, structures, plan.dtype)
    held = sum(parameter.nbytes for parameter in plan.model.parameters())
    peak = Peak(device, held, plan.left_bytes)
    rehearsal = Rehearsal(plan, device, tokens_NL, peak)
    with memory_explained(device), unswitched(), evaluating(plan.model):
        for stack in plan.found.stacks:
            if stack.needed:
                rehearsal.stack(stack)
    writing = _writing_seconds(structures[0][0]) * plan.model_bytes
    seconds = {"start": ready + opening, "read": reading, **rehearsal.seconds, "write": writing}
    return Measured(seconds, peak.num_bytes, (*notes, *rehearsal.notes))


def _text(plan: Plan, source: Source, notes: list[str]) -> Tensor:
    """The calibration tokens of local files; random ones for text that is not here. A run's tokenizer is loaded."""
    recipe = plan.recipe
    samples, length = recipe.num_calibration_samples, recipe.max_seq_length
    assert samples is not None
    read_NL = torch.empty(0, length, dtype=torch.int64)
    if not all(map(is_file, recipe.dataset)):
        notes.append(f"the time to read {', '.join(recipe.dataset)} is not counted")
    else:
        found_NL = find_calibration(recipe, load_tokenizer(source), None).tokens_NL
        assert found_NL is not None
        read_NL = found_NL
    if recipe.self_generated:
        notes.append("the time of self_generated is not counted")
    vocabulary = int(plan.model.config.get_text_config().vocab_size)
    size = (samples - len(read_NL), length)
    return torch.cat([read_NL, torch.randint(vocabulary, size, generator=torch.Generator().manual_seed(recipe.seed))])


def _reading(plan: Plan, source: Source, notes: list[str]) -> tuple[float, float]:
    """Seconds to open the checkpoint, and to read its weights as often as a run does, by those of one block."""
    if source.local is None or not plan.streamed:
        what = "load the whole model" if source.local else "download weights and read them"
        notes.append(f"the time to {what} is not counted")
        return 0.0, 0.0
    started = time.perf_counter()
    checkpoint = open_checkpoint(source, plan.model, plan.recipe.dtype)
    opened, each = time.perf_counter(), 0.0
    for block in plan.found.blocks[:2]:  # the first time the library gets ready
        begun = time.perf_counter()
        checkpoint.read([name for name in checkpoint.names if name.startswith(f"{block.name}.")])
        each = (time.perf_counter() - begun) / plan.held_bytes(block)
    return opened - started, each * plan.model_bytes * plan.reads


def _writing_seconds(block: Block) -> float:
    """To write and hash a byte, by those of a block, among the temporary files."""
    state = {name: tensor.detach().clone() for name, tensor in block.module.state_dict().items()}  # none of them shared
    with tempfile.TemporaryDirectory() as place:
        started, file = time.perf_counter(), Path(place, "block.safetensors")
        save_file(state, file)
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            hashlib.file_digest(opened, "sha256")
        return (time.perf_counter() - started) / file.stat().st_size
