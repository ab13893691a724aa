"""Perplexity against the plain definition, on tiny random models of several structures."""

import math
from collections.abc import Callable, Iterator

import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import LINES, make_llama, make_tokenizer, make_tokens
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers.models import WordLevel
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from optima.calibration import lm_head
from optima.errors import CalibrationError, ModelError, NumericalError
from optima.evaluation.logits import PROBE_LENGTH
from optima.evaluation.perplexity import PROTOCOLS, evaluation_windows, perplexity, window_losses

V = 61
SIZES = {"vocab_size": V, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
ROPE = {**SIZES, "num_key_value_heads": 1, "max_position_embeddings": 48}
GPT2 = {"vocab_size": V, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 48}
SEQ2SEQ = {"vocab_size": V, "d_model": 16, "num_layers": 1, "num_heads": 2, "d_kv": 8, "d_ff": 24}

CAUSAL: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**ROPE)),
    "gemma2-softcapping": lambda: hf.Gemma2ForCausalLM(
        hf.Gemma2Config(**ROPE, head_dim=8, sliding_window=4, final_logit_softcapping=0.5)
    ),
    "cohere-logit-scale": lambda: hf.CohereForCausalLM(hf.CohereConfig(**ROPE, logit_scale=5.0)),
    "granite-logits-scaling": lambda: hf.GraniteForCausalLM(hf.GraniteConfig(**ROPE, logits_scaling=0.2)),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2)),
    "opt-word-embed-proj": lambda: hf.OPTForCausalLM(
        hf.OPTConfig(
            vocab_size=V, hidden_size=16, word_embed_proj_dim=8, ffn_dim=24, num_hidden_layers=2, num_attention_heads=2
        )
    ),
    "bloom": lambda: hf.BloomForCausalLM(hf.BloomConfig(vocab_size=V, hidden_size=16, n_layer=2, n_head=2)),
    "mixtral-experts": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**ROPE, num_local_experts=4)),
    "mamba-no-attention": lambda: hf.MambaForCausalLM(
        hf.MambaConfig(vocab_size=V, hidden_size=16, num_hidden_layers=2, state_size=4)
    ),
    "bert-decoder-head-transform": lambda: hf.BertLMHeadModel(hf.BertConfig(**SIZES, is_decoder=True)),
}
NOT_CAUSAL: dict[str, tuple[Callable[[], PreTrainedModel], str]] = {
    "headless": (lambda: hf.LlamaModel(hf.LlamaConfig(**ROPE)), "no logits"),
    "encoder": (lambda: hf.BertModel(hf.BertConfig(**SIZES)), "no logits"),
    "classifier": (lambda: hf.BertForTokenClassification(hf.BertConfig(**SIZES)), "no logits over its vocabulary"),
    "masked": (lambda: hf.BertForMaskedLM(hf.BertConfig(**SIZES)), "later tokens"),
    "encoder-as-causal": (lambda: hf.BertLMHeadModel(hf.BertConfig(**SIZES)), "later tokens"),
    "encoder-decoder": (lambda: hf.T5ForConditionalGeneration(hf.T5Config(**SEQ2SEQ)), "encoder-decoder"),
}


