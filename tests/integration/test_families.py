"""Every family of the library that we name: prune, save, reload, and compare with the model in memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import FAMILIES, REFUSED, VOCAB, build, make_ids
from rich.console import Console
from safetensors.torch import load_file
from tiny import make_llama
from torch import Tensor, nn

from optima import Recipe, order, prune
from optima.calibration.activations import capture
from optima.errors import CalibrationError, ModelError, RecipeError
from optima.models.blocks import Linear, Stack, find_stacks, select_linears
from optima.models.inputs import Batch, arguments
from optima.models.inspect import check_length, head_of
from optima.models.load import find_source
from optima.names import kind
from optima.plan import make_plan, print_plan
from optima.reporting.record import Report

UNREACHED = ("dt_proj",)  # Jamba and Mamba read its weight without calling it


def outputs(model: nn.Module, batch: Batch | None = None) -> Tensor:
    with torch.no_grad():
        result = model(**arguments(model, make_ids(2, 16) if batch is None else batch))
    return result.logits if "logits" in result else result.last_hidden_state


def linears_to_prune(model: nn.Module) -> dict[str, Linear]:
    stacks = select_linears(find_stacks(model), [".*"], [])
    return {linear.name: linear for stack in stacks for block in stack.blocks for linear in block.linears}


@pytest.mark.parametrize("family", FAMILIES)
def test_prune_save_reload(family: str, tmp_path: Path) -> None:
    pattern = "0.5" if len(family) % 2 else "2:4"  # one of the two for each
    model = build(family)
    dense = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    check_chain(model)
    recipe = Recipe(batch_size=2, pattern=[pattern], allocation="uniform")
    report = prune(model, recipe, output_dir=tmp_path / "out", calibration=make_ids())

    linears = linears_to_prune(model)
    pruned = {record.name for record in report.linears}
    assert pruned == {name for name in linears if not name.endswith(UNREACHED)}
    assert report.rows_not_converged == 0
    for record in report.linears:
        assert record.error <= record.error_mask * (1 + 1e-6) + 1e-12
        check_counts(linears[record.name].read() == 0, pattern)
    check_everything_is_named(model, report)

    reloaded = type(model).from_pretrained(tmp_path / "out").eval()
    assert torch.equal(outputs(reloaded), outputs(model))
    owners = pruned | {name.rpartition(".")[0] for name in pruned if linears[name].expert}
    vectors = {name for name, parameter in model.named_parameters() if parameter.ndim == 1}  # which tuning changes too
    for name, tensor in model.state_dict().items():
        if name.removesuffix(".weight") not in owners and name not in vectors:
            assert torch.equal(tensor, dense[name]), f"{name} is not to be pruned and changed"
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "report.json", "report.md", "recipe.yaml"} <= files


def check_counts(zeros_OD: Tensor, pattern: str) -> None:
    if pattern == "2:4":
        assert (zeros_OD.reshape(-1, 4).sum(dim=1) == 2).all()
    else:
        assert int(zeros_OD.sum()) == round(0.5 * zeros_OD.numel())


def check_everything_is_named(model: nn.Module, report: Report) -> None:
    pruned, notes = {record.name for record in report.linears}, " ".join(report.run.notes)
    embeddings = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    head = {parameter for module in [head_of(model)] if module is not None for parameter in module.parameters()}
    blocks = tuple(f"{block.name}." for stack in find_stacks(model) for block in stack.blocks)
    for name, parameter in model.named_parameters():
        owner = name.removesuffix(".weight")
        vector = parameter.ndim < 2 or name.endswith("bias")  # experts and heads may have one each
        if vector or owner in pruned or f"{owner}.0" in pruned or parameter in head:
            continue
        if parameter not in embeddings or name.startswith(blocks):
            assert {kind(name), kind(owner), owner} & set(notes.split()), f"{name} stays dense without a word"


def check_chain(model: nn.Module) -> None:
    """Carrying the inputs from block to block gives bit for bit what the model's own forward pass gives."""
    for stack in find_stacks(model):
        check_chain_of(model, stack)


