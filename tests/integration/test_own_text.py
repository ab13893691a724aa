"""Calibration on text that the model itself writes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import families
import pytest
import torch
import transformers
from ranks import in_processes
from runs import raising
from tiny import make_bert, make_llama, make_tokenizer, save_model, weight_files
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from optima import Recipe, load_report, prune
from optima.cli import main
from optima.data.batches import Calibration
from optima.data.generate import KeptText, beginning, keys_bytes, own_text
from optima.distributed import Ranks
from optima.errors import CalibrationError, ModelError, NumericalError, RecipeError
from optima.models.source import find_source
from optima.plan import make_plan
from optima.preflight.settling import settle_own

CPU = torch.device("cpu")
SIZE = ["--num-calibration-samples", "4", "--max-seq-length", "24"]


def recipe(seed: int = 0) -> Recipe:
    return Recipe(dataset=["self"], num_calibration_samples=40, max_seq_length=24, seed=seed)


def written(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> Tensor:
    found = own_text(model, tokenizer, recipe, CPU)
    assert found.tokens_NL is not None
    assert not found.notes
    return found.tokens_NL


def test_sequences_are_full_and_those_of_the_seed() -> None:
    model, tokenizer = make_llama(), make_tokenizer()
    state = torch.get_rng_state()
    model.generation_config.eos_token_id = 7  # which does not end them
    model.generation_config.top_k = 1
    tokens_NL = written(model, tokenizer, recipe())
    assert tokens_NL.shape == (40, 24)
    assert (tokens_NL[:, 0] == 0).all(), "every text begins with BOS"
    assert len(tokens_NL[:, 1:].unique()) > 100, "words are drawn, not the likeliest taken"
    assert bool((tokens_NL[:, 1:-1] == 7).any())
    assert torch.equal(written(model, tokenizer, recipe()), tokens_NL)
    assert not torch.equal(written(model, tokenizer, recipe(seed=1)), tokens_NL)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.generation_config.eos_token_id == 7


def test_out_of_memory_fewer_are_written_together() -> None:
    model = make_llama()

    def refuse(module: torch.nn.Module, given: tuple[Tensor]) -> None:
        if len(given[0]) > 10:
            raise torch.OutOfMemoryError

    model.model.layers[1].mlp.register_forward_pre_hook(refuse)
    found = own_text(model, make_tokenizer(), recipe(), CPU)
    assert found.tokens_NL is not None
    assert found.tokens_NL.shape == (40, 24)
    (note,) = found.notes
    assert "10 sequences of its text at a time" in note


def test_words_have_the_models_probabilities() -> None:
    """The first words behind BOS, against the softmax."""
    model, tokenizer = make_llama(vocab_size=300), make_tokenizer()
    with torch.no_grad():
        model.lm_head.weight *= 20
        probability_V = model(torch.zeros(1, 1, dtype=torch.int64)).logits[0, 0].softmax(0)
    many = Recipe(dataset=["self"], num_calibration_samples=4000, max_seq_length=2)
    words = written(model, tokenizer, many)[:, 1]
    share_V = words.bincount(minlength=300) / len(words)
    assert float((share_V - probability_V).abs().max()) < 0.04
    assert float(probability_V.max()) > 0.05


def test_what_a_text_begins_with() -> None:
    assert beginning(make_tokenizer("bos")) == [0]
    assert beginning(make_tokenizer("none", eos_token="</s>")) == [1]
    chat = make_tokenizer("none")
    chat.chat_template = "{% for m in messages %}the {{ m.content }}{% endfor %}"
    assert chat.decode(beginning(chat)) == "the "
    chat.chat_template = "{% for m in messages %}the {% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}"
    assert chat.decode(beginning(chat)) == "the ", "a template that takes parts"
    chat = make_tokenizer("bos", bos_token="<s>")
    for own in ("", "{{ bos_token }}"):  # some templates leave BOS to the tokenizer
        chat.chat_template = own + "{% for m in messages %}the {{ m.content }}{% endfor %}"
        assert chat.decode(beginning(chat)) == "<s>the "
    chat = make_tokenizer("bos")
    chat.chat_template = "{{ raise_exception('no users') }}"
    assert beginning(chat) == [0]
    with pytest.raises(CalibrationError, match="neither a chat template nor"):
        beginning(make_tokenizer("none"))


@pytest.mark.parametrize("template", [None, "the {{ messages[0].content }}", "{{ raise_exception('no users') }}"])
def test_a_template_that_takes_no_user_is_told(template: str | None) -> None:
    tokenizer = make_tokenizer("bos")
    tokenizer.chat_template = template
    recipe = Recipe(dataset=["self"], num_calibration_samples=2, max_seq_length=16)
    notes = own_text(make_llama(), tokenizer, recipe, torch.device("cpu")).notes
    told = template is not None and "raise" in template
    assert [note.startswith("the chat template tells no beginning") for note in notes] == [True] * told


def test_a_run_and_its_repetition(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_model(Path("model"))
    for out in ("a", "b"):
        assert main(["prune", "model", "--output-dir", out, "--dataset", "self", *SIZE]) == 0
    assert weight_files(Path("a")) == weight_files(Path("b"))
    report = load_report(Path("a"))
    assert report.run.recipe["dataset"] == ["self"]
    assert report.run.num_tokens == 4 * 24


def test_it_writes_what_data_sets_lack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And streams its weights, as it does without, where they lack nothing."""
    monkeypatch.chdir(tmp_path)
    save_model(Path("model"))
    Path("some.txt").write_text("the quick brown fox jumps over the lazy dog " * 5)
    for out, samples in (("mixed", "6"), ("read", "2")):
        asked = ["--num-calibration-samples", samples, "--max-seq-length", "24", "--dataset", "some.txt", "self"]
        assert main(["prune", "model", "--output-dir", out, *asked]) == 0
        report = load_report(Path(out))
        assert report.run.num_tokens == int(samples) * 24
        told = [note for note in report.run.notes if "wrote the other" in note]
        assert len(told) == (out == "mixed")
        assert all("text for 3 of 6 sequences, and the model wrote the other 3" in note for note in told)
        whole = [note for note in report.run.notes if "held in main memory: it writes its own text" in note]
        assert len(whole) == len(told)
        notes = make_plan(find_source("model"), Recipe(dataset=["some.txt", "self"], max_seq_length=24)).notes
        assert any(note.startswith("to write what the data sets lack, if they do") for note in notes)


