"""Calibration text that the model itself writes: nothing to download, and the distribution that it knows.

Self-generated text calibrates as well as, or better than, samples of the pretraining text (Williams & Aletras, arXiv
2410.17170; Ji et al., arXiv 2410.17711). Words are drawn from the model's own probabilities, as for the labels of the
objective loss. A model with a chat template writes a user's turn and then its answer (Xu et al., arXiv 2406.08464).

Shapes: N sequences, L tokens in each.
"""

from __future__ import annotations

import copy
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from optima.calibration.chats import BAD_CHAT, as_text
from optima.calibration.halving import Halving
from optima.calibration.inputs import Calibration, is_encoder_decoder
from optima.calibration.text import special_tokens, token_ids
from optima.device import evaluating
from optima.errors import CalibrationError
from optima.recipe import Recipe

AT_ONCE = 32  # sequences written together
PLACEHOLDER = "PLACEHOLDER"


@torch.no_grad()
def own_text(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, recipe: Recipe, device: torch.device
) -> Calibration:
    """As many sequences as ``recipe`` asks for, each begun anew and written to its full length, ends of text included.

    Args:
        model: the whole dense model; it runs on ``device``, and is taken back.
        tokenizer: which tells what a text begins with.
        recipe: resolved: its number, length and seed count.
        device: where to write.

    Returns:
        Tokens, with a note if fewer sequences than usual had to be written together, which makes other random text.

    Raises:
        CalibrationError: if the model writes no text, or nothing tells what a text begins with.
        DeviceMemoryError: if the device has no memory for one sequence.
    """
    samples, length = recipe.num_calibration_samples, recipe.max_seq_length
    assert samples is not None, "a run resolves it"
    check_writes(model)
    if tokenizer is None:
        raise CalibrationError("dataset self needs the model's tokenizer: give it, or calibration token ids")
    start = beginning(tokenizer)
    if len(start) >= length:
        raise CalibrationError(
            f"a sequence of {length} tokens has no room for text behind the {len(start)} that a text begins with: "
            "raise --max-seq-length"
        )
    home, settings = next(model.parameters()).device, model.generation_config
    new = length - len(start)
    # No token ends a sequence: behind the end of a text the model goes on, as in packed documents.
    sampling = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=new, pad_token_id=0)
    halving = Halving(device)

    def write(part: slice) -> Tensor:
        begun = torch.tensor([start] * (part.stop - part.start), device=device)
        written = model.generate(  # type: ignore[operator]
            begun, attention_mask=torch.ones_like(begun), generation_config=copy.copy(sampling)
        )
        assert isinstance(written, Tensor)
        return written.cpu()

    with torch.random.fork_rng([device] if device.type == "cuda" else []), evaluating(model):
        torch.manual_seed(recipe.seed)
        model.generation_config = GenerationConfig()  # its own would fill in what is left open here
        try:
            nn.Module.to(model, device)
            counts = [min(AT_ONCE, samples - first) for first in range(0, samples, AT_ONCE)]
            tokens_NL = torch.cat([part for count in counts for part in halving.over(count, write)])
        finally:
            model.generation_config = settings
            nn.Module.to(model, home)
    few = (
        f"out of memory: the model wrote {halving.most} sequences of its text at a time, which makes other random text"
    )
    no_turn = "the chat template tells no beginning of a user's turn: the model's own text begins as plain text does"
    untold = [no_turn] if tokenizer.chat_template and not users_turn(tokenizer) else []
    return Calibration(tokens_NL, notes=(*untold, *([few] if halving.most else [])))


def check_writes(model: PreTrainedModel) -> None:
    """Raise ``CalibrationError`` if the model, or its skeleton, does not go on with a text."""
    if not model.can_generate() or is_encoder_decoder(model):
        raise CalibrationError(
            f"{type(model).__name__} writes no text that goes on from its beginning: name a --dataset other than self"
        )


def users_turn(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens before a user's words in a chat; none if there is no template, or it does not take them."""
    # Templates of models that see take a message in parts.
    contents: tuple[Any, ...] = (PLACEHOLDER, [{"type": "text", "text": PLACEHOLDER}])
    for content in contents if tokenizer.chat_template else ():
        with suppress(*BAD_CHAT):
            before, told, _ = as_text(tokenizer, [{"role": "user", "content": content}]).partition(PLACEHOLDER)
            (ids,) = token_ids([before], tokenizer)
            if told and ids:
                return ids
    return []


def beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that a text begins with: those before a user's words in a chat, or BOS.

    Raises:
        CalibrationError: if there are none.
    """
    found = users_turn(tokenizer) or special_tokens(tokenizer).before
    if not found:
        ends = (tokenizer.bos_token_id, tokenizer.eos_token_id)
        found = [int(token) for token in ends if token is not None][:1]
    if not found:
        raise CalibrationError(
            "the tokenizer has neither a chat template nor a token that begins or ends a text: name a --dataset other "
            "than self"
        )
    return found