def check_chain_of(model: nn.Module, stack: Stack) -> None:
    acts = capture(model, whole(stack), make_ids().split(2))
    expected: list[Tensor] = []
    handle = stack.blocks[-1].module.register_forward_hook(
        lambda module, args, output: expected.append(output[0] if isinstance(output, (tuple, list)) else output)
    )
    # A cache copies keys, and some processors multiply a copy in another order: as in capture, there is none.
    without = {"use_cache": False} if getattr(model.config, "use_cache", None) is not None else {}
    with torch.no_grad():
        for batch in acts.batches:
            model(**arguments(model, batch), **without)
    handle.remove()
    for block in stack.blocks:
        acts.forward(block)
    for hidden, want in zip(acts.hidden, expected, strict=True):
        assert torch.equal(hidden, want)


def whole(stack: Stack) -> Stack:
    """The stack, every block of which is needed."""
    assert stack.needed == len(stack.blocks)
    return stack


@pytest.mark.parametrize("family", REFUSED)
def test_what_cannot_be_pruned_is_refused_by_name_before_the_work(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optima.calibration.activations.Activations.groups", lambda *_: pytest.fail("has begun"))
    model = build(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ModelError, match=REFUSED[family][1]):
        prune(model, Recipe(), calibration=make_ids())
    if family != "rwkv-rescaled":  # its own forward pass changes its weights
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_blocks_that_share_weights_can_be_pruned_around_them() -> None:
    report = prune(build("zamba2"), Recipe(ignore=["shared_transformer"]), calibration=make_ids())
    assert len(report.linears) == 10
    assert any("shared_transformer.self_attn.q_proj (2 places)" in note for note in report.run.notes)


def test_what_blocks_share_is_not_tuned(tmp_path: Path) -> None:
    """Tuned in one of them it would change the dense outputs of the other, and the file can hold one only."""
    model = build("zamba2")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    recipe = Recipe(ignore=["shared_transformer"], tuning_epochs=2, learning_rate=3e-3, allocation="uniform")
    report = prune(model, recipe, output_dir=tmp_path / "out", calibration=make_ids(24))
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert not [name for name in changed if "shared_transformer" in name]
    assert [name for name in changed if name.endswith("norm.weight")]
    assert any(linear.tuned for linear in report.linears if linear.block == 1)
    written = type(model).from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(tensor, written[name]) for name, tensor in model.state_dict().items())


def test_sounds_and_their_words(tmp_path: Path) -> None:
    model = build("whisper")
    torch.manual_seed(1)
    batches = [{"input_features": torch.randn(2, 8, 24), "decoder_input_ids": make_ids(2, 7)} for _ in range(4)]
    recipe = Recipe(pattern=["2:4"], tuning_epochs=1)
    report = prune(model, recipe, output_dir=tmp_path / "out", calibration=batches)
    linears = linears_to_prune(model)
    assert {record.name for record in report.linears} == set(linears)
    assert {record.block for record in report.linears} == {0, 1, 2, 3}
    assert report.run.num_tokens == 4 * 2 * 7
    for linear in linears.values():
        check_counts(linear.read() == 0, "2:4")
    check_everything_is_named(model, report)
    reloaded = type(model).from_pretrained(tmp_path / "out").eval()
    assert torch.equal(outputs(reloaded, batches[0]), outputs(model, batches[0]))


def test_what_a_processor_returns_is_rounded_to_the_models_dtype() -> None:
    torch.manual_seed(1)
    batches = [{"input_features": torch.randn(2, 8, 24), "decoder_input_ids": make_ids(2, 7)}]
    report = prune(build("whisper").bfloat16(), Recipe(pattern=["2:4"]), calibration=batches)
    assert report.run.dtype == "bfloat16"


def test_a_weight_that_is_read_without_a_call_stays_dense_and_is_told() -> None:
    model = build("mamba")
    before = model.backbone.layers[0].mixer.dt_proj.weight.clone()
    report = prune(model, Recipe(objective="sink"), calibration=make_ids())
    assert model.backbone.layers[0].mixer.dt_proj.weight.equal(before)
    assert not prune(build("mamba"), Recipe(targets=["dt_proj"]), calibration=make_ids()).linears
    told = [note for note in report.run.notes if "layers.0.mixer.dt_proj was not pruned" in note]
    assert len(told) == 1
    assert "its module was never called" in told[0]


def test_biases_of_experts_are_no_matrices() -> None:
    report = prune(build("gpt_oss"), Recipe(objective="sink"), calibration=make_ids())
    assert not [note for note in report.run.notes if "bias" in note]


