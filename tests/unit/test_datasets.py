"""Documents of files, of directories in the hub's layout, and chats, read by the real ``datasets`` library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny import make_tokenizer
from transformers import PreTrainedTokenizerBase

from optima.data.datasets import load_documents, parse_hub_id
from optima.errors import CalibrationError

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def write_jsonl(path: str, records: list[dict[str, Any]]) -> str:
    Path(path).parent.mkdir(exist_ok=True)
    Path(path).write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def templated(template: str | None = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}", **of: str):
    tokenizer = make_tokenizer(**of)
    tokenizer.chat_template = template
    return tokenizer


def test_each_format(here: Path) -> None:
    Path("a.txt").write_text("\ufeffété\n\n\nlast line\n", encoding="utf-8")
    write_jsonl("b.jsonl", [{"text": "one\ntwo", "n": 1}, {"text": ""}, {"text": None}, {"n": 2}])
    Path("c.json").write_text(json.dumps([{"text": "three"}, {"text": "four"}]))
    pq.write_table(pa.table({"text": ["five", "six"]}), "d.parquet")
    Path("E.TXT").write_text("seven")
    write_jsonl("F.JSONL", [{"text": "eight"}])
    names = ["a.txt", "b.jsonl", "c.json", "d.parquet", "E.TXT", "F.JSONL"]
    expected = ["été\n\n\nlast line\n", "one\ntwo", "", "three", "four", "five", "six", "seven", "eight"]
    documents = load_documents(names)
    assert documents.revision is None
    assert list(documents) == expected
    assert sorted(load_documents(names, seed=0)) == sorted(expected)
    assert sorted(path.name for path in here.iterdir()) == sorted(names), "no cache is written"


def test_seed_shuffles_all_local_files_together() -> None:
    texts = [str(number) for number in range(40)]
    names = [
        write_jsonl(f"{name}.jsonl", [{"text": text} for text in part])
        for name, part in (("a", texts[:20]), ("b", texts[20:]))
    ]
    assert list(load_documents(names)) == texts
    shuffled = list(load_documents(names, seed=0))
    assert sorted(shuffled) == sorted(texts)
    assert shuffled == list(load_documents(names, seed=0)) != list(load_documents(names, seed=1))
    assert {int(text) < 20 for text in shuffled[:10]} == {True, False}


def test_a_directory_is_read_as_the_hub_is() -> None:
    write_jsonl("data/train.jsonl", [{"text": str(number)} for number in range(40)])
    write_jsonl("data/test.jsonl", [{"text": "three"}])
    assert list(load_documents(["data"], split="test")) == ["three"]
    texts = list(load_documents(["data"]))
    shuffled = list(load_documents(["data"], seed=1))
    assert sorted(shuffled) == sorted(texts) != shuffled
    assert shuffled == list(load_documents(["data"], seed=1)) != list(load_documents(["data"], seed=0))
    local = write_jsonl("local.jsonl", [{"text": text} for text in "abc"])
    both = list(load_documents(["data", local], seed=3))
    assert [text in "abc" for text in both[:6]] == [True, False] * 3, "they alternate"
    with pytest.raises(CalibrationError, match=r"'data'.*Available splits: \['train', 'test'\]"):
        load_documents(["data"], split="nope")


@pytest.mark.parametrize(
    ("name", "parsed"),
    [
        ("allenai/c4", ("allenai/c4", "en", None)),
        ("allenai/c4:de", ("allenai/c4", "de", None)),
        ("a/b", ("a/b", None, None)),
        ("a/b@v1", ("a/b", None, "v1")),
        ("a/b:raw@v1", ("a/b", "raw", "v1")),
    ],
)
def test_hub_ids(name: str, parsed: tuple[str, str | None, str | None]) -> None:
    assert parse_hub_id(name) == parsed


def test_records_without_text() -> None:
    write_jsonl("a.jsonl", [{"body": "one", "count": 1}])
    write_jsonl("b.jsonl", [{"text": None, "count": 1}])
    for name, columns in (("a.jsonl", "body, count"), ("b.jsonl", "text, count")):
        with pytest.raises(CalibrationError, match=rf"'{name}' has no text in the column 'text'.*columns: {columns}"):
            list(load_documents([name]))
    write_jsonl("c.jsonl", [{"text": 7}])
    with pytest.raises(CalibrationError, match=r"'c\.jsonl' has a int where a text"):
        list(load_documents(["c.jsonl"]))


def test_chats_are_read_by_the_models_template() -> None:
    """BOS of the template is left out where each sequence gets its own."""
    write_jsonl("a.jsonl", [{"messages": CHAT}, {"messages": []}, {"text": "plain"}])
    template = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
    assert list(load_documents(["a.jsonl"], templated(template, bos_token="<s>"))) == [
        "[user] hi[assistant] ho",
        "plain",
    ]
    only = make_tokenizer("none", bos_token="<s>")
    only.chat_template = template
    assert next(iter(load_documents(["a.jsonl"], only))) == "<s>[user] hi[assistant] ho"


@pytest.mark.parametrize("tokenizer", [None, templated(None), templated("{{ messages[0].name.first }}")])
def test_chats_that_cannot_be_rendered(tokenizer: PreTrainedTokenizerBase | None) -> None:
    write_jsonl("a.jsonl", [{"messages": CHAT}])
    with pytest.raises(CalibrationError, match=r"dataset 'a\.jsonl'"):
        list(load_documents(["a.jsonl"], tokenizer))
