"""The report as one HTML page that needs nothing else: no script, no font, no picture from elsewhere."""

from __future__ import annotations

import collections
import itertools
from typing import TYPE_CHECKING

from onnx_decompose.errors import OptionError
from onnx_decompose.model.model_io import writing

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from onnx_decompose.reporting.report import RefusedNode, Report, SiteReport

__all__ = ["write_html"]

_DRAWN = 200
"""Blocks that a picture shows; more would be too small to see."""


def write_html(report: Report, path: Path) -> None:
    """Write ``report`` as a page, whole or not at all.

    Raises:
        OptionError: jinja2 is not installed.
        OutputError: the path cannot be written.
    """
    try:
        import jinja2  # noqa: PLC0415
    except ImportError as error:
        raise OptionError(
            f"{path}: an HTML page needs jinja2; install the extra: pip install 'onnx-decompose[report]'"
        ) from error
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(share=_share, count=_count, figure=_figure, sizes=_sizes)
    page = environment.from_string(_PAGE).render(
        report=report,
        summary=report.summary,
        pictures={site.name: _rectangles(site) for site in report.sites},
        refused=_grouped(report.refused),
    )
    with writing(path) as temporary:
        temporary.write_text(page, "utf-8")


def _share(part: float, whole: float = 1.0) -> str:
    return f"{part / whole:.1%}" if whole else "-"


def _count(value: int) -> str:
    return f"{value:,}"


def _figure(value: float) -> str:
    return f"{value:.3g}"


def _sizes(blocks: Sequence[tuple[int, int]]) -> str:
    """Block sizes with their counts, in order of first appearance."""
    counts = collections.Counter(f"{inputs} x {outputs}" for inputs, outputs in blocks)
    return ", ".join(
        f"{count} of {size}" if count > 1 else size for size, count in counts.items()
    )


def _rectangles(site: SiteReport) -> tuple[tuple[int, int, int, int], ...]:
    """(x, y, width, height) of each block, units renumbered so that blocks are contiguous; inputs run downwards."""
    blocks = site.blocks[:_DRAWN]
    tops = itertools.accumulate((inputs for inputs, _ in blocks), initial=0)
    lefts = itertools.accumulate((outputs for _, outputs in blocks), initial=0)
    return tuple(
        (left, top, outputs, inputs)
        for left, top, (inputs, outputs) in zip(lefts, tops, blocks, strict=False)
    )


def _grouped(nodes: Sequence[RefusedNode]) -> dict[str, list[RefusedNode]]:
    """Nodes by reason, the most frequent reason first."""
    groups: dict[str, list[RefusedNode]] = {}
    for node in nodes:
        groups.setdefault(node.reason, []).append(node)
    return dict(sorted(groups.items(), key=lambda item: -len(item[1])))


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>onnx-decompose: {{ report.model }}</title>
<style>
:root { color-scheme: light dark; --ink: #1d2430; --soft: #5b6472; --line: #d5d9e0; --page: #fff; --block: #3d6ea5; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e3e6eb; --soft: #9aa3b0; --line: #3a414c; --page: #15181d; --block: #7ba7d9; }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page);
  max-width: 75rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; margin-bottom: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin-top: 2rem; }
.soft { color: var(--soft); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line); }
th { font-weight: 600; white-space: nowrap; }
td.n, th.n { text-align: right; }
td.name { overflow-wrap: anywhere; min-width: 8rem; }
td.why { min-width: 18rem; color: var(--soft); font-size: .9em; }
svg { border: 1px solid var(--line); display: block; }
rect { fill: var(--block); }
</style>
</head>
<body>
<h1>{{ report.model }}</h1>
<p class="soft">onnx-decompose {{ report.version }}, null {{ report.null }}, criterion {{ report.criterion }}</p>

<h2>Summary</h2>
<p><strong>{{ "Decomposable" if summary.decomposable else "Not decomposable" }}</strong>: {{ summary.reason }}</p>
<div class="scroll"><table>
<tr><th></th><th class="n">before</th><th class="n">after</th><th class="n">after / before</th></tr>
<tr><th>weights of all sites</th><td class="n">{{ summary.weights_before | count }}</td>
<td class="n">{{ summary.weights_after | count }}</td>
<td class="n">{{ summary.weights_after | share(summary.weights_before) }}</td></tr>
<tr><th>flops per row</th><td class="n">{{ summary.flops_before | count }}</td>
<td class="n">{{ summary.flops_after | count }}</td>
<td class="n">{{ summary.flops_after | share(summary.flops_before) }}</td></tr>
</table></div>
<p>{{ summary.rewritten }} of {{ summary.sites }} sites rewritten, {{ summary.substructures }} substructures.</p>

<h2>Claim A: structural equivalence (rewritten against annealed)</h2>
{% if report.structural is none %}
<p class="soft">Not measured: no model was rewritten.</p>
{% else %}
<p><strong>{{ "Holds" if report.structural.passed else "Fails" }}</strong>: {{ report.structural.reason }}</p>
{% endif %}

