"""How far a pruned model's predictions are from the dense one's, token by token, on held-out text.

KL(p || q) = sum_v p_v (log p_v - log q_v), p the reference's distribution of the next token and q the model's, and how
often both find the same token likeliest. Both notice changes that leave a perplexity or an accuracy as it was (Dutta et
al., "Accuracy is not all you need", arXiv 2407.09141).

Shapes: N windows, B windows in a batch, L tokens in each, C consecutive positions (a slice of L), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax
from transformers import PreTrainedModel

from optima.errors import ModelError
from optima.evaluation.logits import batches, reading
from optima.evaluation.perplexity import check_finite, next_token_losses
from optima.evaluation.watch import silent


@dataclass(frozen=True)
class Divergence:
    """Means over the tokens of each window that have a next one, float64 on the CPU.

    Attributes:
        loss_N: negative log-likelihood under the model, as ``window_losses``.
        kl_N: KL(reference || model), in nats.
        top1_N: share of tokens for which both find the same next token likeliest.
    """

    loss_N: Tensor
    kl_N: Tensor
    top1_N: Tensor


def divergence(
    model: PreTrainedModel,
    reference: PreTrainedModel,
    tokens_NL: Tensor,
    *,
    batch_size: int = 1,
    tell: Callable[[int, int], None] = silent,
) -> Divergence:
    """Compare the predictions of two models on the same tokens, in one pass of each.

    Both models are on one device at once. Of their logits only some positions are (see ``window_losses``).

    Raises:
        ModelError: if the two have vocabularies of different sizes; also as ``window_losses``.
        CalibrationError, NumericalError, RecipeError: as ``window_losses``.
    """
    sums = [torch.zeros(len(tokens_NL), dtype=torch.float64, device="cpu") for _ in range(3)]
    loss_N, kl_N, top1_N = sums
    with reading(reference, tokens_NL) as first, reading(model, tokens_NL) as second:
        check_vocabularies(first.vocabulary, second.vocabulary)
        for rows, batch_BL in batches(tokens_NL, batch_size, first, second):
            with first.read(batch_BL) as wanted, second.read(batch_BL) as found:
                for start, stop in first.slices(batch_BL):
                    p_BCV, q_BCV = wanted(start, stop), found(start, stop)
                    top1_N[rows] += (p_BCV.argmax(-1) == q_BCV.argmax(-1)).sum(dim=1).cpu()
                    loss_N[rows] += next_token_losses(q_BCV, batch_BL[:, start + 1 : stop + 1])
                    kl_N[rows] += _kl(p_BCV, q_BCV)
            check_finite(loss_N[rows], "loss", rows.start)
            check_finite(kl_N[rows], "divergence", rows.start)
            tell(min(rows.stop, len(tokens_NL)), len(tokens_NL))
    return Divergence(*(values_N / (tokens_NL.shape[1] - 1) for values_N in sums))


def check_vocabularies(first: int, second: int) -> None:
    """Raise ``ModelError`` if distributions over so many tokens cannot be compared."""
    if first != second:
        raise ModelError(
            f"vocabularies of {first} and {second} tokens have no divergence: leave --divergence out, or compare "
            "models with the same vocabulary"
        )


def _kl(p_BCV: Tensor, q_BCV: Tensor) -> Tensor:
    """Sum over the positions of each window, (B,), float64 on the CPU."""
    p_BCV, q_BCV = log_softmax(p_BCV.float(), dim=-1), log_softmax(q_BCV.float(), dim=-1)
    kl_BC = kl_div(q_BCV, p_BCV, reduction="none", log_target=True).sum(dim=-1)
    return kl_BC.cpu().double().sum(dim=1)
