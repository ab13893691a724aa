"""Perplexity and KL divergence against their plain definitions, on tiny random models of several structures."""

import copy
import math
from collections.abc import Callable, Iterator

import pytest
import torch
import transformers as hf
from closeness import assert_close_in_norm
from tiny import LINES, make_tokenizer
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers.models import WordLevel
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from optima.errors import CalibrationError, ModelError, NumericalError
from optima.evaluation.perplexity import evaluation_windows, measure_windows, perplexity

V = 61
SIZES = {"vocab_size": V, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
ROPE = {**SIZES, "num_key_value_heads": 1, "max_position_embeddings": 48}
GPT2 = {"vocab_size": V, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 48}
OPT = {"vocab_size": V, "hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
SEQ2SEQ = {"vocab_size": V, "d_model": 16, "num_layers": 1, "num_heads": 2, "d_kv": 8, "d_ff": 24}


class MixesPositions(hf.LlamaForCausalLM):
    """Its logits cannot be sliced."""

    def forward(self, input_ids, **kwargs):
        output = super().forward(input_ids, **kwargs)
        output.logits = output.logits + output.logits.cumsum(1)
        return output


CAUSAL: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**ROPE)),
    "gemma2-softcapping": lambda: hf.Gemma2ForCausalLM(
        hf.Gemma2Config(**ROPE, head_dim=8, sliding_window=4, final_logit_softcapping=0.5)
    ),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2)),
    "opt-word-embed-proj": lambda: hf.OPTForCausalLM(hf.OPTConfig(**OPT, word_embed_proj_dim=8)),
    "mamba-no-attention": lambda: hf.MambaForCausalLM(
        hf.MambaConfig(vocab_size=V, hidden_size=16, num_hidden_layers=2, state_size=4)
    ),
    "bert-decoder-head-transform": lambda: hf.BertLMHeadModel(hf.BertConfig(**SIZES, is_decoder=True)),
    "not-sliceable": lambda: MixesPositions(hf.LlamaConfig(**ROPE)),
}
NOT_CAUSAL: dict[str, tuple[Callable[[], PreTrainedModel], str]] = {
    "headless": (lambda: hf.LlamaModel(hf.LlamaConfig(**ROPE)), "no logits"),
    "classifier": (lambda: hf.BertForTokenClassification(hf.BertConfig(**SIZES)), "no logits over its vocabulary"),
    "masked": (lambda: hf.BertForMaskedLM(hf.BertConfig(**SIZES)), "later tokens"),
    "encoder-decoder": (lambda: hf.T5ForConditionalGeneration(hf.T5Config(**SEQ2SEQ)), "encoder-decoder"),
}


