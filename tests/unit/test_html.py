"""The HTML report as a file: what it holds, that it fetches nothing, and that nothing in a record can become markup."""

from __future__ import annotations

import json
import math
import re
from base64 import b64encode
from dataclasses import fields, replace
from hashlib import sha256
from html.parser import HTMLParser

import pytest
from records import LINEAR, RUN, linear, report, unsolved

from optima.reporting.html import SECTIONS, render_html
from optima.reporting.joined import joined
from optima.reporting.record import BlockRecord, LinearRecord, Report

BYTES = 2 * 2**20
EVIL = "</script><script>alert('x')</script>\"'><img src=x onerror=alert(1)>{{ 7 * 7 }}"
VOID = {"meta", "link", "input"}


class Page(HTMLParser):
    """Elements with their attributes, and the text under each id and heading; open tags must be closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text, self.elements, self.open, self.words = text, [], [], []
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
            self.words.append(data)

    @property
    def shown(self) -> str:
        return " ".join(" ".join(self.words).split())

    @property
    def data(self) -> list[dict]:
        (content,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', self.text, re.DOTALL)
        return json.loads(content, parse_constant=pytest.fail)


def page(*reports: Report) -> Page:
    return Page(render_html({f"run {i}": report for i, report in enumerate(reports)}))


def records(run: dict) -> list[dict]:
    return [dict(zip(run["fields"], row, strict=True)) for row in run["rows"]]


def test_the_page_carries_the_numbers_of_the_record() -> None:
    original = report(linear(), linear("mlp.down_proj", 3, error=0.123456789), unsolved(block=1))
    (run,) = page(original).data
    found = records(run)
    known = {field.name for field in fields(LinearRecord)}
    for there, here in zip(found, original.linears, strict=True):
        for name in there.keys() & known:
            assert there[name] == (list(here.shape) if name == "shape" else getattr(here, name)), name
    assert [run["kinds"][row["kind"]] for row in found] == ["up_proj", "down_proj", "up_proj"]
    assert [row["part"] for row in found] == ["mlp.up_proj", "mlp.down_proj", "mlp.up_proj"]
    assert run["gap"] == RUN.recipe["gap"]


def test_the_headline() -> None:
    shown = page(report()).shown
    assert "sparsity as written 50.00% asked 50.00%" in shown
    assert "mean error 0.1000 −50.0% from the selector’s" in shown
    assert "largest gap as written 2.0 × 10 −3 5.0 × 10 −5 before the cast" in shown
    assert "time 1 min 2 s 0.2 s on linears peak memory 3.00 GiB cpu" in shown
    assert "largest gap as written – time" in page(report(unsolved())).shown
    tuned = linear(tuned=True, gap_written_max=None, gap_written_median=None, loss_written=None)
    assert "largest gap as written – 5.0 × 10 −5 before tuning" in page(report(tuned)).shown
    assert "mean error 0.1000 −50.0% from the selector’s, before tuning" in page(report(tuned)).shown


def test_figures_from_elsewhere_join_the_headline() -> None:
    shown = Page(render_html({"run": report()}, [[("perplexity", "30.8", "19.3 before")]])).shown
    assert "from the selector’s perplexity 30.8 19.3 before largest gap" in shown


def test_sections_are_there_where_they_have_something_to_say() -> None:
    full = page(report(notes=("a note",), stages={"solve": 31.0}))
    assert "Notes a note" in full.shown
    assert "solve 31.0 s 50.0% everything else 31.0 s 50.0%" in full.shown
    titles = {attributes["id"] for tag, attributes in full.elements if tag == "h2"}
    assert titles == {f"h-{name}" for name in SECTIONS} - {"h-differences", "h-tuning"}
    empty = page(Report(RUN, ()))
    assert "Nothing was pruned." in empty.shown
    for title in ("map", "spread", "linears", "times"):
        assert SECTIONS[title] not in empty.shown


def test_warnings_stand_out() -> None:
    warned = page(report(linear(rows_not_converged=3)))
    assert ("li", {"class": "warning"}) in warned.elements
    assert ("li", {"class": "warning"}) not in page(report()).elements


def test_comparison_shows_how_recipes_and_errors_differ() -> None:
    other = report(linear(error=0.05), linear("mlp.down_proj"), recipe=RUN.recipe | {"selector": "alps", "swaps": 256})
    shown = page(report(), other).shown
    assert "2 runs compared" in shown
    assert "option run 0 run 1 selector wanda alps swaps – 256 mean error of" in shown
    assert "mean error of run 0 run 1 up_proj 0.1000 0.0500 −50.0% down_proj – 0.1000" in shown
    assert "in different units" not in shown
    plain = page(report(), report(recipe=RUN.recipe | {"objective": "plain"})).shown
    assert "in different units" in plain
    alike = page(report(), report()).shown
    assert "option" not in alike
    assert "up_proj 0.1000 0.1000 +0.0%" in alike


def test_links_within_the_page_lead_somewhere() -> None:
    found = page(report(linear(pattern="2:4")))
    links = [attributes["href"] for tag, attributes in found.elements if tag == "a"]
    assert links == ["#what-runs-it"]
    assert ("section", "what-runs-it") in [(tag, attributes.get("id")) for tag, attributes in found.elements]


def test_figures_are_of_each_run_or_of_none() -> None:
    with pytest.raises(ValueError, match="longer"):
        render_html({"one": report()}, [[], [("perplexity", "30.8", "")]])


@pytest.mark.parametrize("evaluated", [0, 1])
def test_a_run_that_was_not_evaluated_has_a_gap_in_the_headlines(evaluated: int) -> None:
    figures: list[list[tuple[str, str, str]]] = [[], []]
    figures[evaluated] = [("perplexity", "68.21", "")]
    found = Page(render_html({"one": report(), "two": report()}, figures))
    cells = re.findall(r"<td>(.*?)</td>", found.text.partition("</header>")[0])
    assert "mean error perplexity largest gap as written" in found.shown
    assert len(cells) == 2 * 6
    assert [cells[2], cells[8]] == (["68.21", "–"] if evaluated == 0 else ["–", "68.21"])
    assert cells[3] == cells[9]


def test_values_of_a_recipe_are_written_as_people_write_them() -> None:
    recipe = RUN.recipe | {"dataset": ["a.txt", "b.txt"], "max_change": None}
    assert "dataset – a.txt, b.txt" in (text := page(report(), report(recipe=recipe)).shown)
    assert "max_change" not in text.partition("Recipe and environment")[0], "unset, and unknown to an older record"


def test_what_all_runs_share_is_said_once() -> None:
    half, groups = report(), report(linear(pattern="2:4"))
    assert page(half, half).shown.count("Apple Neural Engine") == 1
    assert page(half, groups).shown.count("Apple Neural Engine") == 2


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
    for num_runs in (1, 2):
        found = Page(render_html({EVIL + " " * i: bad for i in range(num_runs)}))
        plain = page(*[good] * num_runs)
        assert found.text.count("<script") == found.text.count("</script") == 2
        assert {tag for tag, _ in found.elements} == {tag for tag, _ in plain.elements}
        assert "{{ 7 * 7 }}" in found.shown
        assert records(found.data[0])[0]["name"] == evil.name


def test_numbers_that_json_cannot_hold() -> None:
    found = page(report(linear(error=math.nan, gap_max=math.inf, error_mask=math.inf)))
    (row,) = records(found.data[0])
    assert (row["error"], row["gap_max"], row["error_mask"]) == ("NaN", "Infinity", "Infinity")
    assert "the error is not a finite number" in found.shown


@pytest.mark.parametrize(
    ("names", "kinds"),
    [
        (["attention.self.query", "attention.output.dense", "output.dense"], None),
        (["mlp.experts.0.up", "mlp.experts.1.up", "mlp.gate"], ["up", "gate"]),
    ],
)
def test_kinds_come_from_names(names: list[str], kinds: list[str] | None) -> None:
    (run,) = page(report(*(linear(name, block) for block in (0, 1) for name in names))).data
    assert run["kinds"] == (kinds or ["query", "attention.output.dense", "output.dense"])


def test_two_thousand_linears_fit() -> None:
    value = math.pi / 1000  # as many digits as a float has
    many = [
        linear(f"mlp.experts.{i}.down_proj", block, error=value, error_mask=value, error_selector=value, seconds=value)
        for block in range(20)
        for i in range(100)
    ]
    assert len(page(report(*many)).text.encode()) < BYTES


def test_what_tuning_won_is_shown_where_it_won() -> None:
    plain = report(linear(block=0), linear(block=1))
    assert "What tuning won" not in render_html({"run": plain})
    blocks = (BlockRecord(0, "b.0", {}, (2.0, 2.5), 0), BlockRecord(1, "b.1", {}, (2.0, 1.5), 1))
    page = render_html({"run": replace(plain, blocks=blocks)})
    assert page.count('<i style="width:75.0%">') == 1
    assert "What tuning won" in page


def test_runs_of_long_paths_are_told_apart_where_there_is_little_room() -> None:
    for names, short in (
        (["/long/way/to/one", "/long/way/to/other"], ["one", "other"]),
        (["/long/way/one/out", "/long/way/other/out"], ["one/out", "other/out"]),
        (["org/model", "model-50"], ["org/model", "model-50"]),
        (["/long/way/to/one"], ["/long/way/to/one"]),
        (["runs/one", "runs/one-more"], ["one", "one-more"]),
    ):
        page = Page(render_html({name: report() for name in names}))
        assert [run["title"] for run in page.data] == short


def test_thousands_of_experts_are_joined() -> None:
    names = [f"mlp.experts.{part}.{number}" for part in ("gate_up_proj", "down_proj") for number in range(256)]
    records = [
        linear(name, block, error=0.1 if number % 2 else 0.4, tokens=number)
        for block in range(30)
        for number, name in enumerate(["self_attn.q_proj", *names])
    ]
    page = render_html({"run": report(*records)})
    assert len(page) < BYTES
    assert "report.json has each" in page
    joint = {record.name: record for record in joined(records)}
    assert len(joint) == 30 * 3
    experts = joint["model.layers.7.mlp.experts.down_proj.*"]
    assert experts.error == pytest.approx(0.2)
    assert experts.rows == 256 * 8
    assert experts.tokens == 257
    solved = [replace(record, gap_max=None if number < 100 else 1e-5) for number, record in enumerate(records)]
    solved = [replace(record, iterations_mean=float(number % 7)) for number, record in enumerate(solved)]
    for joint_record in joined(solved):
        if "experts.down" in joint_record.name:
            own = [r for r in solved if r.name.startswith(joint_record.name.removesuffix("*")) and r.gap_max]
            assert joint_record.iterations_mean == pytest.approx(sum(r.iterations_mean for r in own) / len(own))
            assert joint_record.gap_max == 1e-5
    assert joint["model.layers.7.self_attn.q_proj"].rows == 8
    shared = [replace(record, pattern=f"0.{number % 3 + 4}") for number, record in enumerate(records)]
    assert {record.pattern for record in joined(shared) if record.name.endswith("*")} == {"3 patterns"}
    assert joined(records[:10]) == tuple(records[:10])