def test_eigenvalues_that_nobody_finds_are_refused_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optima.plan.MOST_EIGENVALUES", 31)
    with pytest.raises(RecipeError, match=r"alps needs the eigenvalues .* 32 inputs are more than 31"):
        prune(make_llama(), Recipe(selector="alps"), calibration=make_ids())
    prune(make_llama(), Recipe(objective="sink"), calibration=make_ids())


def test_the_decoder_is_calibrated_on_the_pruned_encoder() -> None:
    """With and without pruning the encoder, the decoder's masks differ; by themselves they would be the same."""
    whole, decoder = build("t5"), build("t5")
    prune(whole, Recipe(pattern=["2:4"]), calibration=make_ids())
    report = prune(decoder, Recipe(pattern=["2:4"], targets=["^decoder"]), calibration=make_ids())
    assert {linear.block for linear in report.linears} == {3, 4, 5}, "as where the encoder's blocks are pruned too"
    cross = "decoder.block.1.layer.1.EncDecAttention.k"
    assert not torch.equal(linears_to_prune(whole)[cross].read(), linears_to_prune(decoder)[cross].read())
    assert not (linears_to_prune(decoder)["encoder.block.0.layer.0.SelfAttention.q"].read() == 0).any()


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        ([{"input_features": [1.0]}], "batch 0: input_features is a list, not a tensor"),
        ([{"sounds": torch.ones(2, 3)}], "batch 0 has sounds, which WhisperForConditionalGeneration does not read"),
        ([{"input_features": torch.ones(1, 8, 23)}], "cannot run on what it is given"),
        ([{"text": "a record"}], "holds text, but no input_ids: .* such as calibration=dataset"),
    ],
)
def test_batches_that_do_not_fit(calibration: list[dict[str, Tensor]], message: str) -> None:
    with pytest.raises((CalibrationError, ModelError), match=message):
        prune(build("whisper"), Recipe(), calibration=calibration)


def pairs(**more: Tensor) -> list[dict[str, Tensor]]:
    """What a collator of pairs of texts returns."""
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} | more for ids in make_ids(4, 8).split(2)]


def test_a_decoder_is_calibrated_on_the_labels_that_are_given() -> None:
    """Not on the second half of the text."""
    model, named = build("t5"), build("t5")
    report = prune(model, Recipe(), calibration=pairs(labels=make_ids(2, 10)))
    start = torch.full((2, 1), named.config.decoder_start_token_id)
    shifted = torch.cat([start, make_ids(2, 10)[:, :-1]], dim=1)
    prune(named, Recipe(), calibration=pairs(decoder_input_ids=shifted))
    assert report.run.num_tokens == 2 * 2 * 10
    assert all(own.equal(other) for own, other in zip(model.parameters(), named.parameters(), strict=True))


