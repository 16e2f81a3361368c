"""The corpus runner's table, and what in it counts as a failure."""

from __future__ import annotations

import collections
import textwrap
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["SLOWER", "failures", "markdown"]

SLOWER = 1.02
"""A rewritten model may take this many times the original's time, about what a measurement can tell."""

_DEFECTS = {"StructuralError", "AnnealingError", "ClaimError", "PassError"}
_HEAD = (
    *("model", "MB", "sites", "forms", "refused", "decision", "reason"),
    *("analyze s", "rewrite s", "peak MB", "speed-up", "rest equal"),
)
_LONGEST = 180


def failures(outcome: Mapping[str, Any]) -> list[str]:
    """What of one model's outcome counts against the program; empty if nothing does."""
    faults: list[str] = []
    if "crash" in outcome:
        faults.append(f"crash: {outcome['crash']}")
    if "traceback" in outcome:
        last = outcome["traceback"]["text"].strip().splitlines()[-1]
        faults.append(f"traceback in {outcome['traceback']['stage']}: {last}")
    error = outcome.get("error", {})
    if error.get("kind") in _DEFECTS:
        faults.append(f"{error['kind']} in {error['stage']}: {error['text']}")
    if outcome.get("valid") is False:
        faults.append(f"not valid: {outcome['invalid_because']}")
    if (outcome.get("speedup") or 1.0) * SLOWER < 1:
        faults.append(f"slower: {outcome['speedup']:.3f}x")
    faults.extend(outcome.get("changed", ()))
    return faults


def markdown(outcomes: Mapping[str, Mapping[str, Any]], versions: str) -> str:
    """All outcomes as one table, the failures counted above it."""
    rows = [_row(name, outcome) for name, outcome in outcomes.items()]
    lines = [_line(_HEAD), _line(["---"] * len(_HEAD)), *map(_line, rows)]
    return "\n".join([_totals(outcomes), "", f"Versions: {versions}.", "", *lines, ""])


def _totals(outcomes: Mapping[str, Mapping[str, Any]]) -> str:
    counts: collections.Counter[str] = collections.Counter()
    for outcome in outcomes.values():
        counts["rewritten"] += outcome.get("decision") == "rewritten"
        counts["unchanged"] += outcome.get("decision") == "unchanged"
        counts["errors"] += "error" in outcome
        counts["tracebacks"] += "traceback" in outcome or "crash" in outcome
        counts["invalid"] += outcome.get("valid") is False
        counts["slower"] += (outcome.get("speedup") or 1.0) * SLOWER < 1
        counts["changed"] += bool(outcome.get("changed"))
    return (
        f"{len(outcomes)} models: {counts['rewritten']} rewritten, {counts['unchanged']} left as they were, of "
        f"{counts['errors']} a stage ended with a reason; {counts['tracebacks']} tracebacks or crashes, "
        f"{counts['invalid']} validation failures, {counts['slower']} slower than {SLOWER}x, "
        f"{counts['changed']} with anything else changed."
    )


def _row(name: str, outcome: Mapping[str, Any]) -> list[str]:
    seconds = outcome.get("seconds", {})
    refused = [
        f"{e['nodes']} {e['op_type']}: {e['reason']}" for e in outcome.get("refused", ())
    ]
    forms = [f"{count} {form}" for form, count in outcome.get("forms", {}).items()]
    changed = outcome.get("changed")
    return [
        name,
        f"{outcome['bytes'] / 1e6:.1f}",
        str(outcome.get("sites", "")),
        "; ".join(forms),
        "; ".join(refused),
        _decision(outcome),
        _reason(outcome),
        *(f"{seconds[s]:.1f}" if seconds.get(s) else "" for s in ("analyze", "rewrite")),
        f"{outcome['peak_mb']:.0f}" if "peak_mb" in outcome else "",
        f"{outcome['speedup']:.2f}" if outcome.get("speedup") else _same(outcome),
        "" if changed is None else ("no" if changed else "yes"),
    ]


def _same(outcome: Mapping[str, Any]) -> str:
    return "same file" if outcome.get("same_file") else ""


def _decision(outcome: Mapping[str, Any]) -> str:
    if failures(outcome):
        return "**failed**"
    return str(outcome.get("decision", f"not run ({outcome.get('error', {}).get('stage')})"))


def _reason(outcome: Mapping[str, Any]) -> str:
    faults = failures(outcome)
    if faults:
        return textwrap.shorten("; ".join(faults), _LONGEST)
    parts = [outcome.get("reason", "")]
    error = outcome.get("error")
    if error is not None:
        text = error["text"].split(": ", 1)[-1]  # the path says nothing here
        parts.append(f"{error['stage']}: {text}")
    return textwrap.shorten("; ".join(filter(None, parts)), 2 * _LONGEST)


def _line(cells: list[str] | tuple[str, ...]) -> str:
    return (
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
    )
