"""Storey's share of null entries against the true share of untouched ones.

    python -m tools.evidence_truth.null_share CACHE [--pattern '*-adamw-*']

First layers, averaged over seeds. Storey's estimate is #{p > 1/2} / (n / 2). Its expectation is
the true share u plus 2 (1 - u) P(p > 1/2 | touched): right only as far as touched entries leave
the null. The last column of each half says how far they do not.
"""

from __future__ import annotations

import argparse
import collections
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from onnx_decompose.analysis.evidence import gather_evidence
from onnx_decompose.analysis.groups import line_p_values
from tools.evidence_truth.runs import Layer, load_runs
from tools.evidence_truth.score import Source, prior_of, select

if TYPE_CHECKING:
    from typing import Any

    from numpy.typing import NDArray

__all__ = ["entry_shares", "row_shares", "storey"]


def storey(p_values: NDArray[np.floating[Any]]) -> float:
    """Storey (2002) at lambda = 1/2, at most 1."""
    return min(1.0, 2 * float((p_values > 0.5).mean()))


def entry_shares(layer: Layer) -> dict[str, float]:
    """Truth and estimates over the entries of one weight."""
    prior = prior_of(layer)
    shares = {"untouched": float((~layer.touched).mean())}
    for null in ("snapshot", "optimizer", "recorded"):
        selection = select(layer, Source(null, "fdr"), prior)
        shares[null] = float("nan") if selection is None else selection.pi0
    evidence = gather_evidence(layer.final, "recorded", prior)
    log_p = evidence.null.logsf(np.abs(layer.final - evidence.null.location))
    inside = log_p > np.log(0.5)
    shares["inside"] = float(inside[layer.touched].mean())
    return shares


def row_shares(layer: Layer) -> dict[str, float]:
    """The same over whole rows, each tested against the recorded null without decay."""
    evidence = gather_evidence(layer.final, "recorded", prior_of(layer))
    decay = evidence.decay
    null = evidence.null
    if decay is not None and decay.used:
        null = null.shrunk(1 / decay.interval[1])
    p_values = line_p_values(layer.final, null, rng=np.random.default_rng(0))
    touched = np.any(layer.touched, axis=1)
    return {
        "untouched": float((~touched).mean()),
        "rows": storey(p_values),
        "inside": float((p_values[touched] > 0.5).mean()),
    }


def _mean(rows: list[dict[str, float]]) -> dict[str, float]:
    return {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("cache", type=Path)
    parser.add_argument("--pattern", default="*")
    options = parser.parse_args()
    entries: dict[tuple[str, str], list[dict[str, float]]] = collections.defaultdict(list)
    rows: dict[tuple[str, str], list[dict[str, float]]] = collections.defaultdict(list)
    for run in load_runs(options.cache, options.pattern):
        entries[run.task, run.optimizer].append(entry_shares(run.layers[0]))
        rows[run.task, run.optimizer].append(row_shares(run.layers[0]))
    print(
        "| data | optimizer | untouched entries | snapshot | optimizer | recorded "
        "| touched with p > 1/2 | untouched rows | row tests | touched rows with p > 1/2 |"
    )
    print("|" + "---|" * 10)
    for key, found in entries.items():
        entry, row = _mean(found), _mean(rows[key])
        figures = [*entry.values(), *row.values()]
        print(f"| {key[0]} | {key[1]} | " + " | ".join(f"{x:.3f}" for x in figures) + " |")


if __name__ == "__main__":
    _main()
