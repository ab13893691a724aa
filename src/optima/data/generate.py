"""Calibration text that the model itself writes: nothing to download, and the distribution that it knows.

Self-generated text calibrates as well as, or better than, samples of the pretraining text (Williams & Aletras, arXiv
2410.17170; Ji et al., arXiv 2410.17711). Words are drawn from the model's own probabilities, as for the labels of the
objective loss. A model with a chat template writes a user's turn and then its answer (Xu et al., arXiv 2406.08464).

Shapes: N sequences, L tokens in each, B sequences of a batch, C tokens that they begin with, V vocabulary.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from optima.calibration.attention import AttentionOnCPU
from optima.calibration.halving import Halving
from optima.calibration.head import drawn_words, exponentials
from optima.data.batches import Calibration
from optima.data.chats import BAD_CHAT, as_text
from optima.data.text import special_tokens, token_ids
from optima.device import card_memory, describe_memory, evaluating, memory_explained
from optima.distributed import ALONE, Ranks
from optima.errors import OTHER_DTYPE, CalibrationError, DeviceMemoryError, ModelError
from optima.models.files import explain_write_errors, write_whole
from optima.models.journal import check_same
from optima.models.reading import is_encoder_decoder
from optima.models.stacks import count_parameters
from optima.recipe import Recipe

AT_ONCE = 128  # sequences written together: a word of so many takes a GPU hardly longer than one of few
BEGUN = 8  # beside text that was read, one token of so many is its own: it keeps to what that is about
CARD_SHARE = 0.8  # of what a model leaves of a GPU's memory, for keys and values; activations have the rest
PLACEHOLDER = "PLACEHOLDER"
WHOLE_REMEDY = "the whole model must be there to write its own text: else name a --dataset other than self"
TOKENS, NOTES, RUN, DATA = "tokens", "notes", "run", "data"  # in the file of a text that is kept


@torch.no_grad()
def own_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    device: torch.device,
    read: Calibration | None = None,
    room: int | None = None,
    ranks: Ranks = ALONE,
    told: Callable[[float], object] = float,
) -> Calibration:
    """As many sequences as ``recipe`` asks for, each begun anew and written to its full length, ends of text included.

    What was read comes first, and the model goes on from pieces of it (see docs/results.md). Else each begins as a text
    does, or a user's turn.

    Args:
        model: the whole dense model; it runs on ``device``, and is taken back.
        tokenizer: which tells what a text begins with.
        recipe: resolved: its number, length and seed count.
        device: where to write.
        read: what the data sets had, and need not be written; not all that is asked for.
        room: bytes of main memory for keys and values, if it writes there; None: no limit.
        ranks: the processes that write, all of them some; each returns all.
        told: how much of this process's part is written, 0 to 1, at every percent.

    Returns:
        Tokens, with a note of how many were read, and one if fewer sequences than usual had to be written together.

    Raises:
        CalibrationError: if the model writes no text, or nothing tells what a text begins with.
        DeviceMemoryError: if the device has no memory for one sequence.
    """
    check_writes(model)
    known_NL, begun_NC = begin(tokenizer, recipe, read)
    samples, asked, new = len(begun_NC), len(known_NL) + len(begun_NC), recipe.max_seq_length - begun_NC.shape[1]
    home, own = next(model.parameters()).device, model.generation_config
    # No token ends a sequence: behind the end of a text the model goes on, as in packed documents.
    greedy = GenerationConfig(do_sample=False, max_new_tokens=new, pad_token_id=0)
    drawn_NL = torch.rand(samples, new, generator=torch.Generator().manual_seed(recipe.seed))
    halving, together = Halving(device), AT_ONCE
    if (room := _room(model, device, room)) is not None:
        together = max(min(AT_ONCE, room // max(keys_bytes(model, recipe.max_seq_length), 1)), 1)
    # Words may differ with those beside them, where roundings decide: in another number of processes, too.
    together = min(*ranks.gather(together), -(-samples // ranks.size) if ranks.size > 1 else samples)
    firsts = list(range(0, samples, together))[ranks.part(-(-samples // together))]
    drew, words = 0, new * sum(min(together, samples - first) for first in firsts)

    def draw_told(count: int) -> None:
        nonlocal drew
        percent, drew = 100 * drew // words, min(drew + count, words)  # what runs out of memory is written anew
        if 100 * drew // words > percent:
            told(drew / words)

    def write(first: int, part: slice) -> Tensor:
        rows = slice(first + part.start, first + part.stop)
        draw, begun_BC = _Draw(drawn_NL[rows].to(device), draw_told), begun_NC[rows].to(device)
        with AttentionOnCPU() if device.type == "cpu" else nullcontext():  # a mode costs every call
            written = model.generate(  # type: ignore[operator]
                begun_BC,
                attention_mask=torch.ones_like(begun_BC),
                generation_config=copy.copy(greedy),
                logits_processor=LogitsProcessorList([draw]),
            )
        assert isinstance(written, Tensor)
        if not bool(draw.sum_B1.isfinite().all()):
            raise CalibrationError(
                f"the model cannot write its own text, for its logits have NaN or Inf: {OTHER_DTYPE}"
            )
        return written.cpu()

    with evaluating(model):
        model.generation_config = GenerationConfig()  # its own would fill in what is left open here
        try:
            with memory_explained(device, WHOLE_REMEDY):
                nn.Module.to(model, device)
            parts: list[Tensor] = []
            for first in firsts:
                parts += halving.over(min(together, samples - first), partial(write, first))
        finally:
            model.generation_config = own
            nn.Module.to(model, home)
    parts = [part for each in ranks.all_gather(parts) for part in each]
    most = min((each for each in ranks.gather(halving.most) if each is not None), default=None)
    few = (
        f"out of memory: the model wrote {most} sequences of its text at a time, whose words may differ where "
        "roundings decide"
    )
    no_turn = "the chat template tells no beginning of a user's turn: the model's own text begins as plain text does"
    rest = f"the data sets gave text for {len(known_NL)} of {asked} sequences, and the model wrote the other {samples}"
    notes = [rest] if recipe.read else []
    notes += [no_turn] if not len(known_NL) and tokenizer.chat_template and not users_turn(tokenizer) else []
    notes += [few] if most else []
    return replace(read or Calibration(None), tokens_NL=torch.cat([known_NL, *parts]), notes=tuple(notes))


def begin(tokenizer: PreTrainedTokenizerBase, recipe: Recipe, read: Calibration | None = None) -> tuple[Tensor, Tensor]:
    """What was read, (N, L), and what each sequence begins with that is written, (N, C).

    Raises:
        CalibrationError: if nothing tells what a text begins with, or that leaves no room for text.
    """
    asked, length = recipe.num_calibration_samples, recipe.max_seq_length
    assert asked is not None, "a run resolves it"
    known_NL = torch.empty(0, length, dtype=torch.int64) if read is None or read.tokens_NL is None else read.tokens_NL
    begun_NC = _begun(tokenizer, known_NL, asked - len(known_NL), recipe.seed)
    if begun_NC.shape[1] >= length:
        raise CalibrationError(
            f"a sequence of {length} tokens has no room for text behind the {begun_NC.shape[1]} that a text begins "
            "with: raise --max-seq-length"
        )
    return known_NL, begun_NC


@dataclass(frozen=True)
class KeptText:
    """A text that the model wrote, in a ``file``: written anew, one word may be another.

    ``run``: what decides the result, as far as it is known; nobody else's text is this.
    """

    file: Path
    run: Mapping[str, Any]

    def keep(self, text: Calibration, read: Calibration) -> None:
        """Write all of ``text``, with what was ``read``."""
        assert text.tokens_NL is not None, "it was written"
        told = {NOTES: json.dumps(text.notes), RUN: json.dumps({**self.run, DATA: read.hash})}
        with explain_write_errors(self.file):
            write_whole(self.file, save({TOKENS: text.tokens_NL}, told))

    def read(self, read: Calibration) -> Calibration | None:
        """What was kept behind what is ``read`` now; None if nothing was.

        Raises:
            ModelError: if the file cannot be read, or is of another run, or the data sets have other text by now.
        """
        if not self.file.exists():
            return None
        try:
            with safe_open(self.file, framework="pt") as kept:
                told, tokens_NL = kept.metadata(), kept.get_tensor(TOKENS)
        except (OSError, SafetensorError) as error:
            raise ModelError(
                f"{self.file} cannot be read ({error}): delete it, and the text is written anew"
            ) from error
        check_same(json.loads(told[RUN]), {**self.run, DATA: read.hash}, self.file.parent)
        return replace(read, tokens_NL=tokens_NL, notes=tuple(json.loads(told[NOTES])))


def _room(model: PreTrainedModel, device: torch.device, room: int | None) -> int | None:
    """Bytes for keys and values: where too much is found out late, or ends the process. Not of what is free now."""
    if device.type != "cuda":
        return room if device.type == "cpu" else None
    weights = sum(parameter.nbytes for parameter in model.parameters())
    return int(CARD_SHARE * (card_memory(device) - weights))


def keys_bytes(model: PreTrainedModel, tokens: int) -> int:
    """Most of the keys and values of a sequence; 0 for a model without attention.

    By the widest heads that are named: those of some layers (Gemma 4), or keys of two parts (DeepSeek-V3).
    """
    config: Any = model.config.get_text_config()
    layers = getattr(config, "num_hidden_layers", None)
    if not isinstance(layers, int):
        return 0
    # Newer releases refuse to name for all layers what differs among them.
    each = list(config.per_layer_config) if getattr(config, "is_heterogeneous", False) else [config] * layers
    return 2 * sum(map(_key_numbers, each)) * tokens * model.dtype.itemsize


def _key_numbers(config: Any) -> int:
    """Of a layer and a token, in its keys or its values, whichever are more."""
    heads = getattr(config, "num_attention_heads", None)
    if not isinstance(heads, int):
        return 0
    named = [getattr(config, name, None) or 0 for name in ("head_dim", "global_head_dim", "qk_head_dim", "v_head_dim")]
    return (getattr(config, "num_key_value_heads", None) or heads) * (max(named) or int(config.hidden_size) // heads)


class _Draw(LogitsProcessor):
    """Leaves one word of each sequence, drawn by its probability: over 262k words faster than the library's sampling.

    Args:
        drawn_BL: uniform in [0, 1), for each word that is still to be written.
        told: how many words were drawn, whenever some were.

    Attributes:
        sum_B1: of all weights so far, in which NaN and Inf would show.
    """

    def __init__(self, drawn_BL: Tensor, told: Callable[[int], object]) -> None:
        self._drawn, self._told = iter(drawn_BL.unbind(dim=1)), told
        self.sum_B1 = torch.zeros(len(drawn_BL), 1, device=drawn_BL.device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """For logits ``scores``, (B, V), zero for one word and -inf for the others."""
        word_B1, sum_B1 = drawn_words(exponentials(scores), next(self._drawn))
        self.sum_B1 += sum_B1  # not finite from here on, if it is not once
        self._told(len(scores))
        return torch.full_like(scores, -torch.inf).scatter_(1, word_B1, 0.0)


def _begun(tokenizer: PreTrainedTokenizerBase, known_NL: Tensor, samples: int, seed: int) -> Tensor:
    """What each of so many sequences begins with, (samples, C): a piece of those read, if there are any."""
    if not len(known_NL):
        return torch.tensor([beginning(tokenizer)] * samples)
    length, before = known_NL.shape[1], len(special_tokens(tokenizer).before)
    piece = max(length // BEGUN, 1)
    source_NL = known_NL[torch.arange(samples) % len(known_NL)]  # each as often as any other
    first_N1 = torch.randint(before, length - piece + 1, (samples, 1), generator=torch.Generator().manual_seed(seed))
    piece_NC = source_NL.gather(1, first_N1 + torch.arange(piece))
    return torch.cat([source_NL[:, :before], piece_NC], dim=1)


def writes(model: PreTrainedModel) -> bool:
    """Whether the model, or its skeleton, goes on with a text."""
    return model.can_generate() and not is_encoder_decoder(model)


def check_writes(model: PreTrainedModel) -> None:
    """Raise ``CalibrationError`` unless the model ``writes``."""
    if not writes(model):
        raise CalibrationError(
            f"{type(model).__name__} writes no text that goes on from its beginning: name a --dataset other than self, "
            "and no --own-share"
        )


def check_card(model: PreTrainedModel, dtype: torch.dtype, device: torch.device) -> None:
    """Raise ``DeviceMemoryError`` if a card cannot hold the model, or what its skeleton is of; ``dtype``: as read."""
    size = count_parameters(model) * dtype.itemsize
    if device.type == "cuda" and size > card_memory(device):
        whole = f"the model takes {size / 2**30:.1f} GiB"
        raise DeviceMemoryError(f"{describe_memory(device)} is too small: {whole}, and {WHOLE_REMEDY}")


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
    """The tokens that a text begins with: BOS, and those before a user's words in a chat.

    Raises:
        CalibrationError: if there are none.
    """
    turn, before = users_turn(tokenizer), special_tokens(tokenizer).before
    found = turn if turn[: len(before)] == before else before + turn  # as sequences of text that was read begin
    if not found:
        ends = (tokenizer.bos_token_id, tokenizer.eos_token_id)
        found = [int(token) for token in ends if token is not None][:1]
    if not found:
        raise CalibrationError(
            "the tokenizer has neither a chat template nor a token that begins or ends a text: name a --dataset other "
            "than self"
        )
    return found
