"""Precision and recall of every evidence source against the gradients of real trainings.

    python -m tools.evidence_truth.score CACHE [--only entries|rows|pi0] [--pattern 'digits-adamw-*']

The class to find is "untouched". Precision: of the entries called unsupported, the share that never
received a nonzero gradient. Recall: of the entries that never received one, the share called
unsupported. Counts are pooled over layers and seeds. ``CACHE`` is what ``train.py`` filled.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from onnx_decompose.analysis.criteria import criterion_names, make_criterion
from onnx_decompose.analysis.evidence import gather_evidence
from onnx_decompose.analysis.record import Prior
from onnx_decompose.records.init_recorder import record_initialization
from tools.evidence_truth.runs import Layer, Run, load_runs

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from typing import Any

    from numpy.typing import NDArray

    from onnx_decompose.analysis.criteria import Selection

__all__ = ["SOURCES", "Source", "Tally", "prior_of", "select", "tally_entries", "tally_rows"]

ALPHA = 0.01


@dataclasses.dataclass(frozen=True, slots=True)
class Source:
    """A null and a criterion; ``criterion`` None: as many smallest magnitudes as are untouched."""

    null: str
    criterion: str | None

    @property
    def name(self) -> str:
        """As the tables show it."""
        if self.criterion is None:
            return "smallest magnitudes, as many as are untouched"
        return f"{self.null} + {self.criterion}"


SOURCES = (
    Source("snapshot", "fdr"),
    Source("snapshot", "displacement"),
    Source("optimizer", "fdr"),
    Source("recorded", "fdr"),
    Source("recorded", "group"),
    Source("torch", "fdr"),
    Source("torch", "group"),
    Source("empirical", "fdr"),
    Source("zero", "fdr"),
    Source("zero", None),
)


@dataclasses.dataclass(slots=True)
class Tally:
    """Pooled counts for one source.

    Attributes:
        size: entries or rows in all.
        called: called unsupported.
        untouched: never received a nonzero gradient.
        both: both of these.
        unmoved: called, touched, and yet bit for bit what the shadow is.
        farthest: of the entries called though touched, the largest distance from the shadow,
            relative to the shadow.
    """

    size: int = 0
    called: int = 0
    untouched: int = 0
    both: int = 0
    unmoved: int = 0
    farthest: float = 0.0

    @property
    def precision(self) -> float:
        """NaN where nothing was called."""
        return self.both / self.called if self.called else float("nan")

    @property
    def false_edges(self) -> float:
        """Of what is supported, the share that is untouched: what ``fdr`` promises to bound."""
        supported = self.size - self.called
        return (self.untouched - self.both) / supported if supported else float("nan")

    @property
    def recall(self) -> float:
        """NaN where there is nothing to find."""
        return self.both / self.untouched if self.untouched else float("nan")


def prior_of(layer: Layer) -> Prior:
    """Everything that an exporter with a snapshot and an optimizer file would know."""
    inputs, outputs = layer.initial.shape
    record = record_initialization(
        "weight", layer.initial, inputs, outputs, rng=np.random.default_rng(0)
    )
    return Prior(inputs, outputs, record, layer.initial, layer.state)


def select(layer: Layer, source: Source, prior: Prior) -> Selection | None:
    """What the source decides; None where its criterion or its data does not exist."""
    if source.criterion is None or source.criterion not in criterion_names():
        return None
    if source.null == "optimizer" and layer.state is None:
        return None
    evidence = gather_evidence(layer.final, source.null, prior)
    criterion = make_criterion(source.criterion, ALPHA)
    return criterion.select(evidence, rng=np.random.default_rng(0))


def called_unsupported(layer: Layer, source: Source, prior: Prior) -> NDArray[np.bool_] | None:
    """(K, N) True where the source calls the entry unsupported."""
    if source.criterion is not None:
        selection = select(layer, source, prior)
        return None if selection is None else ~selection.mask
    magnitude = np.abs(layer.final)
    called = np.zeros(magnitude.size, dtype=bool)
    called[np.argsort(magnitude, axis=None)[: np.count_nonzero(~layer.touched)]] = True
    return called.reshape(magnitude.shape)


def tally_entries(runs: Iterable[Run], sources: Sequence[Source] = SOURCES) -> dict[str, Tally]:
    """Counts over all entries of all layers of ``runs``, per source that applies."""
    tallies: dict[str, Tally] = collections.defaultdict(Tally)
    for layer in _layers(runs):
        prior = prior_of(layer)
        for source in sources:
            called = called_unsupported(layer, source, prior)
            if called is None:
                continue
            tally = tallies[source.name]
            _add(tally, called, ~layer.touched)
            wrong = called & layer.touched
            tally.unmoved += int(np.count_nonzero(wrong & (layer.final == layer.shadow)))
            away = _relative_distance(layer, wrong)
            tally.farthest = max(tally.farthest, float(away.max(initial=0.0)))
    return tallies


def tally_rows(runs: Iterable[Run], sources: Sequence[Source] = SOURCES) -> dict[str, Tally]:
    """Counts over the rows of first layers: constant pixels, never-seen words.

    A row is called where all of it is called, and untouched where all of it is. ``farthest`` is
    the largest relative distance of a whole row from its shadow (norm over norm).
    """
    tallies: dict[str, Tally] = collections.defaultdict(Tally)
    for run in runs:
        layer = run.layers[0]
        prior = prior_of(layer)
        for source in sources:
            called = called_unsupported(layer, source, prior)
            if called is None:
                continue
            tally = tallies[source.name]
            rows = np.all(called, axis=1)
            truth = np.all(~layer.touched, axis=1)
            _add(tally, rows, truth)
            wrong = rows & ~truth
            moved = np.linalg.norm(layer.final[wrong] - layer.shadow[wrong], axis=1)
            share = moved / np.linalg.norm(layer.shadow[wrong], axis=1)
            tally.farthest = max(tally.farthest, float(share.max(initial=0.0)))
    return tallies


def _add(tally: Tally, called: NDArray[np.bool_], untouched: NDArray[np.bool_]) -> None:
    tally.size += called.size
    tally.called += int(np.count_nonzero(called))
    tally.untouched += int(np.count_nonzero(untouched))
    tally.both += int(np.count_nonzero(called & untouched))


def _relative_distance(layer: Layer, where: NDArray[np.bool_]) -> NDArray[np.floating[Any]]:
    shadow = layer.shadow[where].astype(np.float64)
    return np.abs(layer.final[where] - shadow) / np.maximum(np.abs(shadow), 1e-30)


def _layers(runs: Iterable[Run]) -> Iterator[Layer]:
    for run in runs:
        yield from run.layers


def _print_tallies(title: str, grouped: dict[tuple[str, str], dict[str, Tally]]) -> None:
    print(f"\n{title}\n")
    print(
        "| data | optimizer | evidence | untouched | called | precision | recall | false edges "
        "| wrong calls equal to the shadow | farthest wrong call |"
    )
    print("|" + "---|" * 10)
    for (task, optimizer), tallies in grouped.items():
        for name, tally in tallies.items():
            print(
                f"| {task} | {optimizer} | {name} | {tally.untouched} | {tally.called} "
                f"| {tally.precision:.4f} | {tally.recall:.4f} | {tally.false_edges:.4f} "
                f"| {tally.unmoved} | {tally.farthest:.1e} |"
            )


def _print_pi0(runs: Iterable[Run]) -> None:
    print("\n| data | optimizer | seed | layer | untouched | null | pi0 | 95 % interval |")
    print("|---|---|---|---|---|---|---|---|")
    wanted = [
        Source(null, "fdr")
        for null in ("snapshot", "optimizer", "recorded", "torch", "empirical")
    ]
    for run in runs:
        for layer in run.layers:
            for source in wanted:
                selection = select(layer, source, prior_of(layer))
                if selection is not None:
                    low, high = selection.pi0_interval
                    print(
                        f"| {run.task} | {run.optimizer} | {run.seed} | {layer.index} "
                        f"| {1 - layer.touched.mean():.3f} | {source.null} "
                        f"| {selection.pi0:.3f} | {low:.3f} to {high:.3f} |"
                    )


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("cache", type=Path)
    parser.add_argument("--only", choices=["entries", "rows", "pi0"])
    parser.add_argument("--pattern", default="*")
    options = parser.parse_args()
    grouped: dict[tuple[str, str], list[Run]] = collections.defaultdict(list)
    for run in load_runs(options.cache, options.pattern):
        grouped[run.task, run.optimizer].append(run)
    if options.only in {None, "entries"}:
        _print_tallies("Entries", {key: tally_entries(runs) for key, runs in grouped.items()})
    if options.only in {None, "rows"}:
        _print_tallies(
            "Rows of the first layer", {k: tally_rows(r) for k, r in grouped.items()}
        )
    if options.only in {None, "pi0"}:
        _print_pi0(run for runs in grouped.values() for run in runs)


if __name__ == "__main__":
    _main()
