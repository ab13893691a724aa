"""The HTML report in a browser: clicks, keys, sorts, hovers; any message on the console fails."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from records import linear, report

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
    """Open the page of a report; whatever the console or the network says in the end is a failure."""
    said: list[str] = []
    with browser.new_context(viewport={"width": 1100, "height": 800}, color_scheme="light") as context:
        context.set_default_timeout(PATIENCE)

        def open_page(report: Report) -> api.Page:
            file = tmp_path / "report.html"
            file.write_text(render_html(report), encoding="utf-8")
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


def test_a_reader_finds_a_linear_and_no_script_of_a_record_runs(show: Open) -> None:
    page = show(report(*run(blocks=30).linears, linear(EVIL, 30, pattern=EVIL), notes=(EVIL,), recipe={EVIL: EVIL}))
    cell(page, "up_proj", 28).click()
    there = row(page, "layers.28.mlp.up_proj")
    api.expect(there).to_have_attribute("aria-selected", "true")
    api.expect(there).to_be_in_viewport()
    api.expect(there).to_be_focused()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    assert page.locator("td[aria-selected=true]").count() == 1
    row(page, "layers.1.mlp.up_proj").hover()
    api.expect(page.locator("#readout")).to_contain_text("model.layers.1.mlp.up_proj · mask 0.200")
    page.get_by_role("button", name="block", exact=True).click()
    assert column(page, "block") == sorted(column(page, "block"), key=int)
    page.locator("#filter").fill("Layers.3.mlp")
    assert sorted(column(page, "layer")) == ["mlp.down_proj", "mlp.up_proj"]
    page.get_by_label("sparsity", exact=True).check()
    api.expect(cell(page, "q_proj", 0)).to_have_attribute("aria-label", "block 0, q_proj: sparsity 50%")
    assert page.title() == "tiny/model – pruning report"
    assert page.locator("img").count() == 0
