"""The HTML report in a browser: clicks, keys, sorts, hovers, themes; any message on the console fails."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from records import linear, report, unsolved

from optima.reporting.html import render_html
from optima.reporting.record import Report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH: apt-get install chromium")
EVIL = "<script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">"
PATIENCE = 15_000  # milliseconds; a busy machine is slow
KINDS = ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")

api.expect.set_options(timeout=PATIENCE)
Open = Callable[..., "api.Page"]


@pytest.fixture(scope="module")
def browser() -> Iterator[api.Browser]:
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def show(browser: api.Browser, tmp_path: Path) -> Iterator[Open]:
    """Open the page of one or several reports; whatever the console or the network says in the end is a failure."""
    said: list[str] = []
    with browser.new_context(viewport={"width": 1100, "height": 800}, color_scheme="light") as context:
        context.set_default_timeout(PATIENCE)

        def open_page(*reports: Report) -> api.Page:
            file = tmp_path / "report.html"
            file.write_text(render_html({f"run {i}": report for i, report in enumerate(reports)}), encoding="utf-8")
            page = context.new_page()
            page.on("console", lambda message: said.append(message.text))
            page.on("pageerror", lambda error: said.append(str(error)))
            page.on("request", lambda request: request.url == file.as_uri() or said.append(request.url))
            page.goto(file.as_uri())
            return page

        yield open_page
    assert said == []


def run(blocks: int = 4, factor: float = 1.0) -> Report:
    errors = [0.01 * (1 + i % 7) * factor for i in range(blocks * len(KINDS))]
    places = [(kind, block) for block in range(blocks) for kind in KINDS]
    return report(*(linear(kind, block, error=error) for (kind, block), error in zip(places, errors, strict=True)))


def cell(page: api.Page, kind: str, block: int) -> api.Locator:
    return page.locator(f"#map td[aria-label^='block {block}, {kind}:']")


def row(page: api.Page, name: str) -> api.Locator:
    return page.locator("#linears tbody tr").filter(has=page.locator(f"th[title$='{name}']"))


def column(page: api.Page, title: str) -> list[str]:
    titles = page.locator("#linears thead th").all_inner_texts()
    return page.locator(f"#linears tbody tr > :nth-child({titles.index(title) + 1})").all_inner_texts()


def colours(page: api.Page) -> list[str]:
    script = "cells => cells.map(cell => getComputedStyle(cell).backgroundColor)"
    return page.locator("#map td[tabindex]").evaluate_all(script)


def test_cell_and_row_lead_to_each_other(show: Open) -> None:
    page = show(run(blocks=30))
    cell(page, "up_proj", 28).click()
    there = row(page, "layers.28.mlp.up_proj")
    api.expect(there).to_have_attribute("aria-selected", "true")
    api.expect(there).to_be_in_viewport()
    api.expect(there).to_be_focused()
    row(page, "layers.28.self_attn.q_proj").click()
    api.expect(cell(page, "q_proj", 28)).to_have_attribute("aria-selected", "true")
    api.expect(cell(page, "q_proj", 28)).to_be_in_viewport()
    assert page.locator("tr[aria-selected=true]").count() == 1
    page.locator("#depth circle").nth(1).click()
    api.expect(row(page, "layers.0.mlp.up_proj")).to_be_in_viewport()


def test_keys_alone_do_the_same(show: Open) -> None:
    page = show(run())
    page.get_by_role("button", name="block", exact=True).click()
    page.locator("#map [tabindex='0']").focus()
    for key in ("ArrowDown", "ArrowRight", "ArrowRight", "Enter"):
        page.keyboard.press(key)
    api.expect(row(page, "layers.2.mlp.up_proj")).to_be_focused()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    api.expect(cell(page, "down_proj", 2)).to_be_focused()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.closest('#map')") is None, "a grid is one stop"


def test_only_what_was_measured_is_offered_and_drawn(show: Open) -> None:
    def offered(found: Report) -> tuple[list[str], list[str]]:
        page = show(found)
        return page.locator("#metrics label").all_text_contents(), page.locator("#spread h3").all_text_contents()

    tuned = [replace(each, tuned=True, gap_written_max=None) for each in run().linears]
    metrics, plots = offered(report(*tuned))
    assert "gap written" not in metrics
    assert plots == ["Gap before the cast", "Iterations per row"]
    metrics, plots = offered(report(unsolved()))
    assert not {"gap written", "iterations"} & {*metrics}
    assert not plots


def test_hovering_marks_the_linear_everywhere(show: Open) -> None:
    page = show(run())
    row(page, "layers.1.mlp.up_proj").hover()
    assert page.locator(".marked").evaluate_all("all => all.map(one => one.localName)") == ["td", "circle", "tr"]
    readout = page.locator("#readout")
    api.expect(readout).to_contain_text("model.layers.1.mlp.up_proj · mask 0.200")
    cell(page, "up_proj", 2).hover()
    api.expect(readout).to_contain_text("model.layers.2.mlp.up_proj")
    page.locator("h1").hover()
    api.expect(readout).to_be_hidden()
    assert page.locator(".marked").count() == 0


def test_columns_sort_both_ways_and_unknowns_stay_last(show: Open) -> None:
    odd = [linear("a", error=math.nan), linear("b", gap_max=math.inf), unsolved(block=2), linear("c", error=0.0)]
    page = show(report(*odd, linear("d", 10, error=3e-7), linear("e", 9, error=0.5)))
    result = page.get_by_role("button", name="result", exact=True)
    assert column(page, "result") == ["0.500", "0.200", "0.100", "3.0×10⁻⁷", "0", "not a number"], "the worst first"
    assert page.locator("#linears th[aria-sort]").get_attribute("aria-sort") == "descending"
    result.click()
    assert column(page, "result") == ["0", "3.0×10⁻⁷", "0.100", "0.200", "0.500", "not a number"]
    assert page.locator("#linears th[aria-sort=ascending]").inner_text() == "result"
    api.expect(result).to_be_focused()
    page.get_by_role("button", name="gap", exact=True).click()
    assert column(page, "gap")[-2:] == ["∞", "–"]
    page.get_by_role("button", name="block", exact=True).click()
    assert column(page, "block") == ["0", "0", "0", "2", "9", "10"]
    exact = page.locator("#linears td[title='3e-7']")
    assert exact.inner_text() == "3.0×10⁻⁷"


def test_the_filter_finds_and_gives_way(show: Open) -> None:
    page = show(run())
    page.locator("#filter").fill("Layers.3.mlp")
    assert sorted(column(page, "layer")) == ["mlp.down_proj", "mlp.up_proj"]
    api.expect(page.locator("#count")).to_have_text("2 of 12")
    cell(page, "q_proj", 0).click()
    api.expect(row(page, "layers.0.self_attn.q_proj")).to_be_focused()


def test_the_map_shows_what_is_chosen(show: Open) -> None:
    page = show(run())
    before = colours(page)
    assert len(set(before)) > 5
    page.get_by_label("sparsity", exact=True).check()
    assert len(set(colours(page))) == 1
    cell(page, "up_proj", 1).click()
    api.expect(cell(page, "q_proj", 0)).to_have_attribute("aria-label", "block 0, q_proj: sparsity 50%")
    page.locator("#metrics input:checked").press("ArrowLeft")
    api.expect(page.get_by_label("result ÷ selector", exact=True)).to_be_checked()
    api.expect(cell(page, "up_proj", 1)).to_have_attribute("aria-selected", "true")
    assert len(set(colours(page))) > 5


def test_themes(show: Open) -> None:
    page = show(run())

    def paper() -> str:
        return page.evaluate("getComputedStyle(document.body).backgroundColor")

    light, cells = paper(), colours(page)
    page.emulate_media(color_scheme="dark")
    dark = paper()
    assert dark != light
    assert colours(page) != cells
    button = page.get_by_role("button", name="Theme")
    for theme, expected in (("light", light), ("dark", dark), ("system", dark)):
        button.click()
        api.expect(button).to_have_text(f"Theme: {theme}")
        assert paper() == expected


def test_several_runs_share_a_page(show: Open) -> None:
    page = show(run(), run(factor=2))
    assert column(page, "result ÷ run 0") == ["1"] * 12
    page.get_by_label("run 1", exact=True).check()
    assert column(page, "result ÷ run 0") == ["2"] * 12
    page.get_by_label("result ÷ run 0", exact=True).check()
    api.expect(cell(page, "q_proj", 1)).to_have_attribute("aria-label", "block 1, q_proj: result ÷ run 0 2")
    assert page.locator("#depth path").count() == 2
    assert page.locator("#depth text.main").text_content() == "run 1"


@pytest.mark.parametrize("width", [390, 1100])
def test_nothing_is_wider_than_the_window(show: Open, width: int) -> None:
    page = show(run(blocks=48))
    page.set_viewport_size({"width": width, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") == width
    svg = page.locator("#depth svg")
    api.expect(svg).to_have_js_property("clientWidth", page.locator("#depth").evaluate("box => box.clientWidth"))


def test_any_number_of_linears(show: Open) -> None:
    for found in (Report(run().run, ()), report(), run(blocks=700)):
        page = show(found)
        assert page.locator("#linears tbody tr").count() == min(len(found.linears), 2000)
    api.expect(page.locator("#count")).to_have_text("2\u2009100 of 2\u2009100, the first 2\u2009000 shown")


def test_scripts_in_a_record_do_not_run(show: Open) -> None:
    evil = linear(EVIL, pattern=EVIL)
    page = show(report(evil, linear(block=1), notes=(EVIL,), model=EVIL, recipe={EVIL: EVIL, "selector": EVIL}))
    page.locator("#linears tbody tr").first.click()
    assert page.title() == "run 0 – pruning report"
    assert page.locator("img").count() == 0
    assert EVIL in page.locator("#linears").inner_text()
