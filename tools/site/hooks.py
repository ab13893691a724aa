"""Pages of the site that are not in docs/: pages made from the code, formulas as MathML, the root's own pages.

Pages that are made at every build cannot go stale.
"""

from __future__ import annotations

import contextlib
import html
import io
import os
import posixpath
import re
from pathlib import Path
from typing import Any

import errors
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from optima.cli import COMMANDS, main
from optima.recipe import Recipe

ROOT = Path(__file__).parents[2]
# Pages of the repository that are not in docs/, and where the site has them.
OUTSIDE = {
    "CONTRIBUTING.md": "about/contributing.md",
    "CHANGELOG.md": "about/changelog.md",
    "benchmarks/README.md": "about/benchmarks.md",
}
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\((?!https?:|mailto:|#)([^)\s#]+)(#[^)\s]*)?\)")
FENCE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made, and those from elsewhere in the repository."""
    made = {
        "reference/cli.md": command_line(),
        "reference/errors.md": errors.page(),
        "reference/shipped-recipes.md": recipes(),
    }
    for name, place in OUTSIDE.items():
        made[place] = moved((ROOT / name).read_text(encoding="utf-8"), name, place)
    for place, content in made.items():
        files.append(File.generated(config, place, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Mend the links of a page in docs/ that lead out of it."""
    source = page.file.src_uri
    return markdown if source in OUTSIDE.values() else moved(markdown, f"docs/{source}", source)


def on_page_content(content: str, **_: Any) -> str:
    """Formulas as MathML, which browsers draw without a script or a request."""

    def drawn(match: re.Match[str]) -> str:
        return convert(html.unescape(match[3]), display="block" if match[1] == "div" else "inline")

    return FORMULA.sub(drawn, content)


def moved(markdown: str, source: str, place: str) -> str:
    """``markdown`` of the file ``source`` as the site's page ``place``; links to what the site lacks become text."""

    def mended(match: re.Match[str]) -> str:
        text, target, anchor = match[1], match[2], match[3] or ""
        there = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        inside = OUTSIDE.get(there, there.removeprefix("docs/") if there.startswith("docs/") else None)
        if there == "README.md":
            inside = "index.md"
        if inside is None:
            return text if text.startswith("`") else f"{text} (`{there}`)"
        return f"[{text}]({posixpath.relpath(inside, posixpath.dirname(place) or '.')}{anchor})"

    parts = FENCE.split(markdown)
    return "".join(part if part.startswith("```") else LINK.sub(mended, part) for part in parts)


def command_line() -> str:
    """The help of every command, as a terminal of 80 columns shows it."""
    parts = ["# Command line\n\nThe help of every command. Options that set a recipe are keys of a recipe file too.\n"]
    for command in COMMANDS:
        parts.append(f"## optima {command}\n\n```text\n{help_of(command)}```\n")
    return "\n".join(parts)


def help_of(command: str) -> str:
    """What ``optima COMMAND --help`` prints."""
    screen = io.StringIO()
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "80"
    try:
        with contextlib.redirect_stdout(screen), contextlib.suppress(SystemExit):
            main([command, "--help"])
    finally:
        os.environ.pop("COLUMNS") if before is None else os.environ.update(COLUMNS=before)
    return screen.getvalue()


def recipes() -> str:
    """The recipes that come with the package."""
    parts = ["# Shipped recipes\n\nThe recipes that come with OPTIMA, used by name: `--recipe NAME`.\n"]
    parts += [f"## {name}\n\n```yaml\n{file.read_text(encoding='utf-8')}```\n" for name, file in Recipe.presets.items()]
    return "\n".join(parts)
