"""The common factor of decay, estimated from the trained weights alone, against the true one.

    python -m tools.evidence_truth.decay_factor CACHE [--pattern '*-adamw-*']

The truth is the median of shadow over initial value. ``lines`` estimates shrink the null, ``bulk``
ones do not. The last line says how often each kind's interval holds the truth, and the largest
share of untouched entries among those that ``fdr`` supports, over its level. A second table is
of ``group`` on the rows of first layers where the user states the true factor, ``recorded:decay=S``.
"""

from __future__ import annotations

import argparse
import collections
from pathlib import Path

import numpy as np

from onnx_decompose.analysis.criteria import make_criterion
from onnx_decompose.analysis.evidence import gather_evidence
from tools.evidence_truth.runs import Layer, load_runs
from tools.evidence_truth.score import Tally, prior_of

__all__ = ["false_edges", "rows_with_stated_factor", "true_factor"]

LEVELS = (0.01, 0.05)


def true_factor(layer: Layer) -> float:
    """What an untouched entry was multiplied by; 0 where coupled decay under Adam ate it up."""
    moving = layer.initial != 0
    return max(0.0, float(np.median(layer.shadow[moving] / layer.initial[moving])))


def false_edges(layer: Layer, level: float) -> float:
    """Share of untouched entries among those that ``recorded`` and ``fdr`` support."""
    evidence = gather_evidence(layer.final, "recorded", prior_of(layer))
    mask = make_criterion("fdr", level).select(evidence, rng=np.random.default_rng(0)).mask
    return np.count_nonzero(mask & ~layer.touched) / max(int(np.count_nonzero(mask)), 1)


def rows_with_stated_factor(layer: Layer) -> Tally:
    """Rows that ``group`` calls untouched when told the true factor, and those that are."""
    tally = Tally()
    factor = true_factor(layer)
    if factor == 0:  # nothing is left of what was never touched
        return tally
    evidence = gather_evidence(layer.final, f"recorded:decay={factor!r}", prior_of(layer))
    mask = (
        make_criterion("group", LEVELS[0]).select(evidence, rng=np.random.default_rng(0)).mask
    )
    called, untouched = ~mask.any(axis=1), ~layer.touched.any(axis=1)
    tally.size = called.size
    tally.called, tally.untouched = int(called.sum()), int(untouched.sum())
    tally.both = int((called & untouched).sum())
    return tally


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("cache", type=Path)
    parser.add_argument("--pattern", default="*")
    options = parser.parse_args()
    kinds: dict[str, list[bool]] = collections.defaultdict(list)
    rows: dict[str, Tally] = collections.defaultdict(Tally)
    worst = 0.0
    print("| training | seed | layer | true factor | estimate | interval | from |")
    print("|" + "---|" * 7)
    for run in load_runs(options.cache, options.pattern):
        pooled, one = (
            rows[f"{run.task}-{run.optimizer}"],
            rows_with_stated_factor(run.layers[0]),
        )
        pooled.called += one.called
        pooled.untouched += one.untouched
        pooled.both += one.both
        for layer in run.layers:
            decay = gather_evidence(layer.final, "recorded", prior_of(layer)).decay
            assert decay is not None
            truth, (low, high) = true_factor(layer), decay.interval
            kinds[decay.basis].append(low * (1 - 1e-6) <= truth <= high * (1 + 1e-6))
            worst = max(worst, *(false_edges(layer, level) / level for level in LEVELS))
            print(
                f"| {run.task}-{run.optimizer} | {run.seed} | {layer.index} | {truth:.3f} "
                f"| {decay.factor:.3f} | {low:.3f} to {high:.3f} | {decay.basis} |"
            )
    for basis, hits in kinds.items():
        print(f"\n{basis}: the interval holds the truth in {sum(hits)} of {len(hits)} layers")
    print(
        "\n| training | untouched rows | called | precision | recall |\n|---|---|---|---|---|"
    )
    for name, tally in rows.items():
        print(
            f"| {name} | {tally.untouched} | {tally.called} | {tally.precision:.3f} "
            f"| {tally.recall:.3f} |"
        )
    print(f"\nlargest share of untouched entries among the supported: {worst:.2f} of the level")


if __name__ == "__main__":
    _main()
