"""Reading text and packing its tokens, with a tiny tokenizer and files made here."""

import hashlib
import json
import logging
import os
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import LINES, TEMPLATES, make_tokenizer
from tokenizers import Tokenizer, models, processors
from transformers import PreTrainedTokenizerFast

from optima.data import records as records_module
from optima.data import text as text_module
from optima.data.chats import as_text
from optima.data.datasets import Documents, TextSource
from optima.data.text import SpecialTokens, calibration_tokens, data_hash, pack, special_tokens
from optima.errors import CalibrationError

TOKENIZERS = {template: make_tokenizer(template) for template in TEMPLATES}


def plain_ids(text: str) -> list[int]:
    return TOKENIZERS["none"](text)["input_ids"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_jsonl(path: Path, texts: list[str | None], **columns) -> str:
    path.write_text("".join(json.dumps({"text": text, **columns}) + "\n" for text in texts), encoding="utf-8")
    return str(path)


class TestReadDocuments:
    def test_each_kind_of_file(self, here: Path) -> None:
        (here / "a.txt").write_text("été\n\n\nlast line\n", encoding="utf-8")
        write_jsonl(here / "b.jsonl", ["one\ntwo", "", None], n=1)
        (here / "c.json").write_text(json.dumps([{"text": "three"}, {"text": "four"}]))
        pq.write_table(pa.table({"text": ["five", "six"]}), here / "d.parquet")
        documents = list(Documents(TextSource(("a.txt", "b.jsonl", "c.json", "d.parquet"))))
        assert documents == ["été\n\n\nlast line\n", "one\ntwo", "", "three", "four", "five", "six"]

    def test_records_however_json_holds_them(self, here: Path) -> None:
        records = [{"text": "één\u2028zwei"}, {"n": 1}, {"text": "\ud83d\ude00 \ud800"}, {"text": "a\x00\tb"}]
        lines = [json.dumps(record) for record in records]
        (here / "lines.json").write_bytes(b"\xef\xbb\xbf" + "\r\n\r\n".join(lines).encode())
        (here / "array.jsonl").write_text("\n" + json.dumps(records, ensure_ascii=True))
        (here / "pretty.jsonl").write_text("\n".join(json.dumps(record, indent=1) for record in records))
        mixed = [lines[0], *lines[1:3], "null", json.dumps(records[3], indent=1)]
        (here / "mixed.jsonl").write_text("{}\n{}{}\n{}\n{}".format(*mixed))
        for name in ("lines.json", "array.jsonl", "pretty.jsonl", "mixed.jsonl"):
            expected = ["één\u2028zwei", "\U0001f600 ?", "a\x00\tb"]
            assert list(Documents(TextSource((name,)))) == expected, name
            assert sorted(Documents(TextSource((name,)), seed=0)) == sorted(expected), name
        (here / "lists.json").write_text('[{"text": "a\nb"}]\n\n[{"text": "c"}]')
        (here / "newline.jsonl").write_text('{"text": "a\nb"}\n{"text": "c"}\n')
        for name in ("lists.json", "newline.jsonl"):
            assert list(Documents(TextSource((name,)))) == ["a\nb", "c"]
        (here / "raw.jsonl").write_bytes(b'{"text": "a\x01b"}\n["c"]')
        with pytest.raises(CalibrationError, match="line 2 holds a list, not an object with columns"):
            list(Documents(TextSource(("raw.jsonl",))))

    def test_other_columns_may_hold_anything_however_long_the_file_is(self, here: Path) -> None:
        """Readers that guess the types of columns from a first part stumble over the second."""
        with (here / "a.jsonl").open("w") as file:
            for number in range(1200):
                late = number > 1100
                other = {
                    "url": "x" if late else None,
                    "meta": "y" if late else {"a": 1},
                    **({"new": 1.5} if late else {}),
                }
                file.write(json.dumps({"text": str(number), "long": "z" * 10000, **other}) + "\n")
        for seed in (None, 0):
            assert sorted(map(int, Documents(TextSource(("a.jsonl",)), seed))) == list(range(1200))

    def test_a_record_over_several_lines_is_read_alone(self, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        texts = [str(number) for number in range(2000)]
        (here / "a.jsonl").write_text("\n".join(json.dumps({"text": text}, indent=1) for text in texts))
        records = records_module.JsonLines(here / "a.jsonl")
        numbers = [number for number, _ in records]
        assert [records[number]["text"] for number in numbers] == texts
        read = []
        decode = records_module.DECODER.raw_decode
        monkeypatch.setattr(records_module.DECODER, "raw_decode", lambda *given: read.append(given) or decode(*given))
        assert records[numbers[0]] == {"text": "0"}
        assert sum(len(text) for text, _ in read) < 200

    def test_home_directory(self, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A shell expands ~, but nothing does so in a recipe's file."""
        monkeypatch.setenv("HOME", str(here))
        (here / "a.txt").write_text("one")
        assert list(Documents(TextSource(("~/a.txt",)))) == ["one"]

    def test_leaves_nothing_behind(self, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        cache = here / "cache"
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", cache)
        name = write_jsonl(here / "b.jsonl", ["one"])
        list(Documents(TextSource((name,))))
        assert [path.name for path in here.iterdir()] == ["b.jsonl"]

    def test_reads_no_more_than_asked(self, here: Path) -> None:
        write_jsonl(here / "a.jsonl", ["one", "two", "three"])
        assert list(islice(Documents(TextSource(("a.jsonl", "missing.txt"))), 2)) == ["one", "two"]

    def test_seed_shuffles_all_local_files_together(self, here: Path) -> None:
        texts = [str(i) for i in range(40)]
        source = TextSource((write_jsonl(here / "a.jsonl", texts[:20]), write_jsonl(here / "b.jsonl", texts[20:])))
        assert list(Documents(source)) == texts
        shuffled = list(Documents(source, seed=0))
        assert sorted(shuffled) == sorted(texts)
        assert shuffled == list(Documents(source, seed=0))
        assert shuffled != list(Documents(source, seed=1))
        assert {int(text) < 20 for text in shuffled[:10]} == {True, False}

    def test_directory_is_read_as_the_hub_is(self, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", here / "cache")
        (here / "data").mkdir()
        write_jsonl(here / "data" / "train.jsonl", ["one", "two"])
        write_jsonl(here / "data" / "test.jsonl", ["three"])
        source = TextSource((str(here / "data"),), split="test")
        assert list(Documents(source)) == ["three"]
        local = write_jsonl(here / "local.jsonl", ["a", "b", "c"])
        turns = list(Documents(TextSource((str(here / "data"), local)), seed=3))
        assert sorted(turns) == ["a", "b", "c", "one", "two"]
        assert [text in "abc" for text in turns] == [True, False, True, False, True]
        with pytest.raises(CalibrationError, match=r"split nope.*Available splits: \['train', 'test'\].*--split"):
            list(Documents(TextSource((str(here / "data"),), split="nope")))
        with pytest.raises(CalibrationError, match=r"config en.*--dataset-config"):
            list(Documents(TextSource((str(here / "data"),), config="en")))

    @pytest.mark.parametrize("content", ["", "\n", "[]"])
    def test_file_without_records(self, here: Path, content: str) -> None:
        (here / "a.json").write_text(content)
        assert list(Documents(TextSource(("a.json",)))) == []

    def test_unreachable_hub(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def unreachable(*args, **kwargs):
            raise ConnectionError("Couldn't reach 'some/dataset' on the Hub")

        monkeypatch.setattr(records_module, "load_dataset_builder", unreachable)
        with pytest.raises(CalibrationError, match=r"'some/dataset' \(config en, split train\).*network.*local"):
            list(Documents(TextSource(("some/dataset",), config="en")))

    @pytest.mark.parametrize("name", ["missing.txt", "missing.jsonl", "missing.parquet"])
    def test_missing_file(self, here: Path, name: str) -> None:
        with pytest.raises(CalibrationError, match=rf"{name}.* cannot be read: .*check the file"):
            list(Documents(TextSource((name,))))

    @pytest.mark.parametrize(
        ("name", "content"),
        [("a.jsonl", b'{"text": "x"\nnot json\n'), ("a.parquet", b"text"), ("a.txt", b"\xe9"), ("a.csv", b"text\nx\n")],
    )
    def test_unreadable_file(self, here: Path, name: str, content: bytes) -> None:
        (here / name).write_bytes(content)
        with pytest.raises(
            CalibrationError, match=rf"dataset '{name}' cannot be read: .*\.txt/\.jsonl/\.json/\.parquet"
        ):
            list(Documents(TextSource((name,))))

    def test_a_chat_is_the_same_text_on_another_day(self) -> None:
        tokenizer, chat = make_tokenizer("bos"), [{"role": "user", "content": "hi"}]
        tokenizer.chat_template = (
            "{{ strftime_now('%d %b %Y, %Y-%m-%d') }} {% for m in messages %}{{ m.content }}{% endfor %}"
        )
        assert as_text(tokenizer, chat) == "26 Jul 2024, 2024-07-26 hi"

    def test_chats_are_read_by_the_models_template(self, here: Path) -> None:
        chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
        records = [{"messages": chat}, {"messages": []}, {"text": "plain"}, {"own": chat, "text": None}]
        (here / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        tokenizer = make_tokenizer(bos_token="<s>")
        tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
        assert list(Documents(TextSource(("a.jsonl",)), tokenizer=tokenizer)) == ["[user] hi[assistant] ho", "plain"]
        own = TextSource(("a.jsonl",), text_column="own")
        assert list(Documents(own, tokenizer=tokenizer)) == ["[user] hi[assistant] ho"] * 2

    def test_a_chat_that_is_written_down_is_no_text(self, here: Path) -> None:
        (here / "a.jsonl").write_text(json.dumps({"messages": json.dumps([{"role": "user", "content": "hi"}])}))
        with pytest.raises(CalibrationError, match=r"column 'messages' .* \(str\), not a list of messages"):
            list(Documents(TextSource(("a.jsonl",)), tokenizer=make_tokenizer()))
        assert list(Documents(TextSource(("a.jsonl",), text_column="messages")))

    def test_an_empty_chat_does_not_end_those_of_the_hub(self, monkeypatch: pytest.MonkeyPatch) -> None:
        chats = [{"messages": [] if place in (0, 3) else [{"role": "user", "content": "hi"}]} for place in range(6)]
        monkeypatch.setattr(records_module, "hub_records", lambda *given: (chats, None))
        tokenizer = make_tokenizer()
        tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
        documents = Documents(TextSource(("some/chats",)), tokenizer=tokenizer)
        assert list(documents) == ["hi"] * 4
        assert documents.skipped == 2

    def test_keys_that_a_message_lacks_are_not_there(self, here: Path) -> None:
        """Arrow gives each message of a column all keys that any of them has."""
        message = {"role": "user", "content": "hi", "tool_calls": None}
        (here / "a.jsonl").write_text(json.dumps({"messages": [message]}))
        tokenizer = make_tokenizer()
        count = "{% if 'tool_calls' in m %}{{ m.tool_calls|length }}{% endif %}"
        tokenizer.chat_template = f"{{% for m in messages %}}{count}{{{{ m.content }}}}{{% endfor %}}"
        assert list(Documents(TextSource(("a.jsonl",)), tokenizer=tokenizer)) == ["hi"]

    def test_the_beginning_that_only_a_template_writes_stays(self, here: Path) -> None:
        (here / "a.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "hi"}]}))
        tokenizer = make_tokenizer("none", bos_token="<s>")
        tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
        assert list(Documents(TextSource(("a.jsonl",)), tokenizer=tokenizer)) == ["<s>hi"]

    def test_c4_is_english_beside_other_text(self, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        asked = []

        def records(name: str, config: str | None, *rest: object) -> tuple[list[dict[str, str]], None]:
            asked.append((name, config))
            return [{"text": "hub"}], None

        monkeypatch.setattr(records_module, "hub_records", records)
        (here / "a.txt").write_text("mine")
        assert sorted(Documents(TextSource(("a.txt", "allenai/c4", "some/other")), seed=0)) == ["hub", "hub", "mine"]
        assert asked == [("allenai/c4", "en"), ("some/other", None)]

    def test_only_chats_that_are_taken_are_written_out(self, here: Path) -> None:
        roles = ["user"] * 9 + ["tool"]
        chats = [{"messages": [{"role": role, "content": "hi"}]} for role in roles]
        (here / "a.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
        tokenizer = make_tokenizer()
        tokenizer.chat_template = (
            "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
            "{{ m.content }}{% endfor %}"
        )
        documents = Documents(TextSource(("a.jsonl",)), 0, tokenizer)
        assert list(islice(documents, 2)) == ["hi", "hi"]
        with pytest.raises(CalibrationError, match="no tools"):
            list(documents)

    @pytest.mark.parametrize(("message", "keys"), [({"from": "human", "value": "hi"}, "from, value"), ({}, "nothing")])
    def test_messages_of_other_keys(self, here: Path, message: dict[str, str], keys: str) -> None:
        (here / "a.jsonl").write_text(json.dumps({"messages": [message, {"role": "user", "content": "hi"}]}))
        tokenizer = make_tokenizer()
        tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
        with pytest.raises(CalibrationError, match=f"a message of {keys}: each needs a role and a content"):
            list(Documents(TextSource(("a.jsonl",)), tokenizer=tokenizer))

    @pytest.mark.parametrize("seed", [None, 0])
    def test_one_of_several_files_may_hold_chats(self, here: Path, seed: int | None) -> None:
        (here / "a.jsonl").write_text(json.dumps({"content": "an article"}))
        (here / "c.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "hi"}]}))
        tokenizer = make_tokenizer()
        tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
        source = TextSource(("a.jsonl", "c.jsonl"), text_column="content")
        assert sorted(Documents(source, seed, tokenizer)) == ["an article", "hi"]

    @pytest.mark.parametrize("seed", [None, 0])
    def test_chats_do_not_stand_for_a_column_that_is_not_there(self, here: Path, seed: int | None) -> None:
        chat = [{"role": "user", "content": "hi"}]
        (here / "a.jsonl").write_text(json.dumps({"content": "an article", "messages": chat}))
        tokenizer = make_tokenizer()
        tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
        (here / "plain.txt").write_text("plain")
        for names in (("a.jsonl",), ("plain.txt", "a.jsonl")):
            documents = Documents(TextSource(names, text_column="contents"), seed, tokenizer)
            with pytest.raises(CalibrationError, match=r"no column 'contents' with text.*: content, messages"):
                next(iter(documents))
        assert list(Documents(TextSource(("plain.txt",), text_column="contents"), seed, tokenizer)) == ["plain"]

    @pytest.mark.parametrize("template", [None, "{{ messages[0].name.first }}", "{{ raise_exception('no system') }}"])
    def test_chats_that_cannot_be_read(self, here: Path, template: str | None) -> None:
        (here / "a.jsonl").write_text(json.dumps({"messages": [{"role": "system", "content": "x"}]}))
        tokenizer = make_tokenizer()
        tokenizer.chat_template = template
        with pytest.raises(CalibrationError, match=r"'a\.jsonl' (holds chats, which|does not fit)"):
            list(Documents(TextSource(("a.jsonl",)), tokenizer=tokenizer))

    def test_wrong_column_lists_the_columns(self, here: Path) -> None:
        name = write_jsonl(here / "a.jsonl", ["one"], count=1)
        with pytest.raises(CalibrationError, match=r"no column 'body'.*--text-column: text, count"):
            list(Documents(TextSource((name,), text_column="body")))
        with pytest.raises(CalibrationError, match=r"'count'.*holds \d+ .int., not text: .*: text"):
            list(Documents(TextSource((name,), text_column="count")))
        (here / "empty.jsonl").write_text('{"text": null}')
        with pytest.raises(CalibrationError, match=r"'empty\.jsonl' has nothing in its column 'text': give one"):
            list(Documents(TextSource(("empty.jsonl",))))

    @pytest.mark.parametrize("name", ["pipe.txt", "pipe", "zero.txt", "zero", "folder.jsonl"])
    def test_only_regular_files(self, here: Path, name: str) -> None:
        if name.startswith("pipe"):
            os.mkfifo(here / "pipe")
            if name != "pipe":
                (here / name).symlink_to("pipe")
        elif name.startswith("zero"):
            (here / name).symlink_to("/dev/zero")
        else:
            (here / name).mkdir()
        with pytest.raises(CalibrationError, match=f"dataset '{name}' is no regular file: give a file of text"):
            list(Documents(TextSource((name,))))

    def test_records_without_text_are_counted(self, here: Path) -> None:
        lines = [{"text": "one"}, {"body": "two"}, {"text": None}, {"text": ""}, {"text": "three"}]
        (here / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        for seed in (None, 0):
            documents = Documents(TextSource(("a.jsonl",)), seed)
            assert sorted(documents) == ["", "one", "three"]
            assert documents.skipped == 2

    def test_no_record_with_text(self, here: Path) -> None:
        name = write_jsonl(here / "a.jsonl", [None, None], count=1)
        with pytest.raises(CalibrationError, match=r"no column 'text' with text.*--text-column: text, count"):
            list(Documents(TextSource((name,))))

    def test_revision_of_a_hub_dataset(self, monkeypatch: pytest.MonkeyPatch) -> None:
        commit = "0123456789" * 4

        class Builder:
            hash = commit

            def as_streaming_dataset(self, split: str) -> list[dict[str, str]]:
                return [{"text": f"of {split}"}]

        asked = []
        monkeypatch.setattr(
            records_module, "load_dataset_builder", lambda *args, **options: asked.append((args, options)) or Builder()
        )
        documents = Documents(TextSource(("some/dataset",), "en", revision="v1"))
        assert documents.revision is None
        assert list(documents) == ["of train"]
        assert documents.revision == commit
        assert asked == [(("some/dataset", "en"), {"revision": "v1"})]


class TestSpecialTokens:
    @pytest.mark.parametrize(
        ("template", "expected"), [("none", ([], [])), ("bos", ([0], [])), ("bert", ([2], [3])), ("eos", ([], [1]))]
    )
    def test_found(self, template: str, expected: tuple[list[int], list[int]]) -> None:
        assert special_tokens(TOKENIZERS[template]) == expected

    def test_ambiguous_tokenizer_is_refused(self) -> None:
        backend = Tokenizer(models.WordLevel({"<s>": 0}, unk_token="<s>"))
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
        with pytest.raises(CalibrationError, match="cannot tell which special tokens"):
            special_tokens(PreTrainedTokenizerFast(tokenizer_object=backend))


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

    def test_no_text(self) -> None:
        with pytest.raises(
            CalibrationError, match=r"has 0 tokens.*2 samples of 8 tokens need 14: give more text, or lower"
        ):
            calibration_tokens([], TOKENIZERS["bos"], 2, 8)

    def test_no_room_for_text(self) -> None:
        with pytest.raises(CalibrationError, match=r"no room for text.*raise --max-seq-length"):
            calibration_tokens(LINES, TOKENIZERS["bert"], 1, 2)

    def test_one_text_is_not_a_list(self) -> None:
        with pytest.raises(CalibrationError, match="put it in a list"):
            calibration_tokens("some text", TOKENIZERS["bos"], 1, 8)

    def test_stops_reading_when_there_is_enough(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(text_module, "BATCH_DOCUMENTS", 1)

        def documents():
            yield from LINES
            raise AssertionError("read on")

        assert calibration_tokens(documents(), TOKENIZERS["bos"], 1, 8).shape == (1, 8)

    def test_same_whatever_the_batch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        whole = calibration_tokens(LINES * 9, TOKENIZERS["bos"], 4, 16)
        monkeypatch.setattr(text_module, "BATCH_DOCUMENTS", 2)
        assert torch.equal(calibration_tokens(LINES * 9, TOKENIZERS["bos"], 4, 16), whole)

    def test_a_long_text_is_read_in_pieces_and_no_further_than_needed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        text = "\n".join(LINES * 9)
        whole = calibration_tokens([text], TOKENIZERS["bos"], 4, 16)
        sizes = []
        monkeypatch.setattr(text_module, "MOST_AT_ONCE", 100)
        counted = text_module.token_ids

        def count(texts: list[str], *given: object) -> list[list[int]]:
            sizes.append(sum(map(len, texts)))
            return counted(texts, *given)

        monkeypatch.setattr(text_module, "token_ids", count)
        assert torch.equal(calibration_tokens([text], TOKENIZERS["bos"], 4, 16), whole)
        assert max(sizes) < 200
        assert sum(sizes) < len(text)

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


def test_pack_drops_the_remainder() -> None:
    tokens_NL = pack(range(10, 17), SpecialTokens([0], [1]), 5)
    assert tokens_NL.tolist() == [[0, 10, 11, 12, 1], [0, 13, 14, 15, 1]]


def test_data_hash_is_of_the_int64_bytes() -> None:
    tokens = torch.tensor([[1, 2], [3, 70000]])
    expected = hashlib.sha256(b"".join(i.to_bytes(8, "little") for i in (1, 2, 3, 70000))).hexdigest()
    assert data_hash(tokens) == data_hash(tokens.int()) == data_hash(tokens.T.contiguous().T) == expected
    assert data_hash(tokens.T) != expected


def test_read_documents_is_lazy(here: Path) -> None:
    documents = Documents(TextSource(("missing.txt",)))
    with pytest.raises(CalibrationError):
        next(iter(documents))


def test_seed_shuffles_what_is_read_as_the_hub_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "data").mkdir()
    texts = [str(number) for number in range(40)]
    (tmp_path / "data" / "train.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    source = TextSource((str(tmp_path / "data"),))
    assert list(Documents(source)) == texts
    shuffled = list(Documents(source, seed=1))
    assert sorted(shuffled) == sorted(texts) != shuffled
    assert shuffled == list(Documents(source, seed=1)) != list(Documents(source, seed=0))


def test_several_hub_datasets_have_no_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records_module, "hub_records", lambda name, *given: ([{"text": name}], f"commit of {name}"))
    one, two = Documents(TextSource(("a/b",))), Documents(TextSource(("a/b", "c/d")))
    assert (list(one), one.revision) == (["a/b"], "commit of a/b")
    assert (list(two), two.revision) == (["a/b", "c/d"], None)
