"""Self-generated calibration data: the model continues pieces of the calibration text.

Such text calibrates as well as, or better than, more text of the dataset (Williams & Aletras, arXiv 2410.17170; Ji et
al., arXiv 2410.17711). Tokens are sampled from the model's own probabilities, at temperature 1.

Shapes: N sequences, L tokens in each, B sequences of a batch, C tokens of a prompt, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from optima.calibration.batch_size import BatchSize
from optima.device import memory_explained
from optima.distributed import ALONE, Ranks
from optima.errors import OTHER_DTYPE, CalibrationError
from optima.models.forward import evaluating
from optima.models.inspect import is_encoder_decoder
from optima.models.logits import exponentials, sampled_tokens

BATCH = 64  # sequences at a time, for any number of processes: the other sequences of a batch change its rounding
PROMPT_SHARE = 1 / 8  # of a sequence


def can_continue(model: PreTrainedModel) -> bool:
    """Whether the model, or its skeleton, generates continuations of a text."""
    return model.can_generate() and not is_encoder_decoder(model)


@torch.no_grad()
def generate_tokens(
    model: PreTrainedModel,
    read_NL: Tensor,
    count: int,
    num_special: int,
    *,
    seed: int,
    device: torch.device,
    ranks: Ranks = ALONE,
    progress: Callable[[float], object] = float,
) -> Tensor:
    """Generate sequences that continue random pieces of calibration text.

    No token ends a sequence: after an end-of-text token the model goes on, as in packed documents. The random numbers
    of a sequence depend on the seed and its index alone.

    Args:
        model: the dense model, whole. It runs on ``device`` and returns to its own device.
        read_NL: calibration sequences of the dataset, int64.
        count: sequences to generate.
        num_special: special tokens at the beginning of each sequence, such as BOS.
        seed: of the pieces and of the sampling.
        device: where to generate.
        ranks: the processes that share the batches; all of them return all sequences.
        progress: called with the share of this process's tokens that is done.

    Returns:
        tokens_NL: int64 on the CPU, (count, L).

    Raises:
        CalibrationError: if the model does not generate text, its logits have NaN or Inf, or L leaves no room.
        DeviceMemoryError: if the device has no memory for one sequence.
    """
    if not can_continue(model):
        raise CalibrationError(f"{type(model).__name__} does not generate text: use --self-generated 0")
    length = read_NL.shape[1]
    prompt_NC = _prompts(read_NL, count, num_special, seed)
    new = length - prompt_NC.shape[1]
    if new < 1:
        raise CalibrationError(f"sequences of {length} tokens are too short to generate: raise --max-seq-length")
    uniform_NL = torch.rand(count, new, generator=torch.Generator().manual_seed(seed))
    batches = range(0, count, BATCH)
    own = batches[ranks.part(len(batches))]
    steps, done = max(len(own) * new, 1), 0

    def step() -> None:
        nonlocal done
        done = min(done + 1, steps)
        progress(done / steps)

    def generate(first: int, rows: slice) -> Tensor:
        part = slice(first + rows.start, first + rows.stop)
        prompt_BC, sample = prompt_NC[part].to(device), _Sample(uniform_NL[part].to(device), step)
        tokens_BL = model.generate(  # type: ignore[operator]
            prompt_BC,
            attention_mask=torch.ones_like(prompt_BC),
            generation_config=GenerationConfig(do_sample=False, max_new_tokens=new, pad_token_id=0),
            logits_processor=LogitsProcessorList([sample]),
        )
        if not bool(sample.sum_B1.isfinite().all()):
            raise CalibrationError(f"the logits of {type(model).__name__} have NaN or Inf: {OTHER_DTYPE}")
        assert isinstance(tokens_BL, Tensor)
        return tokens_BL.cpu()

    home, own_settings, batch_size = next(model.parameters()).device, model.generation_config, BatchSize(device)
    with evaluating(model):
        # The model's own settings (temperature, top-k, end-of-text) would fill in what is left open.
        model.generation_config = GenerationConfig()
        try:
            with memory_explained("the whole model must fit to generate calibration data: --self-generated 0"):
                nn.Module.to(model, device)
            parts: list[Tensor] = []
            for first in own:
                parts += batch_size.map(min(BATCH, count - first), partial(generate, first))
        finally:
            model.generation_config = own_settings
            nn.Module.to(model, home)
    return torch.cat([tokens_BL for each in ranks.all_gather(parts) for tokens_BL in each])


def _prompts(read_NL: Tensor, count: int, num_special: int, seed: int) -> Tensor:
    """The special tokens and a random piece of a calibration sequence, (count, C); all are used equally often."""
    length = read_NL.shape[1]
    piece = max(int(length * PROMPT_SHARE), 1)
    source_NL = read_NL[torch.arange(count) % len(read_NL)]
    generator = torch.Generator().manual_seed(seed)
    first_N1 = torch.randint(num_special, length - piece + 1, (count, 1), generator=generator)
    return torch.cat([source_NL[:, :num_special], source_NL.gather(1, first_N1 + torch.arange(piece))], dim=1)


class _Sample(LogitsProcessor):
    """Leaves one token of each sequence, sampled by inverse transform: faster than multinomial over 262k tokens.

    ``sum_B1`` adds up all weights, in which NaN and Inf show.
    """

    def __init__(self, uniform_BL: Tensor, step: Callable[[], object]) -> None:
        self._uniform, self._step = iter(uniform_BL.unbind(dim=1)), step
        self.sum_B1 = torch.zeros(len(uniform_BL), 1, device=uniform_BL.device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """For logits ``scores``, (B, V): zero for the sampled token and -inf for the others."""
        token_B1, sum_B1 = sampled_tokens(exponentials(scores), next(self._uniform))
        self.sum_B1 += sum_B1
        self._step()
        return torch.full_like(scores, -torch.inf).scatter_(1, token_B1, 0.0)
