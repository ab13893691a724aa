"""Zero-shot accuracy agrees with lm-eval run as it is, and says what is wrong with its input."""

from __future__ import annotations

import builtins
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from harness.zeroshot import batches, zero_shot
from tiny import LINES, make_llama, make_tokenizer

from optima.errors import CalibrationError, ModelError, OptimaError, RecipeError

ENDS = {"bos_token": "<s>", "eos_token": "</s>"}
needs_lm_eval = pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs the bench extra")


@pytest.fixture
def arc(tmp_path: Path) -> Path:
    """Items of ARC, with choices of one token and of many, and labels that are letters or digits."""
    items = [
        {
            "id": str(i),
            "question": LINES[i % 2][: 10 + 7 * i],
            "choices": {"text": ["dog", "fox " * (i + 1), LINES[0][i:]], "label": list("ABC" if i % 2 else "123")},
            "answerKey": ("ABC" if i % 2 else "123")[i % 3],
        }
        for i in range(6)
    ]
    file = tmp_path / "arc.jsonl"
    file.write_text("".join(json.dumps(item) + "\n" for item in items))
    return file


@needs_lm_eval
def test_last_logits_give_the_same_likelihoods() -> None:
    from harness.zeroshot import _language_model
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = make_llama(), make_tokenizer(**ENDS)
    texts = [LINES[0], LINES[1], LINES[0][:20], "a", "fox jumps"]
    requests = [
        ((context, continuation), *HFLM(pretrained=model, tokenizer=tokenizer)._encode_pair(context, continuation))
        for context in texts[:3]
        for continuation in (" dog", " a", " over the lazy dog", " " + LINES[1])
    ]
    plain = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)._loglikelihood_tokens(requests, disable_tqdm=True)
    for batch_size in (1, 3, 20):
        ours = _language_model(model, tokenizer, batch_size)._loglikelihood_tokens(requests)
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(plain), rtol=1e-5, atol=1e-5)


@needs_lm_eval
def test_model_and_tokenizer_stay_as_they_were(arc: Path) -> None:
    model, tokenizer = make_llama().train(), make_tokenizer(**ENDS)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = zero_shot(model, tokenizer, {"arc_easy": arc}, limit=5)["arc_easy"]
    assert result["items"] == 5
    assert {"acc", "acc_norm", "acc_stderr"} <= result.keys()
    assert model.training
    assert tokenizer.pad_token is None
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert zero_shot(model, tokenizer, {"arc_easy": arc}, limit=5, batch_size=1)["arc_easy"] == result


@needs_lm_eval
def test_bad_input_is_named(arc: Path) -> None:
    model, tokenizer = make_llama(), make_tokenizer(**ENDS)
    with pytest.raises(CalibrationError, match=r"arc\.jsonl does not hold items of piqa"):
        zero_shot(model, tokenizer, {"piqa": arc})
    with pytest.raises(CalibrationError, match=r"no file .*none\.jsonl"):
        zero_shot(model, tokenizer, {"piqa": arc.with_name("none.jsonl")})
    with pytest.raises(RecipeError, match="no task no_such"):
        zero_shot(model, tokenizer, {"no_such": arc})
    with pytest.raises(ModelError, match="neither a bos_token nor an eos_token"):
        zero_shot(model, make_tokenizer(), {"arc_easy": arc})
    with pytest.raises(RecipeError, match="at least 1"):
        zero_shot(model, tokenizer, {"arc_easy": arc}, limit=0)


def test_remedy_without_lm_eval(arc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *arguments: Any, **options: Any) -> Any:
        if name.startswith("lm_eval"):
            raise ImportError("No module named 'lm_eval'")
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(OptimaError, match=r"pip install 'optima-prune\[bench\]'"):
        zero_shot(make_llama(), make_tokenizer(**ENDS), {"arc_easy": arc})


def test_batches_hold_what_is_scored() -> None:
    sizes = [(10, 3), (50, 5), (49, 9), (12, 12), (11, 1), (80, 70)]
    found = list(batches(sizes, 3, 40))
    assert sorted(i for batch, _ in found for i in batch) == list(range(len(sizes)))
    for batch, scored in found:
        longest = max(sizes[i][0] for i in batch)
        assert scored == max(longest - length + wanted for length, wanted in (sizes[i] for i in batch))
        assert len(batch) == 1 or len(batch) * scored <= 40
        assert len(batch) <= 3
