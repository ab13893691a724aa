"""Divergence against its plain definition in float64, on tiny random models."""

import copy

import pytest
import torch
import transformers as hf
from test_perplexity import CAUSAL, V, build, llama, plain_perplexity, windows
from torch import Tensor
from transformers import PreTrainedModel

from optima.calibration import lm_head
from optima.errors import ModelError, NumericalError
from optima.evaluation.divergence import divergence


def changed(model: PreTrainedModel) -> PreTrainedModel:
    """A copy with other weights."""
    torch.manual_seed(7)
    model = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


@torch.no_grad()
def plain(model: PreTrainedModel, reference: PreTrainedModel, tokens_NL: Tensor) -> tuple[Tensor, Tensor]:
    """KL and agreement of each window."""
    p_NLV, q_NLV = (each(tokens_NL).logits[:, :-1].double().softmax(-1) for each in (reference, model))
    kl_NL = (p_NLV * (p_NLV / q_NLV).log()).sum(-1)
    return kl_NL.mean(1), (p_NLV.argmax(-1) == q_NLV.argmax(-1)).double().mean(1)


@pytest.mark.parametrize("name", ["llama", "gemma2-softcapping", "gpt2"])
@pytest.mark.parametrize("positions", [3, 1000])
def test_equals_the_plain_definition(name: str, positions: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm_head, "LOGITS_BYTES", 4 * V * positions)
    reference = build(CAUSAL[name])
    model = changed(reference)
    found = divergence(model, reference, windows(), batch_size=2)
    kl_N, top1_N = plain(model, reference, windows())
    torch.testing.assert_close(found.kl_N, kl_N, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.top1_N, top1_N)
    assert found.kl_N.min() > 0.001
    assert found.loss_N.mean().exp().item() == pytest.approx(plain_perplexity(model, windows()), rel=1e-5)


def test_a_model_does_not_differ_from_itself() -> None:
    found = divergence(llama(), llama(), windows())
    assert found.kl_N.abs().max() < 1e-9
    assert found.top1_N.tolist() == [1.0] * 5


def test_one_whole_and_one_sliced_model() -> None:
    """A model whose logits cannot be split goes with one whose can."""

    class MixesPositions(hf.LlamaForCausalLM):
        def forward(self, input_ids, **kwargs):
            output = super().forward(input_ids, **kwargs)
            output.logits = output.logits + output.logits.cumsum(1)
            return output

    model = build(lambda: MixesPositions(llama().config))
    found = divergence(model, llama(), windows(), batch_size=2)
    torch.testing.assert_close(found.kl_N, plain(model, llama(), windows())[0], rtol=1e-4, atol=1e-6)


def test_other_vocabulary() -> None:
    larger = llama().config.to_dict() | {"vocab_size": V + 3}
    with pytest.raises(ModelError, match=rf"{V} and {V + 3} tokens"):
        divergence(build(lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**larger))), llama(), windows())


def test_nan_names_the_window() -> None:
    model = llama()
    model.lm_head.weight.data.fill_(torch.nan)
    with pytest.raises(NumericalError, match="window 0"):
        divergence(model, llama(), windows())
