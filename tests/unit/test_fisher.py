"""Loss weights: the gradients of the model's own loss, by autograd through the whole model, and what they change."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from families import FAMILIES, build, fisher_of, make_ids, stack_of
from layers import layer_of, make_layer
from tiny import VOCAB, NoBackward, make_bert, make_llama, make_tokens
from transformers import BertForPreTraining, MixtralConfig, MixtralForCausalLM

from optima import Recipe, prune
from optima.allocate import saliency_quantiles
from optima.calibration.activations import capture
from optima.calibration.fisher import (
    fisher_batches,
    fisher_share,
    fisher_weights,
    row_weights,
)
from optima.calibration.lm_head import label_gradient, sampled_tokens
from optima.calibration.statistics import observe
from optima.calibration.store import Store
from optima.linear import Methods, prune_linear
from optima.models.blocks import find_stacks, select_linears
from optima.patterns import Pattern, Unstructured
from optima.prune import Job
from optima.selectors.base import LinearTask, Selection
from optima.selectors.scores import Magnitude, Wanda


def test_they_are_the_gradients_of_the_whole_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optima.calibration.weights.EFFECTIVE", 0)  # so few tokens would weigh alike
    model = make_llama().eval()
    found, tokens_NL = fisher_of(model)
    name = "model.layers.1.mlp.up_proj"
    seen: list[torch.Tensor] = []
    model.get_submodule(name).register_forward_hook(
        lambda module, args, output: seen.append(output) or output.retain_grad()
    )
    generator = torch.Generator().manual_seed(3)
    square = []
    for tokens_BL in tokens_NL.split(4):
        drawn_T = torch.rand(tokens_BL.shape, generator=generator).flatten()
        logits_TV = model(input_ids=tokens_BL).logits.flatten(0, 1)
        logits_TV.backward(label_gradient(logits_TV.detach(), drawn_T))
        square.append(seen[-1].grad.square().flatten(0, 1))
    square_TO = torch.cat(square)
    # Of each token in the units of its own length: few of them have most of the squares.
    tempered_O = (square_TO / square_TO.sum(dim=1, keepdim=True).sqrt()).mean(dim=0)
    expected_O = tempered_O * (square_TO.mean() / tempered_O.mean())
    assert torch.allclose(found.rows[name], row_weights(expected_O), rtol=1e-4, atol=1e-12)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_batches_do_not_matter() -> None:
    first, second = fisher_of(make_llama().eval(), 4)[0], fisher_of(make_llama().eval(), 8)[0]
    assert first.rows.keys() == second.rows.keys() != set()
    for name in first.rows:
        assert torch.allclose(first.rows[name], second.rows[name], rtol=1e-4)


def test_weights_of_tokens_have_mean_one() -> None:
    found, _ = fisher_of(make_llama().eval())
    for own in found.tokens.values():
        assert float(torch.cat(own).mean()) == pytest.approx(1.0)


def test_rows_that_matter_keep_more() -> None:
    weight_OD, inputs_TD = make_layer(8, 64, dtype=torch.float32)
    task = layer_of(weight_OD / weight_OD.norm(dim=1, keepdim=True), inputs_TD)
    rows_O = torch.ones(8)
    rows_O[3] = 100.0
    weighed = copy.copy(task)
    object.__setattr__(weighed, "row_weight_O", rows_O)
    half = Unstructured(0.5, "layer")
    plain, kept = (prune_linear(each, half, Methods(Magnitude())).keep_OD for each in (task, weighed))
    assert int(kept[3].sum()) > int(plain[3].sum())
    assert int(kept.sum()) == int(plain.sum())


def test_a_run_by_the_loss() -> None:
    model = make_llama()
    report = prune(model, Recipe(objective="loss", selector="optima", scope="layer"), calibration=make_tokens())
    assert report.rows_not_converged == 0
    assert report.run.recipe["objective"] == "loss"
    assert all(linear.error_plain != linear.error for linear in report.linears)


def test_the_metric_of_tuning_is_the_second_moment_of_the_gradients() -> None:
    model = make_llama().eval()
    assert fisher_of(model)[0].residual == {}
    tokens_NL = make_tokens(8, 16)
    stack = stack_of(model)
    batches = list(tokens_NL.split(4))
    found = fisher_weights(model, stack, capture(model, stack, batches, whole=True), 3, residual=True)
    seen: list[torch.Tensor] = []
    stack.blocks[0].module.register_forward_hook(
        lambda module, args, output: seen.append(output) or output.retain_grad()
    )
    generator, expected_EE = torch.Generator().manual_seed(3), torch.zeros(32, 32)
    for tokens_BL in batches:
        drawn_T = torch.rand(tokens_BL.shape, generator=generator).flatten()
        logits_TV = model(input_ids=tokens_BL).logits.flatten(0, 1)
        logits_TV.backward(label_gradient(logits_TV.detach(), drawn_T))
        gradient_TE = seen[-1].grad.flatten(0, 1)  # type: ignore[union-attr]
        expected_EE += gradient_TE.mT @ gradient_TE / tokens_NL.numel()
    assert torch.allclose(found.residual["model.layers.0"], expected_EE, rtol=1e-3, atol=1e-10)


def test_labels_are_drawn_from_the_model() -> None:
    logits_V = torch.randn(1500, generator=torch.Generator().manual_seed(0)) * 3
    p_V = logits_V.softmax(0)
    drawn_T = (torch.arange(20000) + 0.5) / 20000
    gradient_TV = label_gradient(logits_V.expand(20000, -1), drawn_T)
    assert torch.allclose((p_V - gradient_TV).mean(dim=0), p_V, atol=2e-4)
    assert bool(((p_V - gradient_TV).round() == (p_V - gradient_TV > 0.5)).all())
    assert torch.allclose(gradient_TV.sum(dim=1), torch.zeros(20000), atol=1e-4)


def test_an_encoder_is_weighed_by_its_hidden_states() -> None:
    found, _ = fisher_of(make_bert().eval())
    assert found.loss == "the square of the change of the last hidden states"
    assert all(bool(row_O.any()) for row_O in found.rows.values())


def test_a_model_for_pretraining_is_weighed_by_its_words() -> None:
    torch.manual_seed(0)
    model = BertForPreTraining(make_bert().config).eval()
    report = prune(model, Recipe(pattern=["2:4"]), calibration=make_tokens())
    assert report.run.recipe["objective"] == "loss"
    assert not [note for note in report.run.notes if "sink" in note]


def test_what_tuning_needs_keeps_to_the_budget(tmp_path: Path) -> None:
    model = make_llama(hidden_size=128)
    stack = stack_of(model)
    store = Store(0, tmp_path)
    acts = capture(model, stack, list(make_tokens(8, 16).split(4)), whole=True, store=store)
    before = store.mapped
    found = fisher_weights(model, stack, acts, seed=3, residual=True)
    assert store.mapped - before == sum(4 * metric_EE.numel() for metric_EE in found.residual.values()) > 0


def test_blocks_that_are_not_pruned_carry_gradients() -> None:
    report = prune(make_llama(), Recipe(objective="loss", targets=[r"layers\.0\."]), calibration=make_tokens())
    assert {linear.block for linear in report.linears} == {0}


def test_a_model_without_gradients_takes_the_sink_and_says_so() -> None:
    with torch.inference_mode():
        model, sink = make_llama(), make_llama()
        report = prune(model, Recipe(objective="loss"), calibration=make_tokens())
        prune(sink, Recipe(objective="sink"), calibration=make_tokens())
    (note,) = [note for note in report.run.notes if "objective sink replaces objective loss" in note]
    assert note.endswith("; weights are ranked by row; all linears have the same sparsity")
    assert ", and blocks are not tuned, because there are no gradients: " in note
    assert {linear.pattern for linear in report.linears} == {"0.5 per row"}
    assert report.run.recipe["scope"] is None  # that of the report gives the same run again
    with torch.inference_mode():
        again = prune(make_llama(), Recipe(**report.run.recipe), calibration=make_tokens())
        named = prune(make_llama(), Recipe(objective="loss", scope="layer"), calibration=make_tokens())
    assert [linear.pattern for linear in again.linears] == [linear.pattern for linear in report.linears]
    assert {linear.pattern for linear in named.linears} == {"0.5 per layer"}
    assert named.run.recipe["scope"] == "layer"
    assert all(own.equal(other) for own, other in zip(model.parameters(), sink.parameters(), strict=True))


@pytest.mark.parametrize("place", ["layers.1", "norm"])
def test_so_does_one_whose_kernels_have_no_backward_pass(place: str) -> None:
    model = make_llama()
    module = model.model.get_submodule(place)
    forward = module.forward
    module.forward = lambda hidden, *args, **kwargs: forward(NoBackward.apply(hidden), *args, **kwargs)
    report = prune(model, Recipe(), calibration=make_tokens())
    (note,) = [note for note in report.run.notes if "objective sink replaces objective loss" in note]
    assert "has no backward pass (" in note


def test_a_block_that_is_done_is_forgotten() -> None:
    found, _ = fisher_of(make_llama())
    left = {name for known in (found.tokens, found.rows) for name in known}
    found.forget([name for name in left if "layers.0" in name])
    assert {name for known in (found.tokens, found.rows) for name in known} == {
        name for name in left if "layers.0" not in name
    }


def test_what_ranks_nothing_is_told_of_no_scope() -> None:
    with torch.inference_mode():
        report = prune(make_llama(), Recipe(objective="loss", pattern=["2:4"]), calibration=make_tokens())
    (note,) = [note for note in report.run.notes if "objective sink replaces objective loss" in note]
    assert "ranked" not in note


def test_gradients_that_overflow_inside_the_first_block_are_told() -> None:
    model = make_llama()
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(5e-3)
        model.lm_head.weight.mul_(300.0)
        model.model.layers[0].mlp.down_proj.weight.mul_(300.0)
    report = prune(model.half(), Recipe(batch_size=4), calibration=make_tokens(8, 16))
    assert any("objective sink replaces objective loss" in note for note in report.run.notes)


def test_an_expert_that_no_token_reached_takes_nothing_from_others() -> None:
    arguments = FAMILIES["mixtral"][2] | {"num_local_experts": 5}
    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(**arguments)).eval()
    with torch.no_grad():
        for name, router_ED in model.named_parameters():
            if name.endswith("gate.weight"):  # two of the first four are always before the last
                router_ED.copy_(torch.tensor([1.0, 0.9, -1.0, -0.9, 0.0])[:, None] * router_ED[0])
    report = prune(copy.deepcopy(model), Recipe(batch_size=4, allocation="loss"), calibration=make_ids(16))
    experts = [linear for linear in report.linears if ".experts." in linear.name]
    unreached = [linear for linear in experts if not linear.tokens]
    assert unreached
    # Rounding to whole weights of a row moves a sparsity by as much.
    assert min(each.sparsity for each in unreached) > max(each.sparsity for each in experts) - 1e-3


def test_labels_of_the_batches_are_not_the_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optima.calibration.lm_head.LOGITS_BYTES", 4 * VOCAB * 2 * 8)
    places_BL = torch.arange(16).repeat(2, 1)  # without them, token ids alone would be read
    batches = [{"input_ids": own, "position_ids": places_BL, "labels": own} for own in make_tokens(4, 16).split(2)]
    assert prune(make_llama(), Recipe(), calibration=batches).run.recipe["objective"] == "loss"


def test_without_gradients_what_is_shared_out_by_the_loss_is_not() -> None:
    named = {"scope": "layer", "allocation": "loss"}
    with torch.inference_mode():
        model, sink = make_llama(), make_llama()
        report = prune(model, Recipe(**named), calibration=make_tokens())
        prune(sink, Recipe(objective="sink", scope="layer"), calibration=make_tokens())
    assert any(note.endswith("; all linears have the same sparsity") for note in report.run.notes)
    assert {linear.pattern for linear in report.linears} == {"0.5 per layer"}
    assert all(own.equal(other) for own, other in zip(model.parameters(), sink.parameters(), strict=True))


@pytest.mark.parametrize("make", [make_llama, make_bert])
def test_a_part_of_the_sequences_stands_for_all(
    make: Callable[[], torch.nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("optima.calibration.fisher.LEAST_TOKENS", 1)
    monkeypatch.setattr("optima.calibration.weights.EFFECTIVE", 0)  # so few tokens would weigh alike
    whole, _ = fisher_of(make().eval(), 2)
    part, _ = fisher_of(make().eval(), 2, fraction=0.5)
    for name, own in whole.tokens.items():
        used_T, own_T = (torch.cat([each[batch] for batch in (0, 2)]) for each in (part.tokens[name], own))
        torch.testing.assert_close(used_T / used_T.mean(), own_T / own_T.mean(), rtol=1e-3, atol=1e-12)  # same labels
        for batch in (1, 3):  # the others weigh what those of their position do
            expected_NL = used_T.reshape(4, 16).mean(dim=0).expand(2, 16)
            assert torch.allclose(part.tokens[name][batch].reshape(2, 16), expected_NL, rtol=1e-3, atol=1e-12)
    assert part.rows.keys() == whole.rows.keys()


def test_labels_of_an_encoder_do_not_depend_on_what_else_is_swept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optima.calibration.fisher.LEAST_TOKENS", 1)
    model, batches = build("t5"), list(make_ids(8, 15).split(2))  # 7 tokens go to the encoder, and 8 to the decoder
    stack, _ = select_linears(find_stacks(model), [".*"], [])
    whole, part = (
        fisher_weights(model, stack, capture(model, stack, batches, whole=True), 3, share=share) for share in (1.0, 0.5)
    )
    for name, own in whole.tokens.items():
        scale = own[2].mean() / part.tokens[name][2].mean()
        assert torch.allclose(part.tokens[name][2] * scale, own[2], rtol=1e-3, atol=1e-12)


def test_a_vision_tower_does_not_run_for_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("gemma3_vision")
    ids = make_ids(2, 12).clamp_max(90)
    ids[:, 2:6] = model.config.image_token_index
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "pixel_values": images, "token_type_ids": (ids == 99).long()}
    stack, calls = stack_of(model), list[int]()
    acts = capture(model, stack, [batch], whole=True)
    (patches,) = (module for module in model.modules() if isinstance(module, torch.nn.Conv2d))
    patches.register_forward_hook(lambda *given: calls.append(1))
    whole = fisher_weights(model, stack, acts, seed=0)
    monkeypatch.setattr("optima.calibration.lm_head.LOGITS_BYTES", 4 * 101 * 2 * 3)  # three positions at a time
    sliced = fisher_weights(model, stack, acts, seed=0)
    assert not calls
    for name, row_O in whole.rows.items():
        torch.testing.assert_close(sliced.rows[name], row_O, rtol=1e-4, atol=1e-9)


def test_an_encoder_is_swept_sample_by_sample() -> None:
    """Autograd keeps the whole decoder of what is together."""
    model, batches = build("t5"), list(make_ids(4, 15).split(2))
    stack, _ = select_linears(find_stacks(model), [".*"], [])
    acts, together = capture(model, stack, batches, whole=True), set[int]()
    model.decoder.register_forward_pre_hook(
        lambda _, __, given: together.add(len(given["input_ids"])), with_kwargs=True
    )
    found = fisher_weights(model, stack, acts, 3)
    assert together == {1}
    assert all(len(each[0]) == 2 * 7 for each in found.tokens.values())


def test_few_tokens_are_all_swept() -> None:
    whole, part = fisher_of(make_llama().eval(), 2)[0], fisher_of(make_llama().eval(), 2, fraction=0.25)[0]
    assert all(torch.equal(part.rows[name], row_O) for name, row_O in whole.rows.items())
    assert fisher_share(0.25, 64 * 512) == fisher_share(0.25, 2**20) == 0.25
    assert fisher_share(0.25, 32 * 512) == 0.5


def test_a_run_hands_the_weights_of_rows_to_the_selector() -> None:
    seen = {}

    class Spy(Wanda):
        def select(self, task: LinearTask, pattern: Pattern) -> Selection:
            seen[task.name] = task.row_weight_O
            return super().select(task, pattern)

    prune(make_llama(), Recipe(selector=Spy(), seed=3, batch_size=4), calibration=make_tokens(8, 16))
    found, _ = fisher_of(make_llama().eval(), 4)
    assert seen.keys() == found.rows.keys()
    for name in found.rows:
        torch.testing.assert_close(seen[name], found.of_rows(name), rtol=1e-4, atol=0.0)


def test_experts_of_few_tokens_and_of_a_part_of_the_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optima.calibration.fisher.LEAST_TOKENS", 1)
    monkeypatch.setattr("optima.calibration.weights.EFFECTIVE", 0)
    monkeypatch.setattr("optima.calibration.weights.FEW_TOKENS", 1e12)
    model = build("mixtral")
    stack = stack_of(model)
    acts = capture(model, stack, list(make_ids(8, 16).split(2)), whole=True)
    found = fisher_weights(model, stack, acts, seed=0, share=0.5)
    assert found.routed
    for name, pairs in found.routed.items():
        known_T = torch.cat([own_T for _, own_T in pairs])
        every_T = torch.cat([known_T, torch.ones_like(known_T)])  # as many are to come
        assert found.effective_tokens(name) == pytest.approx(float(every_T.sum() ** 2 / every_T.square().sum()))
    for name, row_O in found.rows.items():
        assert (float(row_O.std()) < 1e-6 * float(row_O.mean())) == (name in found.routed), name


def test_tokens_of_a_block_weigh_the_square_of_the_gradient_at_its_output() -> None:
    model = make_llama().eval()
    found, tokens_NL = fisher_of(model)
    seen: list[torch.Tensor] = []
    model.model.layers[0].register_forward_hook(
        lambda module, args, output: seen.append(output) or output.retain_grad()
    )
    generator = torch.Generator().manual_seed(3)
    roots = []
    for tokens_BL in tokens_NL.split(4):
        drawn_T = torch.rand(tokens_BL.shape, generator=generator).flatten()
        logits_TV = model(input_ids=tokens_BL).logits.flatten(0, 1)
        logits_TV.backward(label_gradient(logits_TV.detach(), drawn_T))
        roots.append(seen[-1].grad.square().sum(dim=-1).flatten().sqrt())
    own_T, root_T = torch.cat(found.tokens["model.layers.0"]), torch.cat(roots)
    torch.testing.assert_close(own_T, root_T / root_T.mean(), rtol=1e-3, atol=1e-12)


def test_without_words_the_gradients_of_the_last_hidden_states_are_signs() -> None:
    model = make_bert().eval()
    stack = stack_of(model)
    acts = capture(model, stack, list(make_tokens(8, 16).split(4)), whole=True)
    product_EE = fisher_weights(model, stack, acts, seed=3, residual=True).residual[stack.blocks[-1].name]
    assert torch.equal(product_EE.diagonal(), torch.ones(32))
    assert float((product_EE - torch.eye(32)).abs().max()) < 0.5, "each is either with the same probability"


def test_no_word_without_probability_is_drawn() -> None:
    weight_TV = torch.zeros(2, 700)
    weight_TV[0, 600] = weight_TV[1, 3] = 1.0
    label_T1, _ = sampled_tokens(weight_TV, torch.zeros(2))
    assert label_T1[:, 0].tolist() == [600, 3]


def test_a_survey_of_some_batches_has_the_weights_of_their_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optima.calibration.fisher.LEAST_TOKENS", 1)
    model = make_llama()
    stack = stack_of(model)
    acts = capture(model, stack, list(make_tokens(8, 16).split(2)), whole=True)
    taken = fisher_batches(acts, 0.5)
    assert taken == [0, 2]
    monkeypatch.setattr("optima.calibration.weights.EFFECTIVE", 0)  # so few tokens would weigh alike
    found = fisher_weights(model, stack, acts, seed=3)
    seen = {}

    def spy(task: LinearTask) -> torch.Tensor:
        seen[task.name] = task.hessian.matrix_DD
        return saliency_quantiles(task)

    monkeypatch.setattr(sys.modules["optima.prune"], "saliency_quantiles", spy)
    job = Job(Methods(Magnitude()), torch.device("cpu"), 0.01, 0.0, loss=found)
    job.sensitivity(stack, acts, 0.5, taken)
    assert job.loss is found
    for each in observe(stack.blocks[0], acts.part(taken), 0.0, 0.01, None, found.part(taken)):
        assert each.statistics is not None
        torch.testing.assert_close(seen[each.linears[0].name], each.statistics.hessian.matrix_DD)


def test_the_report_tells_of_how_many_tokens_count() -> None:
    by_loss, plain = (
        prune(make_llama(), Recipe(objective=objective), calibration=make_tokens()).linears
        for objective in ("loss", "plain")
    )
    assert all(0.0 < linear.tokens_effective <= linear.tokens for linear in by_loss)  # type: ignore[operator]
    assert all(linear.tokens_effective is None for linear in plain)


def test_without_gradients_first_tokens_weigh_as_by_the_sink() -> None:
    with torch.inference_mode():
        model, sink = make_llama(), make_llama()
        prune(model, Recipe(objective="loss"), calibration=make_tokens(5, 64))
        prune(sink, Recipe(objective="sink"), calibration=make_tokens(5, 64))
    assert all(own.equal(other) for own, other in zip(model.parameters(), sink.parameters(), strict=True))
