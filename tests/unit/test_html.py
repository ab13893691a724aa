"""The HTML report as a file: what it holds, that it fetches nothing, and that nothing in a record can become markup."""

from __future__ import annotations

import json
import math
import re
from base64 import b64encode
from dataclasses import replace
from hashlib import sha256
from html.parser import HTMLParser

import pytest
from records import LINEAR, RUN, linear, report, unsolved

from optima.reporting.html import DRAWN, SECTIONS, render_html
from optima.reporting.record import BlockRecord, Report, Size, UnitRecord

BYTES = 2 * 2**20
EVIL = "</script><script>alert('x')</script>\"'><img src=x onerror=alert(1)>{{ 7 * 7 }}"
VOID = {"meta", "link", "input"}


class Page(HTMLParser):
    """Elements with their attributes, and the text under each id and heading; open tags must be closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text, self.elements, self.open, self.texts = text, [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] not in (["script"], ["style"]):
            self.texts.append(data)

    @property
    def shown(self) -> str:
        return " ".join(" ".join(self.texts).split())

    @property
    def data(self) -> dict:
        (content,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', self.text, re.DOTALL)
        return json.loads(content, parse_constant=pytest.fail)


def page(report: Report) -> Page:
    return Page(render_html(report))


def records(run: dict) -> list[dict]:
    return [dict(zip(run["fields"], row, strict=True)) for row in run["rows"]]


def test_the_page_carries_the_numbers_of_the_record() -> None:
    original = report(linear(), linear("mlp.down_proj", 3, error=0.123456789), unsolved(block=1))
    run = page(original).data
    found = records(run)
    for there, here in zip(found, original.linears, strict=True):
        for name in DRAWN:
            assert there[name] == (list(here.shape) if name == "shape" else getattr(here, name)), name
    assert [run["kinds"][row["kind"]] for row in found] == ["up_proj", "down_proj", "up_proj"]
    assert [row["part"] for row in found] == ["mlp.up_proj", "mlp.down_proj", "mlp.up_proj"]
    assert run["gap"] == RUN.recipe["gap"]


def test_sections_are_there_where_they_have_something_to_say() -> None:
    full = page(report(notes=("a note",), stages={"solve": 31.0}))
    assert "Notes a note" in full.shown
    assert "solve 31.0 s 50% everything else 31.0 s 50%" in full.shown
    titles = {attributes["id"] for tag, attributes in full.elements if tag == "h2"}
    assert titles == {f"h-{name}" for name in SECTIONS} - {"h-tuning", "h-units"}
    units = (UnitRecord(0, "layers.0.mlp", "neurons", 36, 48, error=0.1, gap=1e-9, energy=0.125),)
    smaller = page(Report(RUN, (), units=units, sizes=(Size(4, 8, 8), Size(3, 6, 6))))
    assert "layers.0.mlp 36 of 48 neurons 12.5%" in smaller.shown
    assert "75.0% of the parameters" in smaller.shown
    empty = page(Report(RUN, ()))
    assert "Nothing was pruned." in empty.shown
    for title in ("map", "spread", "linears", "times"):
        assert SECTIONS[title] not in empty.shown


def test_nothing_is_fetched_and_only_the_page_s_own_script_runs() -> None:
    found = page(report())
    for tag, attributes in found.elements:
        assert "src" not in attributes
        assert tag not in ("iframe", "object", "embed", "base", "form", "img")
        assert attributes.get("href", "data:,") == "data:," or attributes["href"].startswith("#")
        assert not [name for name in attributes if name.startswith("on")]
    text = found.text.replace("http://www.w3.org/2000/svg", "").replace("http://www.w3.org/1999/xhtml", "")
    assert not re.search(r"https?:|//[a-z]|@import|url\(", re.sub(r"// .*", "", text))
    (policy,) = [a["content"] for tag, a in found.elements if tag == "meta" and "http-equiv" in a]
    script = found.text.rpartition("<script>")[2].partition("</script>")[0]
    assert policy.startswith("default-src 'none';")
    assert f"'sha256-{b64encode(sha256(script.encode()).digest()).decode()}'" in policy


def test_what_a_record_says_stays_text() -> None:
    evil = replace(LINEAR, name=f"model.layers.0.{EVIL}", pattern=EVIL, rows_not_converged=1)
    recipe = {"selector": EVIL, "targets": [EVIL], EVIL: EVIL}
    changes = {"recipe": recipe, "notes": (EVIL,), "model": EVIL, "device": EVIL, "dtype": EVIL, "created": EVIL}
    bad = report(evil, versions={EVIL: EVIL}, stages={EVIL: 1.0}, **changes)
    good = report(linear(rows_not_converged=1), stages={"solve": 1.0}, notes=("note",))
    found, plain = page(bad), page(good)
    assert found.text.count("<script") == found.text.count("</script") == 2
    assert {tag for tag, _ in found.elements} == {tag for tag, _ in plain.elements}
    assert "{{ 7 * 7 }}" in found.shown
    assert records(found.data)[0]["name"] == evil.name


def test_numbers_that_json_cannot_hold() -> None:
    found = page(report(linear(error=math.nan, gap_max=math.inf, error_mask=math.inf)))
    (row,) = records(found.data)
    assert (row["error"], row["gap_max"], row["error_mask"]) == ("NaN", "Infinity", "Infinity")
    assert "the error is not a finite number" in found.shown


def test_tuned_blocks_are_listed() -> None:
    plain = report(linear(block=0), linear(block=1))
    assert SECTIONS["tuning"] not in render_html(plain)
    blocks = (BlockRecord(0, "b.0", {}, (2.0, 2.5), 0), BlockRecord(1, "b.1", {}, (2.0, 1.5), 1))
    shown = page(replace(plain, blocks=blocks)).shown
    assert "b.0 2.0000 → 2.0000 not changed b.1 2.0000 → 1.5000 −25.0%" in shown
