"""KL divergence of a model's predictions from a reference model's, token by token (Dutta et al., arXiv 2407.09141).

Shapes: N windows, B windows in a batch, L tokens in each, C consecutive positions (a slice of L), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax
from transformers import PreTrainedModel

from optima.calibration.lm_head import sliced_logits
from optima.device import evaluating
from optima.errors import ModelError
from optima.evaluation.logits import batches, check_causal, predicting
from optima.evaluation.perplexity import check_finite, next_token_losses


class Divergence(NamedTuple):
    """Means over the tokens of each window that have a next one, float64 on the CPU.

    Attributes:
        loss_N: negative log-likelihood under the model, as ``window_losses``.
        kl_N: KL(reference || model), in nats.
        top1_N: fraction of tokens for which both models predict the same next token.
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
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> Divergence:
    """Compare the predictions of two models on one device, with arguments and errors as ``window_losses``.

    Raises:
        ModelError: also if the vocabularies differ in size.
    """
    sums_3N = torch.zeros(3, len(tokens_NL), dtype=torch.float64, device="cpu")
    with torch.no_grad(), evaluating(reference), evaluating(model):
        vocabulary, other = check_causal(reference, tokens_NL), check_causal(model, tokens_NL)
        if vocabulary != other:
            raise ModelError(
                f"KL divergence needs one vocabulary, and these have {vocabulary} and {other} tokens: leave "
                "--divergence out"
            )
        for rows, batch_BL in batches(tokens_NL, batch_size, model.device):
            with sliced_logits(reference, batch_BL) as p_of, sliced_logits(model, batch_BL) as q_of:
                for at_C in predicting(model, batch_BL):
                    p_BCV, q_BCV = p_of(at_C), q_of(at_C)
                    same_BC = p_BCV.argmax(-1) == q_BCV.argmax(-1)
                    sums_3N[0, rows] += next_token_losses(q_BCV, batch_BL[:, at_C + 1])
                    sums_3N[1, rows] += _kl(p_BCV, q_BCV)
                    sums_3N[2, rows] += same_BC.sum(dim=1).cpu()
            check_finite(sums_3N[:, rows].sum(dim=0), rows.start)
            progress(rows.stop, len(tokens_NL))
    return Divergence(*(sums_3N / (tokens_NL.shape[1] - 1)))


def _kl(p_BCV: Tensor, q_BCV: Tensor) -> Tensor:
    """Sum over the positions of each window, (B,), float64 on the CPU."""
    p_BCV, q_BCV = log_softmax(p_BCV.float(), dim=-1), log_softmax(q_BCV.float(), dim=-1)
    kl_BC = kl_div(q_BCV, p_BCV, reduction="none", log_target=True).sum(dim=-1)
    return kl_BC.cpu().double().sum(dim=1)
