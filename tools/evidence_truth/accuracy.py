"""Test accuracy at equal sparsity: each kind of evidence against magnitude.

    python -m tools.evidence_truth.accuracy CACHE [--pattern '*-adamw-*'] [--models]

First table: what each criterion itself removes, against magnitude removing as much. Second table:
every score as an order of removal, at fixed shares. No refit, biases kept. ``--models`` takes the
reference models of ``models/`` instead, of which only the recorded initialization is known.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from models.data import TASKS as DATA_SETS
from models.data import load_multitask_data, load_task_data, multitask_slots
from onnx_decompose.analysis.criteria import make_criterion
from onnx_decompose.analysis.evidence import gather_evidence
from onnx_decompose.analysis.null import parse_null
from onnx_decompose.analysis.record import Prior
from onnx_decompose.graph.sites import find_sites, site_weight
from onnx_decompose.model.constants import Constants
from onnx_decompose.model.model_io import load_model
from onnx_decompose.records.priors import read_records
from tools.evidence_truth.runs import Run, load_runs
from tools.evidence_truth.score import prior_of
from tools.evidence_truth.tasks import Task, load_task

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from numpy.typing import NDArray

    FloatArray = NDArray[np.floating[Any]]
    BoolArray = NDArray[np.bool_]

__all__ = ["Network", "measure_accuracy", "network_of", "scores"]

SHARES = (0.5, 0.8, 0.9, 0.95)
CRITERIA = (
    ("zero", "fdr"),
    ("snapshot", "fdr"),
    ("snapshot", "displacement"),
    ("optimizer", "fdr"),
    ("recorded", "fdr"),
    ("recorded", "group"),
    ("empirical", "fdr"),
)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Network:
    """A trained MLP with ReLU between its layers, and what is known of each weight.

    Attributes:
        label: name in the tables.
        weights: per layer (K, N).
        biases: per layer (N,).
        priors: per layer.
        inputs: (samples, K) test inputs.
        labels: (samples,) index of the right output.
        allowed: (samples, outputs) the outputs that compete.
    """

    label: str
    weights: tuple[FloatArray, ...]
    biases: tuple[FloatArray, ...]
    priors: tuple[Prior, ...]
    inputs: FloatArray
    labels: NDArray[np.int64]
    allowed: BoolArray


def network_of(run: Run, task: Task) -> Network:
    """The network of an instrumented training, with its snapshot and its optimizer state."""
    return Network(
        f"{run.task} | {run.optimizer}",
        tuple(layer.final for layer in run.layers),
        tuple(layer.bias for layer in run.layers),
        tuple(prior_of(layer) for layer in run.layers),
        task.test_inputs,
        task.test_labels,
        task.test_allowed,
    )


def reference_network(path: Path) -> Network:
    """A reference model, with the initialization that its metadata records."""
    model = load_model(path)
    constants = Constants(model)
    sites, _ = find_sites(model, constants)
    records = read_records(model.proto)
    weights = tuple(site_weight(site, constants) for site in sites)
    biases = tuple(
        constants.array(model.proto.graph.node[site.node].input[2]) for site in sites
    )
    priors = tuple(
        Prior(site.shape[0], site.shape[1], records.get(site.tensor)) for site in sites
    )
    if path.stem == "digits_mlp":
        test = load_task_data("digits").test
        labels, allowed = test.labels, np.ones((len(test.labels), 10), dtype=bool)
    else:
        test, slots = load_multitask_data().test, multitask_slots()
        starts = np.array([slot.start for slot in slots.outputs])
        labels = test.labels + starts[test.task]
        masks = np.zeros((len(DATA_SETS), slots.shape[1]), dtype=bool)
        for row, slot in zip(masks, slots.outputs, strict=True):
            row[slot] = True
        allowed = masks[test.task]
    label = f"{path.stem} | as committed"
    return Network(label, weights, biases, priors, test.inputs, labels, allowed)


def measure_accuracy(network: Network, masks: Sequence[BoolArray] | None = None) -> float:
    """Share of right answers when only the entries of ``masks`` are kept."""
    values = network.inputs
    last = len(network.weights) - 1
    for k, (weight, bias) in enumerate(zip(network.weights, network.biases, strict=True)):
        kept = weight if masks is None else np.where(masks[k], weight, 0)
        values = values @ kept + bias
        if k < last:
            values = np.maximum(values, 0)
    predicted = np.where(network.allowed, values, -np.inf).argmax(axis=1)
    return float((predicted == network.labels).mean())


def scores(network: Network) -> dict[str, list[FloatArray]]:
    """Per kind of evidence, per layer: (K, N), higher is kept longer.

    ``recorded`` is the negative log p-value under the recorded null; ``displacement`` is
    ``|w - s * w0|``; ``second moment`` is Adam's. ``per layer`` ranks magnitudes within a layer.
    """
    found: dict[str, list[FloatArray]] = {
        "magnitude": [np.abs(w) for w in network.weights],
        "magnitude per layer": [_ranks(np.abs(w)) for w in network.weights],
    }
    pairs = list(zip(network.weights, network.priors, strict=True))
    if all(prior.record is not None for prior in network.priors):
        found["magnitude over the recorded deviation"] = [
            np.abs(w) / _recorded_deviation(prior) for w, prior in pairs
        ]
    if all(prior.snapshot is not None for prior in network.priors):
        found["displacement"] = [
            np.abs(gather_evidence(w, "snapshot", prior).values) for w, prior in pairs
        ]
    if all(prior.second_moment is not None for prior in network.priors):
        moments = [p.second_moment for p in network.priors if p.second_moment is not None]
        found["second moment"] = moments
        found["magnitude x root second moment"] = [
            np.abs(w) * np.sqrt(m) for w, m in zip(network.weights, moments, strict=True)
        ]
    return found


def _recorded_deviation(prior: Prior) -> float:
    assert prior.record is not None
    spec = f"{prior.record.family}:{prior.record.scale!r}"
    return parse_null(spec, fan_in=prior.fan_in, fan_out=prior.fan_out).std


def _ranks(magnitude: FloatArray) -> FloatArray:
    ranks = np.empty(magnitude.size)
    ranks[np.argsort(magnitude, axis=None)] = np.arange(magnitude.size) / magnitude.size
    return ranks.reshape(magnitude.shape)


def kept_by(score: Sequence[FloatArray], share: float) -> list[BoolArray]:
    """Masks that remove exactly ``share`` of all entries, the lowest scores over all layers."""
    flat = np.concatenate([s.ravel() for s in score])
    kept = np.ones(flat.size, dtype=bool)
    kept[np.argsort(flat, kind="stable")[: round(share * flat.size)]] = False
    ends = np.cumsum([s.size for s in score])
    parts = np.split(kept, ends[:-1])
    return [part.reshape(s.shape) for part, s in zip(parts, score, strict=True)]


def criterion_rows(network: Network) -> list[tuple[str, float, float, float, float]]:
    """Per criterion: name, share removed, accuracy, magnitude's (over layers, per layer)."""
    ranked = scores(network)
    rows = []
    for null, name in CRITERIA:
        if null == "optimizer" and any(p.second_moment is None for p in network.priors):
            continue
        if null == "snapshot" and any(p.snapshot is None for p in network.priors):
            continue
        masks = [
            make_criterion(name, 0.01)
            .select(gather_evidence(w, null, prior), rng=np.random.default_rng(0))
            .mask
            for w, prior in zip(network.weights, network.priors, strict=True)
        ]
        removed = 1 - sum(int(m.sum()) for m in masks) / sum(m.size for m in masks)
        same_layers = [
            kept_by([np.abs(w)], 1 - float(m.mean()))[0]
            for w, m in zip(network.weights, masks, strict=True)
        ]
        rows.append(
            (
                f"{null} + {name}",
                removed,
                measure_accuracy(network, masks),
                measure_accuracy(network, kept_by(ranked["magnitude"], removed)),
                measure_accuracy(network, same_layers),
            )
        )
    return rows


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("cache", type=Path, nargs="?")
    parser.add_argument("--pattern", default="*-adamw-*")
    parser.add_argument("--models", action="store_true")
    options = parser.parse_args()
    if options.models:
        names = ("digits_mlp", "multitask_sparse", "multitask_dense")
        networks = [reference_network(Path("models") / f"{name}.onnx") for name in names]
    else:
        runs = load_runs(options.cache, options.pattern)
        networks = [network_of(run, load_task(run.task)) for run in runs]
    groups = [
        (label, list(group)) for label, group in itertools.groupby(networks, lambda n: n.label)
    ]
    print(
        "| network | training | criterion | removed | accuracy before | accuracy "
        "| magnitude, as much | magnitude, as much in each layer |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for label, group in groups:
        before = np.mean([measure_accuracy(n) for n in group])
        for rows in zip(*(criterion_rows(n) for n in group), strict=True):
            means = np.mean([row[1:] for row in rows], axis=0)
            print(
                f"| {label} | {rows[0][0]} | {means[0]:.4f} | {before:.4f} | "
                + " | ".join(f"{x:.4f}" for x in means[1:])
                + " |"
            )
    print(
        "\n| network | training | order of removal | "
        + " | ".join(f"{share:.0%} removed" for share in SHARES)
        + " |"
    )
    print("|" + "---|" * (3 + len(SHARES)))
    for label, group in groups:
        for name in scores(group[0]):
            kept = [
                np.mean([measure_accuracy(n, kept_by(scores(n)[name], share)) for n in group])
                for share in SHARES
            ]
            print(f"| {label} | {name} | " + " | ".join(f"{x:.4f}" for x in kept) + " |")


if __name__ == "__main__":
    _main()