<h2>Claim B: annealing error (rewritten against the original)</h2>
{% if report.annealing is none %}
<p class="soft">Not measured: no model was rewritten.</p>
{% else %}
<p><strong>{{ "Holds" if report.annealing.passed else "Fails" }}</strong>: {{ report.annealing.measure }}
{{ report.annealing.error | figure }}, budget {{ report.annealing.budget | figure }}, on {{ report.annealing.data }}</p>
<div class="scroll"><table>
<tr><th>output</th><th class="n">relative L2</th><th class="n">largest</th><th class="n">mean</th>
<th class="n">cosine</th><th class="n">SQNR dB</th></tr>
{% for name, deviation in report.annealing.outputs.items() %}
<tr><td class="name">{{ name }}</td><td class="n">{{ deviation.relative_l2 | figure }}</td>
<td class="n">{{ deviation.max_abs | figure }}</td><td class="n">{{ deviation.mean_abs | figure }}</td>
<td class="n">{{ "%.6f" | format(deviation.cosine) }}</td><td class="n">{{ deviation.sqnr_db | figure }}</td></tr>
{% endfor %}
</table></div>
{% endif %}

<h2>Sites</h2>
{% if report.sites %}
<div class="scroll"><table>
<tr><th>site</th><th class="n">shape</th><th>null</th><th class="n">supported</th><th class="n">components</th>
<th class="n">isolated</th><th class="n">p by chance</th><th>decision</th><th class="n">weights after</th>
<th>blocks (inputs x outputs)</th>
<th></th><th>reason</th></tr>
{% for site in report.sites %}
<tr><td class="name">{{ site.name }}</td><td class="n">{{ site.shape[0] }} x {{ site.shape[1] }}
{% if site.kernel %}({{ site.kernel | join(" x ") }}){% endif %}</td>
<td>{{ site.null }}</td><td class="n">{{ site.density | share }}</td><td class="n">{{ site.components }}</td>
<td class="n">{{ site.isolated }}</td>
<td class="n">{{ "-" if site.p_structure is none else site.p_structure | figure }}</td><td>{{ site.decision }}</td>
<td class="n">{{ site.weights_after | share(site.weights) }}</td>
<td>{{ site.blocks | sizes }}</td>
<td>{% if pictures[site.name] %}<svg role="img" aria-label="blocks" width="90" height="60"
viewBox="0 0 {{ site.shape[1] }} {{ site.shape[0] }}" preserveAspectRatio="none">
{%- for x, y, width, height in pictures[site.name] -%}
<rect x="{{ x }}" y="{{ y }}" width="{{ width }}" height="{{ height }}"/>
{%- endfor -%}
</svg>{% endif %}</td>
<td class="why">{{ site.reason }}</td></tr>
{% endfor %}
</table></div>
{% else %}
<p class="soft">None.</p>
{% endif %}

{% if report.joined %}
<h2>Products joined</h2>
<p class="soft">Products that read the same value and became one wider product, cut by a Split; untouched sites too.</p>
<div class="scroll"><table>
<tr><th>value read</th><th>products</th><th class="n">inputs</th><th>outputs</th><th>bias</th>
<th class="n">time predicted</th></tr>
{% for one in report.joined %}
<tr><td class="name">{{ one.input }}</td><td class="name">{{ one.products | join(", ") }}</td>
<td class="n">{{ one.shape[0] }}</td><td>{{ one.widths | join(" + ") }}</td>
<td>{{ "joined" if one.bias else "none" }}</td><td class="n">{{ one.predicted | share }}</td></tr>
{% endfor %}
</table></div>
{% endif %}

<h2>Time</h2>
{% if report.timing is none %}
<p class="soft">Not measured.</p>
{% else %}
<p>{{ "%.2f" | format(report.timing.speedup) }}x over all batch sizes on {{ report.timing.provider.value }}
{%- for name, size in report.timing.axes.items() %}, {{ name }} {{ size }}{% endfor %},
interleaved medians in one process.</p>
<div class="scroll"><table>
<tr><th class="n">batch</th><th class="n">original ms</th><th class="n">rewritten ms</th><th class="n">speed-up</th>
<th class="n">99 % interval</th></tr>
{% for entry in report.timing.batches %}
<tr><td class="n">{{ entry.batch }}</td><td class="n">{{ "%.3f" | format(entry.original_ms) }}</td>
<td class="n">{{ "%.3f" | format(entry.rewritten_ms) }}</td><td class="n">{{ "%.2f" | format(entry.speedup) }}x</td>
<td class="n">{{ "%.2f to %.2f" | format(entry.low, entry.high) }}</td></tr>
{% endfor %}
</table></div>
{% endif %}

{% if report.alternatives %}
<h2>What other nulls and criteria would give</h2>
<p class="soft">Predicted from the weights, not verified.</p>
<div class="scroll"><table>
<tr><th>null</th><th>criterion</th><th class="n">supported</th><th class="n">substructures</th>
<th class="n">flops</th></tr>
{% for other in report.alternatives %}
<tr><td>{{ other.null }}</td><td>{{ other.criterion }}</td><td class="n">{{ other.density | share }}</td>
<td class="n">{{ other.substructures }}</td>
<td class="n">{{ other.flops_after | share(summary.flops_before) }}</td></tr>
{% endfor %}
</table></div>
{% endif %}

{% if refused %}
<h2>Left alone</h2>
{% for reason, nodes in refused.items() %}
<details><summary>{{ nodes | length }} node{{ "s" if nodes | length > 1 else "" }}: {{ reason }}</summary>
<ul>{% for node in nodes %}<li>{{ node.node }} ({{ node.op_type }})</li>{% endfor %}</ul></details>
{% endfor %}
{% endif %}
</body>
</html>
"""