def build(make: Callable[[], PreTrainedModel], seed: int = 0) -> PreTrainedModel:
    """A random model whose logits differ enough from uniform for an error to show."""
    torch.manual_seed(seed)
    model = make().eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def llama(dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return build(CAUSAL["llama"]).to(dtype)


def windows(num_windows: int = 5, length: int = 23) -> Tensor:
    return torch.randint(V, (num_windows, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def plain_losses(model: PreTrainedModel, tokens_NL: Tensor) -> Tensor:
    """Mean of each window."""
    logits_NLV = model(tokens_NL).logits.double()
    return cross_entropy(logits_NLV[:, :-1].transpose(1, 2), tokens_NL[:, 1:], reduction="none").mean(1)


@pytest.mark.parametrize("name", list(CAUSAL))
def test_losses_equal_the_plain_definition(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optima.models.logits.LOGITS_BYTES", 4 * V * 3)
    model = build(CAUSAL[name])
    found = measure_windows(model, windows(), batch_size=2)
    assert_close_in_norm(found.loss_N.float(), plain_losses(model, windows()))
    assert perplexity(model, windows()) == pytest.approx(found.loss_N.mean().exp().item(), rel=1e-3)


@pytest.mark.parametrize("name", ["llama", "gemma2-softcapping", "not-sliceable"])
@torch.no_grad()
def test_divergence_equals_the_plain_definition(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optima.models.logits.LOGITS_BYTES", 4 * V * 3)
    model = build(CAUSAL[name])
    reference = build(lambda: copy.deepcopy(model), seed=7) if name != "not-sliceable" else llama()
    found = measure_windows(model, windows(), reference, batch_size=2)
    p_NLV, q_NLV = (each(windows()).logits[:, :-1].double().softmax(-1) for each in (reference, model))
    kl_N = (p_NLV * (p_NLV / q_NLV).log()).sum(-1).mean(1)
    assert_close_in_norm(found.kl_N.float(), kl_N, 2.0**10)  # a difference of logarithms
    top1_N = (p_NLV.argmax(-1) == q_NLV.argmax(-1)).double().mean(1)
    assert float((found.top1_N - top1_N).abs().sum()) < 1.5 / 22, "at most one token of two that are as likely"
    assert found.kl_N.min() > 0.001
    assert_close_in_norm(found.loss_N.float(), plain_losses(model, windows()))


def test_the_model_is_left_as_it_was() -> None:
    """Also after an error; dropout is off meanwhile."""
    model = build(lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2, resid_pdrop=0.5)))
    expected = perplexity(model, windows())
    model.train().lm_head.eval()
    modes = [module.training for module in model.modules()]
    assert perplexity(model, windows()) == expected
    model.transformer.ln_f.weight.data.fill_(math.nan)
    with pytest.raises(NumericalError):
        perplexity(model, windows())
    assert [module.training for module in model.modules()] == modes
    assert "forward" not in vars(model.transformer)
    assert model(windows()).logits.requires_grad


@pytest.mark.parametrize("name", list(NOT_CAUSAL))
def test_model_that_is_not_causal(name: str) -> None:
    make, reason = NOT_CAUSAL[name]
    with pytest.raises(ModelError, match=reason):
        perplexity(build(make), windows())


def test_nan_names_the_window() -> None:
    model, tokens_NL = llama(), windows()
    tokens_NL[tokens_NL == V - 1] = 0
    tokens_NL[3, 11] = V - 1
    model.model.embed_tokens.weight.data[V - 1] = math.nan
    for reference in (None, llama()):
        with pytest.raises(NumericalError, match="window 3"):
            measure_windows(model, tokens_NL, reference, batch_size=2)


@pytest.mark.parametrize(
    ("tokens_NL", "error", "text"),
    [
        (windows(length=49), ModelError, "48"),
        (windows(length=1), ModelError, "no next token"),
        (torch.full((1, 4), V), CalibrationError, f"vocabulary of {V}"),
    ],
    ids=["too long", "one token", "foreign tokenizer"],
)
def test_windows_that_the_model_cannot_read(tokens_NL: Tensor, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        perplexity(llama(), tokens_NL)


def tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    """Numbers "0" .. "99" are their own ids, a blank line is 200, BOS 201; "The quick brown fox" is known too."""
    known = {str(i): i for i in range(100)} | {"\n\n": 200, "<s>": 201, "<unk>": 202}
    known |= {word: 203 + i for i, word in enumerate(["The", "quick", "brown", "fox"])}
    backend = Tokenizer(WordLevel(known, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.Split("\n\n", "isolated")]
    )
    if template is not None:
        backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", 201)])
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.mark.parametrize("protocol", ["windows", "sparsegpt"])
def test_windows_of_a_protocol(protocol: str) -> None:
    """BOS in every window and every token once; or once, as in the code of SparseGPT."""
    expected = {
        "windows": [[201, 1, 2, 3], [201, 200, 4, 5], [201, 200, 200, 6]],
        "sparsegpt": [[201, 1, 2, 3], [200, 4, 5, 200], [200, 6, 7, 8]],
    }
    documents = ["1 2 3", "4 5", "", "6 7 8"]
    tokens_NL = evaluation_windows(documents, tokenizer("<s> $A"), 4, protocol=protocol)
    assert tokens_NL.tolist() == expected[protocol]
    assert tokens_NL.dtype == torch.int64
    plain_NL = evaluation_windows(documents, tokenizer(None), 3, 2, protocol)
    assert plain_NL.tolist() == [[1, 2, 3], [200, 4, 5]]


def test_windows_of_a_part_of_the_text_are_those_of_the_whole() -> None:
    """Where the next document would merge with the last word of those that were read."""
    documents = ["1"] * 63 + ["1\n"] + ["2"] * 200  # 64 are read first: 127 tokens
    part, whole = (evaluation_windows(documents, tokenizer(None), 127, max_windows=most) for most in (1, None))
    assert torch.equal(part, whole[:1])


def test_no_more_text_is_read_than_the_windows_need() -> None:
    read = []

    def documents() -> Iterator[str]:
        for number in range(20000):
            read.append(number)
            yield LINES[number % len(LINES)]

    few = evaluation_windows(documents(), make_tokenizer("bos"), 16, 20)
    assert len(read) < 2000
    assert torch.equal(few, evaluation_windows(documents(), make_tokenizer("bos"), 16)[:20])


def test_no_window_ends_with_a_token_that_ends_a_text() -> None:
    text = "the quick brown fox jumps over the lazy dog " * 9
    ids = make_tokenizer("eos")(text, add_special_tokens=False)["input_ids"]
    assert evaluation_windows([text], make_tokenizer("eos"), 8).tolist()[:2] == [ids[:8], ids[8:16]]