def build(make: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    """A random model whose logits differ enough from uniform for an error to show."""
    torch.manual_seed(0)
    model = make().eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def llama(dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return build(CAUSAL["llama"]).to(dtype)


def windows(num_windows: int = 5, length: int = 23) -> Tensor:
    return torch.randint(V, (num_windows, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def plain_perplexity(model: PreTrainedModel, tokens_NL: Tensor) -> float:
    logits_NLV = model(tokens_NL).logits.double()
    return cross_entropy(logits_NLV[:, :-1].flatten(0, 1), tokens_NL[:, 1:].flatten()).exp().item()


class TestValue:
    @pytest.mark.parametrize("name", list(CAUSAL))
    @pytest.mark.parametrize("positions", [3, 1000])
    def test_equals_the_plain_definition(self, name: str, positions: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(lm_head, "LOGITS_BYTES", 4 * V * positions)
        model = build(CAUSAL[name])
        expected = plain_perplexity(model, windows())
        assert perplexity(model, windows(), batch_size=2) == pytest.approx(expected, rel=1e-5)

    @torch.no_grad()
    def test_losses_of_windows(self) -> None:
        model = llama()
        logits_NLV = model(windows()).logits.double()
        loss_NL = cross_entropy(logits_NLV[:, :-1].transpose(1, 2), windows()[:, 1:], reduction="none")
        torch.testing.assert_close(window_losses(model, windows(), batch_size=2), loss_NL.mean(1), rtol=1e-5, atol=0)

    @settings(max_examples=25)
    @given(num_windows=st.integers(1, 4), length=st.integers(2, 12), batch_size=st.integers(1, 5))
    def test_any_shape(self, num_windows: int, length: int, batch_size: int) -> None:
        model, tokens_NL = llama(torch.float64), windows(num_windows, length)
        expected = plain_perplexity(model, tokens_NL)
        assert perplexity(model, tokens_NL, batch_size=batch_size) == pytest.approx(expected, rel=1e-5)

    def test_bfloat16_likelihoods_are_float32(self) -> None:
        model = llama(torch.bfloat16)
        assert perplexity(model, windows()) == pytest.approx(plain_perplexity(model, windows()), rel=1e-3)

    def test_uniform_model_has_the_vocabulary_size(self) -> None:
        model = llama()
        model.get_output_embeddings().weight.data.zero_()
        assert perplexity(model, windows()) == pytest.approx(V, rel=1e-6)

    def test_overflow_is_infinite(self) -> None:
        model = llama()
        model.get_output_embeddings().weight.data *= 1e6
        assert perplexity(model, windows()) == math.inf


class TestMemory:
    def test_body_runs_once_a_batch_and_logits_stay_in_the_budget(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(lm_head, "LOGITS_BYTES", 4 * V * 6)
        model = llama()
        bodies, logits = [], []
        model.model.layers[0].register_forward_hook(lambda module, args, output: bodies.append(args[0].shape[:2]))
        model.lm_head.register_forward_hook(lambda module, args, output: logits.append(output.shape[:2]))
        perplexity(model, windows(), batch_size=2)
        whole = [shape for shape in bodies if shape[1] > PROBE_LENGTH]
        assert whole == [(2, 23), (2, 23), (1, 23)]
        assert max(batch * positions for batch, positions in logits if batch > 1) <= 6

    def test_model_that_cannot_slice(self) -> None:
        class MixesPositions(hf.LlamaForCausalLM):
            def forward(self, input_ids, **kwargs):
                output = super().forward(input_ids, **kwargs)
                output.logits = output.logits + output.logits.cumsum(1)
                return output

        model = build(lambda: MixesPositions(hf.LlamaConfig(**ROPE)))
        expected = plain_perplexity(model, windows())
        assert perplexity(model, windows(), batch_size=2) == pytest.approx(expected, rel=1e-5)


class TestModelIsLeftAsItWas:
    def test_modes_forward_and_gradients(self) -> None:
        model = llama().train()
        model.lm_head.eval()
        modes = [module.training for module in model.modules()]

        def hooked(*args, **kwargs):  # as accelerate installs its hooks
            return type(model.model).forward(model.model, *args, **kwargs)

        model.model.forward = hooked
        perplexity(model, windows())
        assert [module.training for module in model.modules()] == modes
        assert model.model.forward is hooked
        assert model(windows()).logits.requires_grad

    def test_after_an_error(self) -> None:
        model = llama()
        model.lm_head.weight.data.fill_(math.nan)
        with pytest.raises(NumericalError):
            perplexity(model, windows())
        assert "forward" not in vars(model.model)

    def test_dropout_is_off(self) -> None:
        model = build(lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2, resid_pdrop=0.5)))
        expected = perplexity(model, windows())
        assert perplexity(model.train(), windows()) == expected


def test_device() -> None:
    assert perplexity(llama(), windows(), device="cpu") == perplexity(llama(), windows())


class TestErrors:
    @pytest.mark.parametrize("name", list(NOT_CAUSAL))
    def test_model_that_is_not_causal(self, name: str) -> None:
        make, reason = NOT_CAUSAL[name]
        with pytest.raises(ModelError, match=reason):
            perplexity(build(make), windows())

    def test_nan_names_the_window(self) -> None:
        model, tokens_NL = llama(), windows()
        tokens_NL[tokens_NL == V - 1] = 0
        tokens_NL[3, 11] = V - 1
        model.model.embed_tokens.weight.data[V - 1] = math.nan
        with pytest.raises(NumericalError, match="window 3"):
            perplexity(model, tokens_NL, batch_size=2)

    def test_window_beyond_the_positions(self) -> None:
        with pytest.raises(ModelError, match="48"):
            perplexity(llama(), windows(length=49))

    def test_window_of_one_token(self) -> None:
        with pytest.raises(ModelError, match="no next token"):
            perplexity(llama(), windows(length=1))

    def test_foreign_tokenizer(self) -> None:
        with pytest.raises(CalibrationError, match=f"vocabulary of {V}"):
            perplexity(llama(), torch.full((1, 4), V))


class TestEvaluationWindows:
    @staticmethod
    def tokenizer(template: str | None) -> PreTrainedTokenizerFast:
        """Words "0" .. "99" are their own ids, a blank line is 200, BOS 201; "The quick brown fox" is known too."""
        words = {str(i): i for i in range(100)} | {"\n\n": 200, "<s>": 201, "<unk>": 202}
        words |= {word: 203 + i for i, word in enumerate(["The", "quick", "brown", "fox"])}
        backend = Tokenizer(WordLevel(words, unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.Split("\n\n", "isolated")]
        )
        if template is not None:
            backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", 201)])
        return PreTrainedTokenizerFast(tokenizer_object=backend)

    def test_bos_in_every_window_and_every_token_once(self) -> None:
        tokens_NL = evaluation_windows(["1 2 3", "4 5", "", "6 7 8"], self.tokenizer("<s> $A"), 4)
        assert tokens_NL.tolist() == [[201, 1, 2, 3], [201, 200, 4, 5], [201, 200, 200, 6]]
        assert tokens_NL.dtype == torch.int64

    def test_without_special_tokens(self) -> None:
        tokens_NL = evaluation_windows(["1 2 3", "4 5 6"], self.tokenizer(None), 3, max_windows=2)
        assert tokens_NL.tolist() == [[1, 2, 3], [200, 4, 5]]

    def test_max_windows_is_no_minimum(self) -> None:
        assert evaluation_windows(["1 2 3 4 5"], self.tokenizer(None), 2, max_windows=9).shape == (2, 2)

    def test_sparsegpt_has_bos_once(self) -> None:
        """As its code does: ``tokenizer("\\n\\n".join(documents))``, cut into windows."""
        tokenizer, documents = self.tokenizer("<s> $A"), ["1 2 3", "4 5", "6 7 8"]
        ids = tokenizer("\n\n".join(documents))["input_ids"]
        tokens_NL = evaluation_windows(documents, tokenizer, 4, protocol="sparsegpt")
        assert tokens_NL.tolist() == [ids[0:4], ids[4:8]] == [[201, 1, 2, 3], [200, 4, 5, 200]]
        assert len(ids) == 11

    def test_without_special_tokens_the_protocols_are_the_same(self) -> None:
        both = [evaluation_windows(["1 2 3", "4 5 6"], self.tokenizer(None), 3, None, name) for name in PROTOCOLS]
        assert torch.equal(*both)

    @pytest.mark.parametrize("documents", [[], ["1 2"]])
    def test_too_short(self, documents: list[str]) -> None:
        with pytest.raises(CalibrationError, match=r"has [02] tokens"):
            evaluation_windows(documents, self.tokenizer("<s> $A"), 4)

    def test_windows_of_a_part_of_the_text_are_those_of_the_whole(self) -> None:
        """Where the next document would merge with the last word of those that were read."""
        documents = ["1"] * 63 + ["1\n"] + ["2"] * 200  # 64 are read first: 127 tokens
        part, whole = (evaluation_windows(documents, self.tokenizer(None), 127, max_windows=most) for most in (1, None))
        assert torch.equal(part, whole[:1])


def test_progress() -> None:
    seen: list[tuple[int, int]] = []
    window_losses(make_llama(), make_tokens()[:5], batch_size=2, progress=lambda *counts: seen.append(counts))
    assert seen == [(2, 5), (4, 5), (5, 5)]


def test_windows_without_special_tokens_are_as_many_as_asked_for() -> None:
    documents = (f"{LINES[number % len(LINES)]}" for number in range(4000))
    assert len(evaluation_windows(documents, make_tokenizer("bos"), 4, 2000, "sparsegpt")) == 2000


def test_no_more_text_is_read_than_the_windows_need() -> None:
    tokenizer, read = make_tokenizer("bos"), []

    def documents() -> Iterator[str]:
        for number in range(20000):
            read.append(number)
            yield LINES[number % len(LINES)]

    few = evaluation_windows(documents(), tokenizer, 16, 20)
    assert len(read) < 2000
    assert torch.equal(few, evaluation_windows(documents(), tokenizer, 16)[:20])


def test_no_window_ends_with_a_token_that_ends_a_text() -> None:
    tokenizer = make_tokenizer("eos")
    text = "the quick brown fox jumps over the lazy dog " * 9
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert evaluation_windows([text], tokenizer, 8).tolist()[:2] == [ids[:8], ids[8:16]]
