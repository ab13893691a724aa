"""What the pages promise their readers: short sentences, links that lead somewhere, commands that CI runs."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from functools import cache
from pathlib import Path

import pytest

import optima
from optima.cli import main
from optima.options import SELECTOR_NAMES, SOLVER_NAMES

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "benchmarks" / "README.md"])
PROSE = [page for page in PAGES if page.name != "CHANGELOG.md"]
# Pages of the site that are made from the code when it is built (tools/site/hooks.py).
MADE = [ROOT / "docs" / "reference" / name for name in ("cli.md", "errors.md", "runtimes.md", "shipped-recipes.md")]
MOST_WORDS = 20  # in a sentence, on average over a page
LONGEST = 40  # words of the longest sentence
WIDEST_CELL = 200  # characters of a table's cell
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)\)")


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def sentences(markdown: str) -> list[str]:
    """The prose of a page, without code, tables and references; a formula or a code in a sentence is one word."""
    text = FENCE.sub("\n\n", markdown.partition("\n## References")[0])
    text = re.sub(r"<!--.*?-->|^ {4,}.*$|^ *\|.*$|^#.*$|^!\[.*$", "\n\n", text, flags=re.MULTILINE)
    text = re.sub(r"\$[^$]+\$|`[^`]+`", "code", LINK.sub(r"\1", text))
    text = re.sub(r"^ *(?:[-*]|\d+\.) ", "\n\n", text, flags=re.MULTILINE)
    # A mark ends a sentence where a space follows: not in 2:4, 0.5 or pip install .
    parts = re.split(r"[.?!][*_)\"]*(?:\s|$)|\n\s*\n", text)
    return [part for part in parts if re.search(r"\w", part)]


def words(sentence: str) -> int:
    return len([word for word in sentence.split() if re.search(r"\w", word)])


def anchors(markdown: str) -> set[str]:
    """What GitHub makes of a page's headings."""
    titles = re.findall(r"^#+ (.*)$", FENCE.sub("", markdown), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", LINK.sub(r"\1", title).lower()).replace(" ", "-") for title in titles}


def links() -> list[tuple[Path, str]]:
    found = [(page, target) for page in PAGES for _, target in LINK.findall(FENCE.sub("", read(page)))]
    return [(page, target) for page, target in found if not target.startswith(("http:", "https:", "mailto:"))]


@pytest.mark.parametrize("page", PROSE, ids=named)
def test_sentences_are_short(page: Path) -> None:
    counts = [words(sentence) for sentence in sentences(read(page))]
    assert sum(counts) <= MOST_WORDS * len(counts), f"{sum(counts) / len(counts):.1f} words a sentence"


@pytest.mark.parametrize("page", PROSE, ids=named)
def test_no_sentence_is_endless(page: Path) -> None:
    assert [sentence for sentence in sentences(read(page)) if words(sentence) > LONGEST] == []


def test_the_measure_counts_sentences_and_not_what_stands_between_them() -> None:
    page = "# A title\n\nOne two `a b c`, $x + y$. Six: seven!\n\n| a | b |\n\n* eight\n\n```\nten\n```\n\n    code\n"
    assert [words(sentence) for sentence in sentences(page)] == [4, 2, 1]


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_table_cells_are_short(page: Path) -> None:
    rows = re.findall(r"^\|.*\|$", FENCE.sub("", read(page)), re.MULTILINE)
    wide = [cell for row in rows for cell in re.split(r"(?<!\\)\|", row) if len(cell.strip()) > WIDEST_CELL]
    assert not wide


@pytest.mark.parametrize("page", PROSE, ids=named)
def test_dates_and_commits_stand_apart(page: Path) -> None:
    """A date has a line of its own, which says on what machine; prose ages without one. No commit is named at all."""
    text = FENCE.sub("", read(page))
    dated = re.findall(r"^.*\b20\d\d-\d\d-\d\d\b.*$", text, re.MULTILINE)
    assert [line for line in dated if not line.startswith("*Machine")] == []
    assert re.findall(r"\b(?=[a-f]*\d)(?=\d*[a-f])[0-9a-f]{7,40}\b", text) == []


def test_links_inside_the_repository_lead_somewhere() -> None:
    assert links()
    for page, target in links():
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        if there in MADE:
            continue
        assert there.exists(), f"{named(page)} links to {target}, which does not exist"
        if anchor:
            assert anchor in anchors(read(there)), f"{named(page)} links to {target}, a heading that does not exist"


def test_ci_runs_what_the_readme_shows_first() -> None:
    """A visitor begins with the first block; .ci/run must fail where it would."""
    first = re.findall(r"^```bash\n(.*?)^```$", read(ROOT / "README.md"), re.MULTILINE | re.DOTALL)[0]
    commands = [shlex.split(line, comments=True) for line in first.splitlines()]
    ci = [line.split() for line in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()]
    asked = [command for command in commands if command and command[0] != "cd" and command[:2] != ["git", "clone"]]
    assert asked
    assert [command for command in asked if command not in ci] == []


@cache
def options(command: str) -> set[str]:
    """The options that the help of a command names."""
    screen = io.StringIO()
    with contextlib.redirect_stdout(screen), pytest.raises(SystemExit):
        main([command, "--help"])
    lines = re.findall(r"^ +((?:--?[\w-]+, )*--[\w-]+)", screen.getvalue(), re.MULTILINE)
    return {option for line in lines for option in line.split(", ")}


def commands(page: Path) -> list[list[str]]:
    """What a page tells to type: ``optima prune ...``, at the start of a line or in code."""
    lines = read(page).replace("\\\n", " ")
    found = re.findall(r"^ *optima +(.+)$|`optima +([^`]+)`", lines, re.MULTILINE)
    return [shlex.split(whole or inline, comments=True) for whole, inline in found]


@pytest.mark.parametrize("page", PROSE, ids=named)
def test_commands_have_the_options_that_a_page_gives_them(page: Path) -> None:
    for command, *arguments in commands(page):
        if not command.startswith("-"):
            assert {word for word in arguments if word.startswith("--")} <= options(command)


@pytest.mark.parametrize("page", PROSE, ids=named)
def test_every_option_that_a_page_names_is_there(page: Path) -> None:
    """Of a command, or of a script that measures."""
    scripts = "".join(read(path) for path in ROOT.glob("benchmarks/**/*.py"))
    known = set.union(*map(options, ("prune", "plan", "order", "eval", "pack"))) | set(
        re.findall(r'"(--[\w-]+)"', scripts)
    )
    assert set(re.findall(r"`(--[a-z][\w-]*)", read(page))) <= known


@pytest.mark.parametrize("page", PROSE, ids=named)
def test_commands_of_scripts_have_the_options_that_a_page_gives_them(page: Path) -> None:
    shared = read(ROOT / "benchmarks/harness/treatment.py")
    for script, arguments in re.findall(r"benchmarks/(\w+)\.py ([^`\n#]*)", read(page).replace("\\\n", " ")):
        known = re.findall(r'"(--[\w-]+)"', read(ROOT / f"benchmarks/{script}.py") + shared)
        assert set(re.findall(r"(?<!\S)--[a-z][\w-]*", arguments)) <= {*known}, script


def test_the_readme_has_every_selector_and_every_solver() -> None:
    rows = re.findall(r"^\| `([\w-]+)` \|", read(ROOT / "README.md"), re.MULTILINE)
    assert [name for name in (*SELECTOR_NAMES, *SOLVER_NAMES) if name not in rows] == []


def test_the_page_of_python_has_every_public_name() -> None:
    named = re.findall(r"^::: optima\.(\w+)$", read(ROOT / "docs" / "reference" / "python.md"), re.MULTILINE)
    assert set(optima.__all__) - {"OptimaError"} == set(named) - {"errors"}, "errors are one entry"


def test_the_solvers_page_has_every_solver() -> None:
    rows = re.findall(r"^\| `([\w-]+)` \|", read(ROOT / "docs" / "solvers.md"), re.MULTILINE)
    assert rows[1:] == list(SOLVER_NAMES)  # behind the heading


def test_the_readme_fits_a_page() -> None:
    assert len(read(ROOT / "README.md").splitlines()) <= 130
    assert words(" ".join(sentences(read(ROOT / "README.md")))) <= 600
