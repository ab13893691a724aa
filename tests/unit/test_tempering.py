"""Weights of tokens: never so that too few decide."""

import pytest
import torch

from optima.calibration.loss_weights import LossWeights
from optima.calibration.tempering import EFFECTIVE, Moments


def heavy_tailed(tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(tokens, generator=torch.Generator().manual_seed(seed)).mul(2.5).exp()


def effective(weight_T: torch.Tensor) -> float:
    weight_T = weight_T.double()
    return float(weight_T.sum() ** 2 / weight_T.square().sum())


def weights_of(batches: list[torch.Tensor], inputs: int) -> tuple[LossWeights, torch.Tensor]:
    found = LossWeights("a loss", {"a linear": batches}, inputs={"a linear": inputs})
    weights = found.of_tokens("a linear")
    assert weights is not None
    assert list(map(len, weights)) == list(map(len, batches))
    return found, torch.cat(weights)


@pytest.mark.parametrize("inputs", [0, 1, 10, 40, 124, 125, 1000])
def test_effective_tokens_for_each_input(inputs: int) -> None:
    square_T = heavy_tailed(1000)
    rooted = effective(square_T.sqrt())
    assert EFFECTIVE < rooted < 40 * EFFECTIVE, "some of the cases are bound by it"
    found, weight_T = weights_of(list(square_T.split(300)), inputs)
    assert float(weight_T.mean()) == pytest.approx(1.0, rel=1e-4)
    assert effective(weight_T) == pytest.approx(max(rooted, min(EFFECTIVE * inputs, 1000)), rel=1e-3)
    assert found.effective_tokens("a linear") == pytest.approx(effective(weight_T), rel=1e-3)
    if rooted < EFFECTIVE * inputs < 1000:
        order = square_T.argsort()
        assert bool((weight_T[order].diff() >= 0).all()), "who matters more goes on mattering more"
    elif inputs <= 1:
        assert torch.equal(weight_T, square_T.sqrt() * (1000 / sum(float(s.sqrt().sum()) for s in square_T.split(300))))


def test_tokens_that_matter_alike() -> None:
    _, weight_T = weights_of([torch.full((64,), 0.25)], inputs=64)
    assert torch.equal(weight_T, torch.ones(64))


def test_tokens_that_were_not_swept_have_the_mean() -> None:
    square_T = heavy_tailed(500)
    root_T = square_T.sqrt()
    every_T = torch.cat([root_T, root_T.mean().expand(1500)])
    for inputs in (0, 100):
        moments = Moments.of([square_T], inputs).among(2000)
        assert moments.tokens == 2000
        assert moments.effective == pytest.approx(max(effective(every_T), EFFECTIVE * inputs), rel=1e-3)
        assert float(moments.weights(square_T).mean()) == pytest.approx(1.0, rel=1e-4)


def test_parts_are_put_together() -> None:
    square_T = heavy_tailed(600)
    parts = Moments.over([Moments.of([part_T], 20) for part_T in square_T.split(250)])
    assert parts == pytest.approx(Moments.of([square_T], 20), rel=1e-5)
