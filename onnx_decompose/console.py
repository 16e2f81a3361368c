"""What the command line shows: tables of a report, and progress while something takes long."""

from __future__ import annotations

import collections
import contextlib
import logging
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table

from onnx_decompose.timing.cost_cache import COEFFICIENTS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from rich.console import Console

    from onnx_decompose.passes.join_siblings import Joined
    from onnx_decompose.planning.cost import CostModel
    from onnx_decompose.reporting.report import Report, SiteReport
    from onnx_decompose.timing.bench import Timing
    from onnx_decompose.verification.verify import AnnealingClaim, StructuralClaim

__all__ = ["progress", "show_claims", "show_cost", "show_report", "show_timing"]

_ROWS = 40
_SIZES = 4


def show_report(report: Report, console: Console) -> None:
    """The sites before and after, what else was tried, the claims and the times."""
    if report.sites:
        console.print(_site_table(report))
        hidden = len(report.sites) - _ROWS
        if hidden > 0:
            console.print(f"... and {hidden} more sites; the report file has them all")
    if report.refused:
        counts: dict[str, int] = {}
        for node in report.refused:
            counts[node.reason] = counts.get(node.reason, 0) + 1
        for reason, count in counts.items():
            console.print(f"left alone: {count} nodes: {reason}", soft_wrap=True)
    summary = report.summary
    if summary.sites:
        console.print(
            f"weights {summary.weights_before:,} -> {summary.weights_after:,} "
            f"({summary.weights_after / summary.weights_before:.1%}), "
            f"flops per row {summary.flops_before:,} -> {summary.flops_after:,}, null {report.null}, "
            f"criterion {report.criterion}",
            soft_wrap=True,
        )
    if report.joined:
        console.print(_joined(report.joined), soft_wrap=True)
    if report.alternatives:
        console.print(_alternatives_table(report))
    show_claims(report.structural, report.annealing, console)
    if report.timing is not None:
        show_timing(report.timing, console)


def show_claims(
    structural: StructuralClaim | None, annealing: AnnealingClaim | None, console: Console
) -> None:
    """Each claim on a line of its own."""
    if structural is not None:
        console.print(
            f"claim A, structural equivalence: {_verdict(structural.passed)}: {structural.reason}",
            soft_wrap=True,
        )
    if annealing is not None:
        console.print(
            f"claim B, annealing error: {_verdict(annealing.passed)}: {annealing.measure} {annealing.error:.3g}, "
            f"budget {annealing.budget:g}, on {annealing.data}",
            soft_wrap=True,
        )


def show_timing(timing: Timing, console: Console) -> None:
    """Times per batch size."""
    table = Table(
        title=f"time per run on {timing.provider.value}{_axes(timing)}, interleaved medians",
        title_justify="left",
    )
    for column in ("batch", "original ms", "rewritten ms", "speed-up", "99 % interval"):
        table.add_column(column, justify="right")
    for entry in timing.batches:
        table.add_row(
            str(entry.batch),
            f"{entry.original_ms:.3f}",
            f"{entry.rewritten_ms:.3f}",
            f"{entry.speedup:.2f}x",
            f"{entry.low:.2f} to {entry.high:.2f}",
        )
    console.print(table)


def _axes(timing: Timing) -> str:
    """At which sizes of other axes than the batch."""
    return "".join(f", {name} {size}" for name, size in timing.axes.items())


def show_cost(cost: CostModel, console: Console) -> None:
    """The coefficients of a cost model."""
    table = Table(
        title="seconds per operator or block, and rates per second", title_justify="left"
    )
    table.add_column("coefficient")
    table.add_column("value", justify="right")
    for name in COEFFICIENTS:
        table.add_row(name, f"{getattr(cost, name):.3g}")
    console.print(table)


@contextlib.contextmanager
def progress(console: Console, *, enabled: bool) -> Iterator[None]:
    """Show what the library logs as a status line while it works; nothing where nobody watches."""
    if not enabled or not console.is_terminal:
        yield
        return
    with console.status("reading the model") as status:
        handler = _StatusHandler(status.update)
        logger = logging.getLogger("onnx_decompose")
        previous = logger.level
        logger.addHandler(handler)
        logger.setLevel(min(previous or logging.INFO, logging.INFO))
        try:
            yield
        finally:
            logger.removeHandler(handler)
            logger.setLevel(previous)


class _StatusHandler(logging.Handler):
    def __init__(self, show: Callable[[str], None]) -> None:
        super().__init__(logging.INFO)
        self._show = show

    def emit(self, record: logging.LogRecord) -> None:
        self._show(record.getMessage())


def _site_table(report: Report) -> Table:
    table = Table(title=report.model, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("site", overflow="fold")
    for column in ("shape", "supported", "components", "isolated"):
        table.add_column(column, justify="right")
    for column in ("decision", "blocks"):
        table.add_column(column, overflow="fold")
    for site in report.sites[:_ROWS]:
        table.add_row(
            site.name,
            _shape(site),
            f"{site.density:.1%}",
            str(site.components),
            str(site.isolated),
            site.decision,
            _blocks(site),
        )
    return table


def _shape(site: SiteReport) -> str:
    """Inputs and outputs, and the sizes of a convolution's kernel."""
    units = f"{site.shape[0]} x {site.shape[1]}"
    return f"{units} ({' x '.join(map(str, site.kernel))})" if site.kernel else units


def _blocks(site: SiteReport) -> str:
    """Block sizes with their counts, in order of first appearance."""
    counts = collections.Counter(f"{inputs} x {outputs}" for inputs, outputs in site.blocks)
    shown = [f"{count} of {size}" if count > 1 else size for size, count in counts.items()]
    more = len(shown) - _SIZES
    return ", ".join(shown[:_SIZES]) + (f" and {more} more sizes" if more > 0 else "")


def _alternatives_table(report: Report) -> Table:
    table = Table(
        title="what other nulls and criteria would give (predicted, not verified)",
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("--null")
    table.add_column("criterion")
    for column in ("supported", "substructures", "flops"):
        table.add_column(column, justify="right")
    for other in report.alternatives:
        table.add_row(
            other.null,
            other.criterion,
            f"{other.density:.1%}",
            str(other.substructures),
            f"{other.flops_after / report.summary.flops_before:.1%}",
        )
    return table


def _joined(joined: Sequence[Joined]) -> str:
    """How many products became how many, and what that is predicted to save."""
    products = sum(len(one.widths) for one in joined)
    low, high = (choose(one.predicted for one in joined) for choose in (min, max))
    share = f"{low:.0%}" if f"{low:.0%}" == f"{high:.0%}" else f"{low:.0%} to {high:.0%}"
    return (
        f"products joined: {products} that read the same values are {len(joined)} now, "
        f"predicted to take {share} of their time"
    )


def _verdict(passed: bool) -> str:
    return "holds" if passed else "FAILS"
