"""Tokens per second of models that are all in memory. They alternate, so that a slower moment slows all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from transformers import PreTrainedModel

from optima.data.generate import can_continue
from optima.evaluation.record import SpeedRecord
from optima.models.inspect import num_positions
from optima.models.logits import sliceable

PROMPT, NEW = 512, 64  # tokens that are read, and that are generated after them
TURNS = 5  # of each model, after one that does not count


@torch.no_grad()
def measure_speed(models: Sequence[PreTrainedModel]) -> list[SpeedRecord]:
    """Medians over ``TURNS`` turns: tokens per second of a prompt, and of generated tokens, one sequence at a time."""
    places = [positions for model in models if (positions := num_positions(model)) is not None]
    prompt = min([PROMPT, *(each // 2 for each in places)])
    new = min([NEW, *(each // 4 for each in places)])
    turns = [[_turn(model, prompt, new) for model in models] for _ in range(TURNS + 1)][1:]
    found = []
    for own in zip(*turns, strict=True):
        prefill = median(seconds for seconds, _ in own)
        whole = [seconds for _, seconds in own if seconds is not None]
        found.append(SpeedRecord(prompt, new, prompt / prefill, new / (median(whole) - prefill) if whole else None))
    return found


def _turn(model: PreTrainedModel, prompt: int, new: int) -> tuple[float, float | None]:
    """Seconds to read a prompt, and to read it and generate tokens; None for a model that generates none."""
    generator = torch.Generator().manual_seed(0)
    tokens_BL = torch.randint(model.config.get_text_config().vocab_size, (1, prompt), generator=generator)
    tokens_BL = tokens_BL.to(model.device)
    last: dict[str, Any] = {"logits_to_keep": 1} if sliceable(model) else {}
    prefill = _seconds(model, lambda: model(input_ids=tokens_BL, **last))
    if not can_continue(model):
        return prefill, None
    length = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    generate: Any = model.generate
    return prefill, _seconds(model, lambda: generate(tokens_BL, attention_mask=torch.ones_like(tokens_BL), **length))


def _seconds(model: PreTrainedModel, work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter() - started
