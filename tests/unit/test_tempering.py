"""Weights of tokens: never so that too few decide."""

import pytest
import torch
from closeness import assert_close_in_norm
from tiny import make_bert, make_llama, make_tokens
from transformers import PreTrainedModel

from optima.calibration import fisher
from optima.calibration.activations import capture
from optima.calibration.weights import EFFECTIVE, Moments, row_weights
from optima.models.blocks import find_stacks


def heavy_tailed(tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(tokens, generator=torch.Generator().manual_seed(seed)).mul(2.5).exp()


def effective(weight_T: torch.Tensor) -> float:
    weight_T = weight_T.double()
    return float(weight_T.sum() ** 2 / weight_T.square().sum())


def weights_of(square_T: torch.Tensor, inputs: int, start_T: torch.Tensor | None = None) -> torch.Tensor:
    start_T = torch.zeros(len(square_T), dtype=torch.bool) if start_T is None else start_T
    return Moments.of(list(square_T[~start_T].split(300)), inputs).weights(square_T, start_T)


@pytest.mark.parametrize("inputs", [0, 1, 40, 125, 1000])
def test_effective_tokens_for_each_input(inputs: int) -> None:
    square_T = heavy_tailed(1000)
    rooted = effective(square_T.sqrt())
    assert EFFECTIVE < rooted < 40 * EFFECTIVE, "some of the cases are bound by it"
    weight_T = weights_of(square_T, inputs)
    assert float(weight_T.mean()) == pytest.approx(1.0, rel=1e-4)
    assert effective(weight_T) == pytest.approx(max(rooted, min(EFFECTIVE * inputs, 1000)), rel=1e-3)
    assert bool((weight_T[square_T.argsort()].diff() >= -1e-6).all()), "who matters more goes on mattering more"


def test_tokens_without_gradients_have_the_mean() -> None:
    square_T = heavy_tailed(500)
    for inputs in (0, 100):
        moments = Moments.of([square_T], inputs).among(2000)
        assert moments.tokens == 2000
        weight_T = moments.weights(square_T, torch.zeros(500, dtype=torch.bool))
        assert float(weight_T.mean()) == pytest.approx(1.0, rel=1e-4)
        assert effective(torch.cat([weight_T, torch.ones(1500)])) >= EFFECTIVE * inputs * 0.999


def test_a_start_that_all_sequences_share_is_not_counted_and_keeps_its_weight() -> None:
    length, inputs = 25, 60
    square_T = heavy_tailed(1000)
    start_T = torch.arange(1000) % length == 0
    square_T[start_T] *= 1e6
    weight_T = weights_of(square_T, inputs, start_T)
    root_T = square_T.sqrt()
    assert_close_in_norm(weight_T[start_T], root_T[start_T] / root_T[~start_T].mean())
    assert float(weight_T[~start_T].mean()) == pytest.approx(1.0, rel=1e-4)
    assert effective(root_T[~start_T]) < EFFECTIVE * inputs == pytest.approx(effective(weight_T[~start_T]), rel=1e-3)


def starts_alike(model: PreTrainedModel, tokens_NL: torch.Tensor, share: float = 1.0) -> bool:
    (stack,) = find_stacks(model)
    acts = capture(model, stack, tokens_NL.split(1), whole=True)
    outputs = acts.part(fisher.chosen_batches(acts, share))
    for block in stack.blocks:
        outputs.forward(block)
    return fisher.start_alike(acts, outputs.hidden)


def test_whether_all_sequences_start_alike_is_seen() -> None:
    tokens_NL = make_tokens(8, 16)
    tokens_NL[:, 0] = 1
    assert starts_alike(make_llama(), tokens_NL)
    tokens_NL[5, 0] = 2
    assert not starts_alike(make_llama(), tokens_NL)


def test_a_start_that_sees_later_tokens_is_not_one_input(monkeypatch: pytest.MonkeyPatch) -> None:
    """As [CLS] of BERT, whose state tells of the text; of one sequence it tells nothing of others."""
    monkeypatch.setattr(fisher, "LEAST_TOKENS", 1)
    model, tokens_NL = make_bert(), make_tokens(8, 16) % 99
    tokens_NL[:, 0] = 1
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(10 if "query" in name or "key" in name or "value" in name else 1)
    assert not starts_alike(model, tokens_NL)
    assert not starts_alike(model, tokens_NL, 0.125)


def test_rows_of_few_tokens_are_shrunk_towards_their_mean() -> None:
    square_O = torch.tensor([1.0, 16.0, 81.0, 0.0])
    whole_O = row_weights(square_O)
    assert whole_O.tolist() == pytest.approx([7.0, 28.0, 63.0, 0.0])
    for tokens in (0.0, 16.0, 1e6):
        found_O = row_weights(square_O, tokens)
        assert float(found_O.mean()) == pytest.approx(float(whole_O.mean()))
        assert_close_in_norm(found_O, 24.5 + (whole_O - 24.5) * tokens / (tokens + 16))
