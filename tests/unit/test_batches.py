"""Calibration text in every form that people have it in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import families
import pytest
import torch
from tiny import make_llama, make_tokens
from torch.utils.data import DataLoader, TensorDataset

from optima.data.batches import read_calibration
from optima.errors import CalibrationError
from optima.models.inputs import arguments

TOKENS = make_tokens()
TEXTS = ["one", "two", "three"]
FORMS = {
    "tensor": TOKENS,
    "loader of a dataset of one tensor": DataLoader(TensorDataset(TOKENS), batch_size=2),
    "loader of rows": DataLoader(list(TOKENS), batch_size=3),
    "rows": list(TOKENS),
    "encodings": [{"input_ids": row, "attention_mask": torch.ones(16)} for row in TOKENS],
    "one encoding": {"input_ids": TOKENS},
    "numbers": {"input_ids": TOKENS.tolist()},
    "iterator": iter(TOKENS.split(2)),
}


def at_most(count: int) -> Callable[[int], int]:
    return lambda length: count


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_tokens(form: Any) -> None:
    assert torch.equal(read_calibration(form, at_most(5)), TOKENS)


@pytest.mark.parametrize(
    "form", [TEXTS, iter(TEXTS), DataLoader(TEXTS, batch_size=2)], ids=["list", "iterator", "loader"]
)
def test_texts(form: Any) -> None:
    assert list(read_calibration(form, at_most(1))) == TEXTS


@pytest.mark.parametrize("other", ["text", 7], ids=str)
def test_what_is_no_calibration_data(other: Any) -> None:
    with pytest.raises(CalibrationError, match="must be token ids, a list of documents or batches"):
        read_calibration(other, at_most(5))
    assert read_calibration(None, at_most(5)) is None


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        ([torch.ones(2, 16).long(), torch.ones(2, 15).long()], "differ in length, 16 and 15"),
        ([{"input_ids": TOKENS, "attention_mask": torch.eye(5, 16)}], "is padded"),
        ([{"text": "a"}], r"holds text.*dataset\['text'\]"),
        ([{}], "holds nothing"),
        ([{"input_ids": TOKENS, "pixel_values": torch.ones(5, 3, 8, 8)}], "pixel_values"),
        ([torch.ones(2, 16)], "whole numbers of shape"),
        (TOKENS[:0], r"calibration must be token ids, .* got \(0, 16\)"),
        ([{"input_ids": [[1, 2], [3]]}], "are no tensor .*pack the text"),
        ([{"input_ids": [[1, 2], [3]], "attention_mask": [[1, 1], [1]]}], "are no tensor .*pack the text"),
        ([{"input_ids": [torch.ones(2), torch.ones(2)], "attention_mask": []}], "are no tensor .*set_format"),
    ],
)
def test_what_does_not_fit_is_refused(calibration: Any, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        read_calibration(calibration, at_most(5))


def test_a_decoder_begins_with_the_token_that_starts_it() -> None:
    tokens_NL, model = make_tokens(3, 9), families.build("t5")
    model.config.decoder_start_token_id = 7
    found = arguments(model, tokens_NL)
    assert found["input_ids"].equal(tokens_NL[:, :4])
    assert found["decoder_input_ids"][:, 0].tolist() == [7, 7, 7]
    assert found["decoder_input_ids"][:, 1:].equal(tokens_NL[:, 4:-1])
    assert arguments(make_llama(), tokens_NL)["input_ids"] is tokens_NL