def test_labels_where_the_head_goes_by_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slice of logits is not held against them, and the decoder still reads them."""
    monkeypatch.setattr("optima.calibration.lm_head.LOGITS_BYTES", 4 * VOCAB * 3)
    model, named, whole = build("t5gemma"), build("t5gemma"), build("t5gemma")
    labels = make_ids(2, 10)
    report = prune(model, Recipe(), calibration=pairs(labels=labels))
    shifted = model.prepare_decoder_input_ids_from_labels(labels)
    prune(named, Recipe(), calibration=pairs(decoder_input_ids=shifted))
    assert not any("objective" in note for note in report.run.notes)
    assert all(own.equal(other) for own, other in zip(model.parameters(), named.parameters(), strict=True))
    # What cannot make the decoder's words of them keeps them, and is not asked for slices.
    monkeypatch.delattr("transformers.T5GemmaForConditionalGeneration.prepare_decoder_input_ids_from_labels")
    assert prune(whole, Recipe(), calibration=pairs(labels=labels)).run.notes == report.run.notes


def test_the_encoder_runs_once_for_all_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, counts = [], []
    for words in (1, 100):
        monkeypatch.setattr("optima.calibration.lm_head.LOGITS_BYTES", 4 * VOCAB * words)
        model = build("t5gemma")
        model.get_encoder().layers[0].register_forward_hook(lambda *_: calls.append(1))
        prune(model, Recipe(tuning_epochs=0, targets=["decoder"]), calibration=make_ids(2, 10))
        counts.append(len(calls))
        calls.clear()
    assert counts[0] == counts[1] > 0


def test_labels_that_are_classes_are_no_words() -> None:
    with pytest.raises(CalibrationError, match=r"labels of shape \(2,\) are no tokens for the decoder: leave them out"):
        prune(build("t5"), Recipe(), calibration=pairs(labels=torch.tensor([0, 1])))


def test_padding_of_pairs_is_refused() -> None:
    labels = make_ids(2, 10)
    labels[1, 7:] = -100
    for padded in ({"labels": labels}, {"labels": labels.abs(), "decoder_attention_mask": labels > 0}):
        with pytest.raises(CalibrationError, match=r"padded, .* or of one sequence each"):
            prune(build("t5"), Recipe(), calibration=pairs(**padded))


def test_pairs_that_are_no_tensors_do_not_lose_their_labels() -> None:
    records = [{name: ids.tolist() for name, ids in batch.items()} for batch in pairs(labels=make_ids(2, 10))]
    for given in (records, iter(pairs(labels=make_ids(2, 10)))):
        with pytest.raises(CalibrationError, match=r"calibration .*(not a tensor|must be a list)"):
            prune(build("t5"), Recipe(), calibration=given)


def test_labels_that_nobody_reads_are_no_padding() -> None:
    """As of collators for fine-tuning, which leave out the prompt."""
    ids = make_ids(2, 10)
    batch = {"input_ids": ids, "position_ids": torch.arange(10).expand(2, 10), "labels": ids.clone()}
    batch["labels"][:, :4] = -100
    assert not any("padding" in note for note in prune(make_llama(), Recipe(), calibration=[batch]).run.notes)


def test_padding_beside_sounds_is_told() -> None:
    model = build("whisper")
    frames = 2 * model.config.max_source_positions
    batch = {"input_features": torch.randn(2, model.config.num_mel_bins, frames), "labels": make_ids(2, 10)}
    batch["labels"][1, 5:] = -100
    report = prune(model, Recipe(objective="sink"), calibration=[batch])
    assert "padding counts as text: 25% of the positions are padded" in report.run.notes


def test_embeddings_in_the_place_of_words() -> None:
    words, embedded = make_llama(), make_llama()
    ids = make_ids(2)
    with torch.no_grad():
        batch = {"inputs_embeds": embedded.get_input_embeddings()(ids)}
    told = prune(words, Recipe(), calibration=ids).run
    assert prune(embedded, Recipe(), calibration=[batch]).run.num_tokens == told.num_tokens == ids.numel()
    assert all(own.equal(other) for own, other in zip(words.parameters(), embedded.parameters(), strict=True))


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss", "granite_moe", "jamba"])
def test_a_mixture_that_asks_for_a_loss_of_its_routers(family: str) -> None:
    """As fine-tuned ones are saved: blocks that run in turn have no router logits for it."""
    model, plain = build(family), build(family)
    model.config.output_router_logits = True
    for each in (model, plain):
        prune(each, Recipe(tuning_epochs=0), calibration=make_ids())
    assert all(own.equal(other) for own, other in zip(model.parameters(), plain.parameters(), strict=True))
    assert model.config.output_router_logits


def test_a_model_that_returns_tuples_has_a_loss_all_the_same() -> None:
    model = build("t5")
    model.config.return_dict = False
    notes = prune(model, Recipe(tuning_epochs=0), calibration=make_ids()).run.notes
    assert not any("objective sink took the place" in note for note in notes)


@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
def test_a_model_made_inside_inference_mode(family: str) -> None:
    """Its weights change inside it alone, and views of them too."""
    expected, recipe = build(family), Recipe(objective="sink")
    with torch.inference_mode():
        model = build(family)
    for each in (expected, model):
        prune(each, recipe, calibration=make_ids())
    assert all(own.equal(other) for own, other in zip(model.parameters(), expected.parameters(), strict=True))
    with torch.inference_mode():
        model = build(family)
    assert order(model, Recipe(pattern="2:4", objective="sink"), calibration=make_ids()).channels


def test_as_many_pairs_are_taken_as_are_asked_for() -> None:
    pairs = [{"input_ids": make_ids(4, 16), "labels": make_ids(4, 12)} for _ in range(3)]
    report = prune(build("t5"), Recipe(num_calibration_samples=5, objective="sink"), calibration=pairs)
    assert report.run.recipe["num_calibration_samples"] == 5
    assert report.run.num_tokens == 5 * 12


def test_positions_by_another_name() -> None:
    with pytest.raises(ModelError, match="sequences of 65 tokens exceed the 64 positions of MptForCausalLM"):
        check_length(build("mpt"), 65)


def test_as_many_heads_as_samples_are_no_samples() -> None:
    """MPT's blocks are called with a position bias of (heads, 1, L): a batch comes in single sequences."""
    model = build("mpt")
    (stack,) = find_stacks(model)
    heads = model.config.n_heads
    assert [samples for samples, _ in capture(model, stack, [make_ids(heads)]).sizes] == [1] * heads


