"""Packing text into token sequences, with a tiny tokenizer."""

import hashlib
import logging

import pytest
import torch
from hypothesis import given, strategies as st
from tiny import LINES, TEMPLATES, make_tokenizer

from optima.data import text as text_module
from optima.data.text import calibration_tokens, data_hash, special_tokens
from optima.errors import CalibrationError

TOKENIZERS = {template: make_tokenizer(template) for template in TEMPLATES}


def plain_ids(text: str) -> list[int]:
    return TOKENIZERS["none"](text)["input_ids"]


class TestSpecialTokens:
    @pytest.mark.parametrize(
        ("template", "expected"), [("none", ([], [])), ("bos", ([0], [])), ("bert", ([2], [3])), ("eos", ([], [1]))]
    )
    def test_found(self, template: str, expected: tuple[list[int], list[int]]) -> None:
        assert special_tokens(TOKENIZERS[template]) == expected


class TestCalibrationTokens:
    @pytest.mark.parametrize("template", list(TEMPLATES))
    @given(
        documents=st.lists(st.text(max_size=40), max_size=6),
        num_samples=st.integers(1, 3),
        max_seq_length=st.integers(3, 12),
    )
    def test_windows_hold_the_text_in_order(
        self, template: str, documents: list[str], num_samples: int, max_seq_length: int
    ) -> None:
        tokenizer = TOKENIZERS[template]
        before, after = special_tokens(tokenizer)
        length = max_seq_length - len(before) - len(after)
        ids = [i for text in documents if text.strip() for i in plain_ids(text + "\n\n")]
        if len(ids) < num_samples * length:
            with pytest.raises(CalibrationError, match=rf"has {len(ids)} tokens.*need {num_samples * length}"):
                calibration_tokens(documents, tokenizer, num_samples, max_seq_length)
            return
        tokens_NL = calibration_tokens(documents, tokenizer, num_samples, max_seq_length)
        assert tokens_NL.shape == (num_samples, max_seq_length)
        assert tokens_NL.dtype == torch.int64
        for n, window in enumerate(tokens_NL.tolist()):
            assert window == before + ids[n * length : (n + 1) * length] + after

    def test_no_room_for_text(self) -> None:
        with pytest.raises(CalibrationError, match=r"no room for text.*raise --max-seq-length"):
            calibration_tokens(LINES, TOKENIZERS["bert"], 1, 2)

    def test_stops_reading_when_there_is_enough(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(text_module, "BATCH", 1)

        def documents():
            yield from LINES
            raise AssertionError("read on")

        assert calibration_tokens(documents(), TOKENIZERS["bos"], 1, 8).shape == (1, 8)

    def test_long_text_is_neither_truncated_nor_warned_of(self, caplog: pytest.LogCaptureFixture) -> None:
        tokenizer = make_tokenizer("bos", model_max_length=8)
        tokenizer.backend_tokenizer.enable_truncation(8)  # as sentence encoders publish it
        tokenizer.backend_tokenizer.enable_padding(length=32)
        logger = logging.getLogger("transformers")
        logger.addHandler(caplog.handler)
        try:
            tokens_NL = calibration_tokens([" ".join(LINES)], tokenizer, 2, 16)
        finally:
            logger.removeHandler(caplog.handler)
        assert tokens_NL[:, 1:].flatten().tolist() == plain_ids(" ".join(LINES) + "\n\n")[:30]
        assert not caplog.records


def test_data_hash_is_of_the_int64_bytes() -> None:
    tokens = torch.tensor([[1, 2], [3, 70000]])
    expected = hashlib.sha256(b"".join(i.to_bytes(8, "little") for i in (1, 2, 3, 70000))).hexdigest()
    assert data_hash(tokens) == data_hash(tokens.int()) == data_hash(tokens.T.contiguous().T) == expected
    assert data_hash(tokens.T) != expected
