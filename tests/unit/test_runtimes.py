"""What runs a sparse checkpoint: the data file, and what of it fits a pattern."""

from __future__ import annotations

from datetime import date
from pathlib import Path

import pytest
from records import linear, report, unsolved

from optima.patterns import NM, Given, Pattern, Unstructured
from optima.reporting.html import render_html
from optima.reporting.markdown import render_markdown
from optima.reporting.summary import render_summary
from optima.runtimes import in_words, named_pattern, runtimes, shares, table_rows

ROOT = Path(__file__).parents[2]
HALF = Unstructured(0.5)


def names(*patterns: Pattern) -> set[str]:
    return {each.runtime.split(",")[0] for each, _ in shares(dict.fromkeys(patterns, 1)) if not each.as_dense}


class TestData:
    def test_is_complete(self) -> None:
        assert len({each.runtime for each in runtimes()}) == len(runtimes())
        for each in runtimes():
            texts = (each.runtime, each.versions, each.hardware, each.gain, each.note)
            assert all(texts), each
            assert date(2025, 1, 1) <= each.checked <= date(2100, 1, 1)
            assert each.source.startswith("https://") or (ROOT / each.source).is_file(), each.source

    def test_who_runs_it_dense_gains_nothing_and_is_named_first(self) -> None:
        dense = [each.as_dense for each in runtimes()]
        assert dense == sorted(dense, reverse=True)
        assert {each.gain for each in runtimes() if each.as_dense} == {"none"}
        assert {each.patterns for each in runtimes() if each.as_dense} == {("dense",)}

    @pytest.mark.parametrize("file", ["README.md", "docs/faq.md", "src/optima/runtimes.yaml"])
    def test_the_size_is_not_that_of_the_whole_checkpoint(self, file: str) -> None:
        """docs/packing.md: embeddings are not pruned, and are half of a small model."""
        text = (ROOT / file).read_text(encoding="utf-8")
        assert text.count("56% of") == text.count("56% of the pruned linears' size") == 1


class TestPatterns:
    @pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 4), NM(1, 2), NM(2, 8)], ids=str)
    def test_two_of_four(self, pattern: Pattern) -> None:
        assert {"torchao", "PyTorch", "MACKO", "Core ML"} <= names(pattern)

    @pytest.mark.parametrize("pattern", [HALF, NM(3, 4), NM(4, 8), NM(6, 8), Given(0.5)], ids=str)
    def test_not_two_of_four(self, pattern: Pattern) -> None:
        assert not {"torchao", "PyTorch"} & names(pattern)
        assert "MACKO" in names(pattern)
        assert ("Core ML" in names(pattern)) == (pattern.sparsity >= 0.5)

    def test_six_of_eight(self) -> None:
        assert "SlideSparse" in names(NM(6, 8))
        assert "SlideSparse" in names(NM(3, 4))
        assert "SlideSparse" not in names(HALF)

    def test_too_few_zeros(self) -> None:
        assert "MACKO" not in names(Unstructured(0.1))
        assert "OpenVINO" not in names(Unstructured(0.4))

    def test_a_part_of_the_model(self) -> None:
        rows = {row[0]: row[2] for row in table_rows({NM(2, 4): 3, HALF: 1})}
        assert rows["PyTorch, semi-structured"].endswith("(for 75% of the pruned linears' weights)")
        assert "pruned weights" not in rows["Core ML"]
        assert rows["vLLM, SGLang"] == "none"

    def test_as_a_report_names_them(self) -> None:
        assert named_pattern("2:4", 0.5) == NM(2, 4)
        assert named_pattern("0.5 per row", 0.25).sparsity == 0.25
        assert named_pattern("external", 1.0).sparsity < 1


class TestShown:
    def test_in_words(self) -> None:
        assert "**no faster**" in in_words({HALF: 1})
        assert "MACKO" in in_words({HALF: 1})

    def test_in_every_report(self) -> None:
        found = report(linear(pattern="2:4"))
        page, markdown = render_html({"a": found}), render_markdown(found)
        for text in (page, markdown):
            assert "What runs it" in text
            assert "Apple Neural Engine" in text
            assert "semi-structured" in text
        assert "(#what-runs-it)" in markdown, "as titles are linked to in Markdown"
        assert "no faster" in render_summary(found)
        assert "see what runs it, in the report." in render_summary(found)
        assert "semi-structured" not in render_markdown(report(unsolved()))