def test_experts_that_see_all_tokens_are_known() -> None:
    for family, sent in (("mixtral", True), ("gpt_oss", True), ("llama4", False)):
        found = [linear for linear in linears_to_prune(build(family)).values() if linear.expert]
        assert {linear.expert.experts.routed for linear in found} == {sent}, family


@pytest.mark.parametrize("family", FAMILIES)
def test_plan_needs_no_weights(family: str, tmp_path: Path) -> None:
    model = build(family)
    model.save_pretrained(tmp_path)
    for file in tmp_path.glob("*.safetensors"):
        file.write_bytes(b"not weights")
    plan = make_plan(find_source(str(tmp_path)), Recipe(max_seq_length=16))
    planned = {linear.name: linear.shape for linear in plan.linears}
    assert planned == {name: linear.shape for name, linear in linears_to_prune(model).items()}


def test_a_plan_shows_experts_in_one_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build("mixtral").save_pretrained(tmp_path)
    plan = make_plan(find_source(str(tmp_path)), Recipe(max_seq_length=16))
    print_plan(plan, "model", Console(width=120))
    told = capsys.readouterr().out
    assert "*.mlp.experts.down_proj.* (4)" in told
    assert "*.self_attn.q_proj " in told
    assert "down_proj.0" not in told


@pytest.mark.parametrize("options", [{"selector": "sparsegpt"}, {"selector": "magnitude"}, {"solver": "cholesky"}])
def test_selectors_and_solvers_end_to_end(options: dict[str, str]) -> None:
    report = prune(build("llama"), Recipe(sparsity=0.5, **options), calibration=make_ids())  # type: ignore[arg-type]
    assert report.rows_not_converged == 0
    assert all(record.error <= record.error_selector * (1 + 1e-6) for record in report.linears)


def test_bfloat16_and_sharing_of_tied_weights(tmp_path: Path) -> None:
    model = build("gemma3").to(torch.bfloat16)
    assert model.config.tie_word_embeddings
    embedding = model.get_input_embeddings().weight.clone()
    prune(model, Recipe(sparsity=0.5), output_dir=tmp_path / "out", calibration=make_ids())
    saved: dict[str, Tensor] = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        saved |= load_file(file)
    assert "lm_head.weight" not in saved
    assert torch.equal(saved["model.embed_tokens.weight"], embedding)
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}


def test_reloads_where_optima_is_not_installed(tmp_path: Path) -> None:
    model = build("llama")
    prune(model, Recipe(sparsity=0.5), output_dir=tmp_path / "out", calibration=make_ids())
    script = (
        "import sys; sys.modules['optima'] = None\n"
        "import torch; from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'out')!r})\n"
        f"ids = torch.tensor({make_ids(2, 16).tolist()})\n"
        f"torch.save(model(input_ids=ids).logits, {str(tmp_path / 'logits.pt')!r})\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path)
    assert torch.allclose(torch.load(tmp_path / "logits.pt"), outputs(model), atol=1e-5)


def test_same_seed_same_bits() -> None:
    first, second = build("llama"), build("llama")
    prune(first, Recipe(sparsity=0.6), calibration=make_ids())
    prune(second, Recipe(sparsity=0.6), calibration=make_ids())
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name])


def test_pairs_are_sized_by_what_they_show() -> None:
    """Not by the length that a recipe has for text; sounds show none."""
    report = prune(build("t5"), Recipe(), calibration=pairs(labels=make_ids(2, 10)))
    assert report.run.recipe["max_seq_length"] == 10
    ragged = [{"input_ids": make_ids(2, 8), "labels": [[1, 2]]}]
    with pytest.raises(CalibrationError, match="labels is a list, not a tensor"):
        prune(build("t5"), Recipe(), calibration=ragged)
