"""Fisher weights: gradients of the model's own loss, by autograd through the whole model, and what they change."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from closeness import assert_close_in_norm
from families import build, fisher_of, gradient_at, make_ids, stack_of
from tiny import NoBackward, make_bert, make_llama, make_tokens
from torch import nn

from optima import Recipe, prune
from optima.calibration.activations import capture
from optima.calibration.fisher import fisher_weights, label_gradient
from optima.models.logits import sampled_tokens
from optima.patterns import Pattern
from optima.selectors.base import LinearTask, Selection
from optima.selectors.scores import Wanda


def test_tokens_and_the_metric_of_tuning_are_those_at_the_output_of_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optima.calibration.weights.EFFECTIVE", 0)  # so few tokens would weigh alike
    model, tokens_NL = make_llama().eval(), make_tokens(8, 16)
    assert fisher_of(model)[0].residual == {}
    stack = stack_of(model)
    acts = capture(model, stack, list(tokens_NL.split(4)), whole=True)
    found = fisher_weights(model, stack, acts, 3, residual=True)
    gradient_TE = gradient_at(model, stack.blocks[0].module, tokens_NL)
    root_T = gradient_TE.square().sum(dim=1).sqrt()
    own_T = torch.cat(found.tokens["model.layers.0"])
    assert_close_in_norm(own_T, root_T / root_T.mean())
    expected_EE = gradient_TE.mT @ gradient_TE / tokens_NL.numel()
    assert_close_in_norm(found.residual["model.layers.0"], expected_EE)
    assert all(float(torch.cat(own).mean()) == pytest.approx(1.0) for own in found.tokens.values())


def test_labels_are_drawn_from_the_model() -> None:
    logits_V = torch.randn(1500, generator=torch.Generator().manual_seed(0)) * 3
    p_V = logits_V.softmax(0)
    drawn_T = (torch.arange(20000) + 0.5) / 20000
    gradient_TV = label_gradient(logits_V.expand(20000, -1), drawn_T)
    assert torch.allclose((p_V - gradient_TV).mean(dim=0), p_V, atol=2e-4)
    assert torch.allclose(gradient_TV.sum(dim=1), torch.zeros(20000), atol=1e-4)
    weight_TV = torch.zeros(2, 700)
    weight_TV[0, 600] = weight_TV[1, 3] = 1.0
    assert sampled_tokens(weight_TV, torch.zeros(2))[0][:, 0].tolist() == [600, 3]


def test_without_a_head_gradients_of_the_last_hidden_states_are_signs() -> None:
    model = make_bert().eval()
    stack = stack_of(model)
    acts = capture(model, stack, list(make_tokens(8, 16).split(4)), whole=True)
    found = fisher_weights(model, stack, acts, seed=3, residual=True)
    assert found.loss == "the square of the change of the last hidden states"
    product_EE = found.residual[stack.blocks[-1].name]
    assert torch.equal(product_EE.diagonal(), torch.ones(32))
    assert float((product_EE - torch.eye(32)).abs().max()) < 0.5, "each is either with the same probability"


def test_a_model_without_gradients_takes_the_sink_and_says_so() -> None:
    with torch.inference_mode():
        model, sink = make_llama(), make_llama()
        report = prune(model, Recipe(), calibration=make_tokens(5, 64))
        prune(sink, Recipe(objective="sink"), calibration=make_tokens(5, 64))
    (note,) = [note for note in report.run.notes if "objective sink replaces objective loss" in note]
    assert "the same sparsity for all linears and without tuning" in note
    assert all(own.equal(other) for own, other in zip(model.parameters(), sink.parameters(), strict=True))


def test_so_does_one_whose_kernels_have_no_backward_pass() -> None:
    model = make_llama()
    module = model.model.layers[1]
    forward = module.forward
    module.forward = lambda hidden, *args, **kwargs: forward(NoBackward.apply(hidden), *args, **kwargs)
    report = prune(model, Recipe(), calibration=make_tokens())
    (note,) = [note for note in report.run.notes if "objective sink replaces objective loss" in note]
    assert "has no backward pass (" in note


@pytest.mark.parametrize("make", [make_llama, make_bert])
def test_a_part_of_the_sequences_stands_for_all(make: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optima.calibration.fisher.LEAST_TOKENS", 1)
    monkeypatch.setattr("optima.calibration.weights.EFFECTIVE", 0)
    whole, _ = fisher_of(make().eval(), 2)
    part, _ = fisher_of(make().eval(), 2, fraction=0.5)
    for name, own in whole.tokens.items():
        used_T, own_T = (torch.cat([each[batch] for batch in (0, 2)]) for each in (part.tokens[name], own))
        assert_close_in_norm(used_T / used_T.mean(), own_T / own_T.mean())  # same labels
        for batch in (1, 3):  # the others weigh what those of their position do
            expected_NL = used_T.reshape(4, 16).mean(dim=0).expand(2, 16)
            assert_close_in_norm(part.tokens[name][batch].reshape(2, 16), expected_NL)
    assert part.rows.keys() == whole.rows.keys()


def test_a_run_passes_the_weights_of_rows_to_the_selector() -> None:
    seen = {}

    class Spy(Wanda):
        def select(self, task: LinearTask, pattern: Pattern) -> Selection:
            seen[task.name] = task.row_weight_O
            return super().select(task, pattern)

    prune(make_llama(), Recipe(selector=Spy(), seed=3, batch_size=4), calibration=make_tokens(8, 16))
    found, _ = fisher_of(make_llama().eval(), 4)
    assert seen.keys() == found.rows.keys()
    for name in found.rows:
        assert_close_in_norm(seen[name], found.rows[name], name=name)


def test_experts_of_few_tokens_and_of_a_part_of_the_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optima.calibration.fisher.LEAST_TOKENS", 1)
    monkeypatch.setattr("optima.calibration.weights.EFFECTIVE", 0)
    monkeypatch.setattr("optima.calibration.weights.FEW_TOKENS", 1e12)
    model = build("mixtral")
    stack = stack_of(model)
    acts = capture(model, stack, list(make_ids(8, 16).split(2)), whole=True)
    found = fisher_weights(model, stack, acts, seed=0, share=0.5)
    assert found.routed
    for name, row_O in found.rows.items():
        assert (float(row_O.std()) < 1e-5 * float(row_O.mean())) == (name in found.routed), name
