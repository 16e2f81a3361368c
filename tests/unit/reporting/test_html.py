"""The HTML report: complete, self-contained, and safe with any node name."""

from __future__ import annotations

import html.parser
import sys
from typing import TYPE_CHECKING

import pytest

from onnx_decompose.errors import OptionError, OutputError
from onnx_decompose.reporting.html import write_html
from onnx_decompose.reporting.report import (
    Alternative,
    RefusedNode,
    Report,
    SiteReport,
    Summary,
)
from onnx_decompose.runtime.sessions import Provider
from onnx_decompose.timing.bench import BatchTiming, Timing
from onnx_decompose.verification.metrics import DeviationAccumulator
from onnx_decompose.verification.verify import AnnealingClaim, StructuralClaim

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np


def site(name: str, blocks: tuple[tuple[int, int], ...]) -> SiteReport:
    return SiteReport(
        name=name,
        op_type="MatMul",
        shape=(8, 6),
        region=name,
        null="recorded normal(0.02)",
        pi0=0.5,
        pi0_interval=(0.4, 0.6),
        density=0.5,
        components=max(len(blocks), 1),
        isolated=0,
        sccs=None,
        layers=None,
        decision="split" if blocks else "dense",
        reason=f"the reason of {name}",
        blocks=blocks,
        p_structure=0.0123 if blocks else None,
    )


def summary(*, decomposable: bool) -> Summary:
    return Summary(2, int(decomposable), 2, 96, 72, 192, 144, decomposable, "one sentence")


@pytest.fixture
def full(rng: np.random.Generator) -> Report:
    deviation = DeviationAccumulator()
    expected = rng.normal(size=(4, 3))
    deviation.update(expected, expected * 1.001)
    return Report(
        version="9.8.7",
        model="the model.onnx",
        null="recorded",
        criterion="fdr(0.01)",
        summary=summary(decomposable=True),
        sites=(site("<script>alert(1)</script>", ((4, 3), (4, 3))), site("whole", ())),
        refused=(
            RefusedNode("left1", "MatMul", "the constant is on the left side"),
            RefusedNode("left2", "MatMul", "the constant is on the left side"),
            RefusedNode("bias", "Gemm", "the bias is not a constant"),
        ),
        alternatives=(Alternative("torch", "fdr(0.01)", 0.25, 7, 48),),
        structural=StructuralClaim(True, "2 weights rebuilt", 2, 12, 1e-7),
        annealing=AnnealingClaim(
            True, 0.001, 0.01, "the data", "relative L2 error", {"logits": deviation.result()}
        ),
        timing=Timing(
            Provider.CPU,
            (
                BatchTiming(1, 0.5, 0.25, 2.0, 1.91, 2.07, 8),
                BatchTiming(16, 0.9, 0.3, 3.0, 2.92, 3.06, 8),
            ),
        ),
    )


class Page(html.parser.HTMLParser):
    """Elements, their nesting, and the text outside of the style sheet."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(path.read_text("utf-8"))
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [name for name, _ in attrs if name in {"src", "href"}]
        if tag not in {"meta", "rect"}:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        del attrs
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.text += f" {' '.join(data.split())} "


def test_page_holds_every_part(full: Report, tmp_path: Path) -> None:
    write_html(full, tmp_path / "report.html")
    page = Page(tmp_path / "report.html")
    assert page.open == []
    for part in (
        "the model.onnx",
        "9.8.7",
        "one sentence",
        "75.0%",
        "2 weights rebuilt",
        "relative L2 error 0.001, budget 0.01, on the data",
        "logits",
        "2 of 4 x 3",
        "the reason of whole",
        "0.0123",
        "2.45x over all batch sizes",
        "1.91 to 2.07",
        "2.92 to 3.06",
        "torch",
        "25.0%",
        "2 nodes: the constant is on the left side",
        "1 node: the bias is not a constant",
        "left2 (MatMul)",
    ):
        assert part in page.text
    assert page.text.index("Claim A") < page.text.index("Claim B")


def test_node_names_are_text(full: Report, tmp_path: Path) -> None:
    write_html(full, tmp_path / "report.html")
    page = Page(tmp_path / "report.html")
    assert "script" not in page.tags
    assert "<script>alert(1)</script>" in page.text


def test_page_needs_nothing_else(full: Report, tmp_path: Path) -> None:
    write_html(full, tmp_path / "report.html")
    page = Page(tmp_path / "report.html")
    assert page.links == []
    assert not {"link", "img", "iframe", "script"} & set(page.tags)
    content = (tmp_path / "report.html").read_text("utf-8")
    assert "http://" not in content
    assert "https://" not in content


def test_blocks_are_drawn_along_the_diagonal(full: Report, tmp_path: Path) -> None:
    write_html(full, tmp_path / "report.html")
    content = (tmp_path / "report.html").read_text("utf-8")
    assert content.count("<svg") == 1
    assert '<rect x="0" y="0" width="3" height="4"/>' in content
    assert '<rect x="3" y="4" width="3" height="4"/>' in content


def test_nothing_was_rewritten(tmp_path: Path) -> None:
    report = Report(
        "1", "m", "zero", "fdr(0.01)", Summary(0, 0, 0, 0, 0, 0, 0, False, "no sites"), ()
    )
    write_html(report, tmp_path / "report.html")
    text = Page(tmp_path / "report.html").text
    assert "Not decomposable" in text
    assert text.count("Not measured: no model was rewritten.") == 2
    assert "What other nulls and criteria" not in text
    assert "Left alone" not in text


def test_without_jinja2(full: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(OptionError, match=r"onnx-decompose\[report\]") as caught:
        write_html(full, tmp_path / "report.html")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_folder_that_is_not_there(full: Report, tmp_path: Path) -> None:
    with pytest.raises(OutputError):
        write_html(full, tmp_path / "missing" / "report.html")