def test_it_writes_a_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Although there would be more to read. A short text is refused as it is without, unless self is named too."""
    monkeypatch.chdir(tmp_path)
    save_model(Path("model"))
    Path("some.txt").write_text("the quick brown fox jumps over the lazy dog " * 20)
    size = ["--max-seq-length", "24", "--dataset", "some.txt"]
    for out, share, wrote in (("half", "0.5", 3), ("auto", "auto", 3), ("tenth", "0.1", 1)):  # at least one
        asked = ["--num-calibration-samples", "7", "--own-share", share]
        assert main(["prune", "model", "--output-dir", out, *size, *asked]) == 0
        report = load_report(Path(out))
        assert report.run.num_tokens == 7 * 24
        (told,) = [note for note in report.run.notes if "the model wrote the other" in note]
        assert f"text for {7 - wrote} of 7 sequences, and the model wrote the other {wrote}" in told
    recipe = Recipe(dataset=["some.txt"], own_share=0.5, max_seq_length=24, num_calibration_samples=7)
    plan = make_plan(find_source("model"), recipe)
    assert not plan.streamed
    assert any(note.startswith("to write its own text, the whole model") for note in plan.notes)
    many = ["--num-calibration-samples", "30", "--own-share", "0.5", "--output-dir", "many"]
    assert main(["prune", "model", *size, *many]) == 2
    assert main(["prune", "model", *size, "self", *many]) == 0
    assert load_report(Path("many")).run.num_tokens == 30 * 24


def test_by_auto_it_writes_where_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    """A recipe that says so serves every model, and every way to give text."""
    auto = Recipe(dataset=["a.txt"], own_share="auto", num_calibration_samples=4, max_seq_length=16)
    assert settle_own(make_llama(), auto, torch.float32, given=False)[0].own_share == 0.5
    assert settle_own(make_llama(), auto, torch.float32, given=True) == (replace(auto, own_share=0.0), "")
    itself = replace(auto, dataset=["self"])
    assert settle_own(make_llama(), itself, torch.float32, given=False) == (replace(itself, own_share=0.0), "")
    for model, told in ((make_bert(), "does not go on with a text"), (make_llama(), "--own-share 0.5 tries")):
        monkeypatch.setattr("optima.preflight.settling.WHOLE_SHARE", 1e-12)
        settled, note = settle_own(model, auto, torch.float32, given=False)
        assert settled.own_share == 0.0
        assert told in note
    report = prune(make_llama(), auto, calibration=families.make_ids(4, 16), tokenizer=make_tokenizer())
    assert report.run.recipe["own_share"] == 0.0
    with pytest.raises(RecipeError, match="own_share is for text that is read"):
        prune(make_llama(), replace(auto, own_share=0.5), calibration=families.make_ids(4, 16))
    with pytest.raises(RecipeError, match="own_share is for a dataset other than self"):
        Recipe(dataset=["self"], own_share=0.5)


def test_what_was_read_comes_first() -> None:
    read_NL = torch.arange(1, 24).expand(30, -1) + 24 * torch.arange(30)[:, None]
    read_NL = torch.cat([torch.zeros(30, 1, dtype=torch.int64), read_NL], dim=1)  # behind BOS, all words differ
    found = own_text(
        make_llama(), make_tokenizer(), replace(recipe(), dataset=["a.txt", "self"]), CPU, Calibration(read_NL)
    )
    assert found.tokens_NL is not None
    assert found.tokens_NL.shape == (40, 24)
    assert torch.equal(found.tokens_NL[:30], read_NL)
    own_NL = found.tokens_NL[30:]
    assert (own_NL[:, 0] == 0).all()
    for read_L, own_L in zip(read_NL, own_NL, strict=False):
        assert set(own_L[1:4].tolist()) <= set(read_L.tolist()), "a piece of the text that was read"
        assert (own_L[1:3] + 1 == own_L[2:4]).all()
    assert len({int(own_L[1] - read_L[1]) for read_L, own_L in zip(read_NL, own_NL, strict=False)}) > 3, (
        "from any place"
    )


def test_memory_limits_how_many_are_written_together(monkeypatch: pytest.MonkeyPatch) -> None:
    model, sizes = make_llama(), list[int]()
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda begun, **given: sizes.append(len(begun)) or generate(begun, **given))
    found = own_text(model, make_tokenizer(), recipe(), CPU, room=10 * keys_bytes(model, 24))
    assert sizes == [10] * 4
    assert not found.notes
    assert found.tokens_NL is not None
    assert found.tokens_NL.shape == (40, 24)


@pytest.mark.parametrize("family", ["llama", "gemma4", "deepseek_v3"])
def test_keys_and_values_are_not_more_than_is_counted(family: str) -> None:
    """Heads of some layers are wider than those of others, keys than values."""
    kind, config, arguments = families.FAMILIES[family]
    wider = {"gemma4": {"global_head_dim": 16}}.get(family, {})
    model = getattr(transformers, kind)(getattr(transformers, config)(**arguments | wider)).eval()
    with torch.no_grad():
        layers = model(families.make_ids(2, 8), use_cache=True).past_key_values.layers
    held = sum(each.keys.nbytes + each.values.nbytes for each in layers if each.keys is not None)
    assert 0 < held <= 2 * keys_bytes(model, 8)


def test_each_process_writes_its_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def work(ranks: Ranks) -> None:
        model = make_llama()
        generate = model.generate

        def noted(begun: Tensor, **given: object) -> Tensor:
            Path(f"wrote{ranks.rank}").write_text(str(len(begun)))
            written: Tensor = generate(begun, **given)
            return written

        model.generate = noted
        found = own_text(model, make_tokenizer(), recipe(), CPU, ranks=ranks)
        assert found.tokens_NL is not None
        assert found.tokens_NL.shape == (40, 24)
        assert len(found.tokens_NL.unique(dim=0)) == 40

    assert in_processes(3, work) == [0, 0, 0]
    assert [Path(f"wrote{rank}").read_text() for rank in range(3)] == ["14", "14", "12"]


def test_what_cannot_be_saved_is_refused_before_it_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = make_llama()
    model.generation_config.temperature, model.generation_config.do_sample = 0.5, False
    monkeypatch.setattr(model, "generate", raising(AssertionError("it writes")))
    with pytest.raises(ModelError, match="cannot save the configuration"):
        prune(model, recipe(), tokenizer=make_tokenizer(), output_dir="out", progress=False)
    model = make_llama()
    monkeypatch.setattr(model, "generate", raising(AssertionError("it writes")))
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(NumericalError, match="up_proj contains NaN"):
        prune(model, recipe(), tokenizer=make_tokenizer(), progress=False)
    assert not list(tmp_path.iterdir())


def test_a_model_without_finite_logits_writes_nothing() -> None:
    model = make_llama()
    with torch.no_grad():
        model.lm_head.weight[5, 3] = torch.nan
    with pytest.raises(CalibrationError, match="logits have NaN or Inf"):
        own_text(model, make_tokenizer(), recipe(), CPU)


@pytest.mark.parametrize("family", ["bart", "bert"])
def test_a_model_that_writes_none_is_refused_before_weights_are_read(family: str, tmp_path: Path) -> None:
    families.build(family).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"not weights")
    asked = Recipe(dataset=["self"], max_seq_length=16)
    with pytest.raises(CalibrationError, match="writes no text"):
        prune(tmp_path / "model", asked, output_dir=tmp_path / "out", tokenizer=make_tokenizer())
    with pytest.raises(CalibrationError, match="writes no text"):
        make_plan(find_source(str(tmp_path / "model")), asked)


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"writes no text .* other than self"):
        own_text(make_bert(), make_tokenizer("bert"), recipe(), CPU)
    with pytest.raises(CalibrationError, match="needs its tokenizer"):
        prune(make_llama(), recipe())
    with pytest.raises(CalibrationError, match="raise --max-seq-length"):
        own_text(make_llama(), make_tokenizer(), Recipe(num_calibration_samples=1, max_seq_length=1), CPU)


def test_a_text_that_was_kept_is_not_that_of_other_data(tmp_path: Path) -> None:
    read, other = (Calibration(torch.full((2, 8), number)) for number in (1, 2))
    kept = KeptText(tmp_path / "own-text", {"recipe": {"seed": 0}})
    assert kept.read(read) is None
    text = Calibration(torch.arange(32).reshape(4, 8), notes=("written",))
    kept.keep(text, read)
    found = kept.read(read)
    assert found is not None
    assert torch.equal(found.tokens_NL, text.tokens_NL)  # type: ignore[arg-type]
    assert found.notes == ("written",)
    with pytest.raises(ModelError, match="its data is other text"):
        kept.read(other)


def test_the_pieces_that_a_model_goes_on_from_are_those_of_the_seed() -> None:
    read = Calibration(torch.arange(24 * 10).reshape(10, 24))
    first, again, other = (
        own_text(
            make_llama(),
            make_tokenizer("none", eos_token="</s>"),
            Recipe(dataset=["a.txt", "self"], num_calibration_samples=20, max_seq_length=24, seed=seed),
            torch.device("cpu"),
            read,
        ).tokens_NL[10:, :3]  # type: ignore[index]
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_beginning_that_leaves_no_room_is_refused_before_weights_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "You are a helpful assistant. " * 9 + "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(save_model(tmp_path / "model"))
    monkeypatch.setattr("optima.preflight.opening.open_weights", raising(AssertionError))
    with pytest.raises(CalibrationError, match=r"no room for text behind the .* raise --max-seq-length"):
        prune(tmp_path / "model", recipe(), output_dir=tmp_path / "out")
