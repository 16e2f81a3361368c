"""Measured error rates and power of the evidence, by simulation.

    python -m tools.simulate_evidence false-edges --draws 1000 --sizes 64 256 512 1024
    python -m tools.simulate_evidence power --draws 200

``false-edges`` draws weights that nobody trained, and weights with planted effects, and counts
what is supported all the same. A cell is above its level when it exceeds it by more than two
standard errors; as some of hundreds of cells do so by chance, Holm's procedure over all cells
says whether any does more than that. ``power`` shows the share of planted effects that each
criterion finds.

One initial draw serves every null that is true of it, and every decay, dtype and criterion, so
the cells of one table are paired, not independent.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import itertools
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import special

from onnx_decompose.analysis.channels import stacked_channels
from onnx_decompose.analysis.criteria import make_criterion
from onnx_decompose.analysis.evidence import Evidence, gather_evidence
from onnx_decompose.analysis.record import QUANTILE_LEVELS, InitRecord, Prior

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    FloatArray = NDArray[np.floating[Any]]
    BoolArray = NDArray[np.bool_]

LEVEL = 0.05
SIGMA = 0.02
PLANTED = 0.02
PLANTED_ROWS = 0.1
EFFECT = 6.0
WALKING = 0.3
WALK = 0.05
KSIGMA_LEVEL = 0.01
DTYPES = ("float32", "float16")
DECAYS = (1.0, 0.6)
SAVE_EVERY = 10
POWER_SIZE = 256


def _trunc_normal(rng: np.random.Generator, n: int) -> FloatArray:
    draws = rng.standard_normal((n, n), dtype=np.float32)
    while (outside := np.abs(draws) > 2).any():
        draws[outside] = rng.standard_normal(np.count_nonzero(outside), dtype=np.float32)
    return draws * np.float32(SIGMA)


INITIALIZATIONS: dict[str, Callable[[np.random.Generator, int], FloatArray]] = {
    "normal": lambda rng, n: rng.standard_normal((n, n), dtype=np.float32) * np.float32(SIGMA),
    "uniform": lambda rng, n: (
        (rng.random((n, n), dtype=np.float32) - np.float32(0.5))
        * np.float32(math.sqrt(12) * SIGMA)
    ),
    "trunc_normal": _trunc_normal,
    "logistic": lambda rng, n: rng.logistic(0, SIGMA / 1.8138, (n, n)).astype(np.float32),
}

# initialization -> the nulls that are true of it, as the command line names them
NULLS = {
    "normal": (
        f"normal:{SIGMA}",
        f"normal:{SIGMA},decay=S",
        "recorded (normal)",
        "empirical",
        "snapshot",
        "optimizer",
    ),
    "uniform": (f"uniform:{math.sqrt(3) * SIGMA!r}", "recorded (uniform)"),
    "trunc_normal": (f"trunc_normal:{SIGMA}",),
    "logistic": ("recorded (other)",),
}
EXACT = ("snapshot", "optimizer")
CRITERIA = ("fdr", "fwer", "ksigma", "displacement", "group")
# what is planted -> the criteria that it judges; whole rows are for group alone
JUDGED = {
    "nothing": ("fdr", "fwer", "ksigma", "group"),
    "entries": ("fdr", "fwer", "ksigma"),
    "rows": ("group",),
    "walk": ("displacement",),
}


@dataclasses.dataclass(frozen=True, slots=True)
class Cell:
    """One measured rate."""

    null: str
    criterion: str
    size: int
    dtype: str
    decay: float
    planted: str


@dataclasses.dataclass(slots=True)
class Tally:
    """Errors of one cell, summed over draws; ``claims`` counts draws in which a null was found."""

    draws: int = 0
    total: float = 0.0
    squares: float = 0.0
    claims: int = 0

    def add(self, error: float, claims: bool) -> None:
        """One draw more."""
        self.draws += 1
        self.total += error
        self.squares += error * error
        self.claims += claims

    @property
    def mean(self) -> float:
        """Measured error rate."""
        return self.total / self.draws

    @property
    def error(self) -> float:
        """Standard error of the mean."""
        spread = max(self.squares / self.draws - self.mean**2, 0.0)
        return math.sqrt(spread / max(self.draws - 1, 1))


def record_of(initial: FloatArray, family: str) -> InitRecord:
    """What a recorder notes of an initial weight."""
    quantiles = np.quantile(initial, QUANTILE_LEVELS)
    location, scale = float(initial.mean()), float(initial.std())
    if family == "uniform":
        low, high = float(initial.min()), float(initial.max())
        location = (low + high) / 2
        scale = (high - low) / 2 * (initial.size + 1) / (initial.size - 1)
    return InitRecord(
        "weight",
        initial.shape,
        family,
        location,
        scale,
        tuple(quantiles.tolist()),
        initial.shape[0],
        initial.shape[1],
    )


def plant(
    shape: tuple[int, int], planted: str, rng: np.random.Generator
) -> tuple[FloatArray | None, BoolArray, BoolArray]:
    """What training adds; which entries it touched; which of them are edges.

    ``walk`` touches a third of the entries, most of them without a consistent gradient.
    """
    touched = np.zeros(shape, dtype=bool)
    if planted == "nothing":
        return None, touched, touched
    if planted == "rows":
        touched[rng.random(shape[0]) < PLANTED_ROWS] = True
    else:
        touched = rng.random(shape, dtype=np.float32) < PLANTED
    edges = touched
    step = np.zeros(shape, dtype=np.float32)
    effects = rng.choice([-EFFECT, EFFECT], np.count_nonzero(edges)) * SIGMA
    if planted == "walk":
        touched = edges | (rng.random(shape, dtype=np.float32) < WALKING)
        walk = rng.standard_normal(np.count_nonzero(touched), dtype=np.float32)
        step[touched] = walk * np.float32(WALK * SIGMA)
    step[edges] += effects.astype(np.float32)
    return step, touched, edges


def evidence_of(
    cell: Cell,
    weight: FloatArray,
    initial: FloatArray,
    touched: BoolArray,
    record: InitRecord | None,
) -> Evidence:
    """As the pipeline would gather it."""
    prior = Prior(*weight.shape)
    spec = cell.null.split(" ")[0].replace("decay=S", f"decay={cell.decay}")
    if spec == "recorded":
        prior = dataclasses.replace(prior, record=record)
    elif spec == "snapshot":
        prior = dataclasses.replace(prior, snapshot=initial)
    elif spec == "optimizer":
        moment = np.where(touched, np.float32(1e-6), np.float32(0))
        prior = dataclasses.replace(prior, second_moment=moment)
    return gather_evidence(weight, spec, prior)


def error_of(criterion: str, mask: BoolArray, edges: BoolArray) -> float:
    """The criterion's false discovery proportion, or its own kind of error rate."""
    if criterion == "group":  # rows are judged: every column holds some touched entry
        mask, edges = np.asarray(mask.any(axis=1)), np.asarray(edges.any(axis=1))
    false = int(np.count_nonzero(mask & ~edges))
    if criterion == "ksigma":
        return false / max(edges.size - int(np.count_nonzero(edges)), 1)
    if criterion == "fwer":
        return float(false > 0)
    return false / max(int(np.count_nonzero(mask)), 1)


def one_draw(
    initialization: str, size: int, seed: int, chosen: tuple[str, ...]
) -> Iterator[tuple[Cell, float, bool]]:
    """Every cell that one initial weight serves: its error, and whether there was a null."""
    rng = np.random.default_rng([size, list(INITIALIZATIONS).index(initialization), seed])
    initial = INITIALIZATIONS[initialization](rng, size)
    recorded = [n for n in NULLS[initialization] if n.startswith("recorded")]
    records = {null: record_of(initial, null.split("(")[1].rstrip(")")) for null in recorded}
    for planted, judged in JUDGED.items():
        criteria = [name for name in judged if name in chosen]
        nulls = ("snapshot",) if planted == "walk" else NULLS[initialization]
        if not criteria or (planted == "walk" and initialization != "normal"):
            continue
        step, touched, edges = plant(initial.shape, planted, rng)
        for decay, dtype in itertools.product(DECAYS, DTYPES):
            weight = initial * np.float32(decay)
            if step is not None:
                weight += step
            weight = weight.astype(dtype)
            for null in nulls:
                cell = Cell(null, "", size, dtype, decay, planted)
                evidence = evidence_of(cell, weight, initial, touched, records.get(null))
                # Without an edge there is no empirical null, and nothing is claimed.
                claims = null in EXACT or evidence.source != "zero"
                for name in criteria:
                    level = KSIGMA_LEVEL if name == "ksigma" else LEVEL
                    if claims:
                        mask = make_criterion(name, level).select(evidence, rng=rng).mask
                        error = error_of(name, mask, edges)
                    else:
                        error = 0.0
                    yield dataclasses.replace(cell, criterion=name), error, claims


def nominal_of(cell: Cell) -> float:
    """The level; for ``ksigma``, which guarantees none, the family's own tail beyond k."""
    if cell.criterion != "ksigma":
        return LEVEL
    k = 2.5758293
    beyond = {
        "normal": KSIGMA_LEVEL,
        "logistic": 2 / (1 + math.exp(k * math.pi / math.sqrt(3))),
    }
    family = next(family for family, nulls in NULLS.items() if cell.null in nulls)
    return 0.0 if cell.null in EXACT else beyond.get(family, 0.0)


def table(tallies: dict[Cell, Tally], *, full: bool) -> tuple[str, int]:
    """Markdown, and how many cells Holm's procedure over all of them finds above their level."""
    scores = {}
    for cell, tally in tallies.items():
        over = tally.mean - nominal_of(cell)
        certain = math.inf if over > 0 else -math.inf
        scores[cell] = over / tally.error if tally.error else certain
    lines = [
        "| null | criterion | size | draws | nominal | worst of | measured | s.e. | where |",
        "|" + "---|" * 11,
    ]
    lines[0] += " above by 2 s.e. | draws with a null |"
    grouped: dict[tuple[object, ...], list[Cell]] = collections.defaultdict(list)
    for cell in tallies:
        key = (cell.null, cell.criterion, cell.size)
        grouped[key if not full else (cell,)].append(cell)
    for cells in grouped.values():
        worst = max(cells, key=lambda c: (scores[c], tallies[c].mean))
        tally = tallies[worst]
        above = sum(scores[c] > 2 for c in cells)
        claims = sum(tallies[c].claims for c in cells) / sum(tallies[c].draws for c in cells)
        where = f"{worst.dtype}, decay {worst.decay}, {worst.planted}"
        lines.append(
            f"| {worst.null} | {worst.criterion} | {worst.size} | {tally.draws} "
            f"| {nominal_of(worst):.4g} | {len(cells)} | {tally.mean:.5f} | {tally.error:.5f} "
            f"| {where} | {above or ''} | {claims:.0%} |"
        )
    above = sum(z > 2 for z in scores.values())
    log_p = np.sort(special.log_ndtr(-np.array(list(scores.values()))))
    steps = math.log(0.05) - np.log(log_p.size - np.arange(log_p.size))
    passing = log_p <= steps
    rejected = int(np.argmin(passing)) if not passing.all() else int(passing.size)
    lines.append(
        f"\n{above} of {len(scores)} cells above nominal by more than two standard errors "
        f"({0.0228 * len(scores):.0f} expected if every one was exactly at its level); "
        f"{rejected} above it by Holm's procedure over all cells at 0.05"
    )
    return "\n".join(lines), rejected


def false_edges(options: argparse.Namespace) -> int:
    """Draw and tabulate; returns the number of cells above their level for certain."""
    tallies: dict[Cell, Tally] = collections.defaultdict(Tally)
    end = time.monotonic() + 60 * options.minutes
    for draw in range(options.draws):
        for size, initialization in itertools.product(options.sizes, INITIALIZATIONS):
            for cell, error, claims in one_draw(
                initialization, size, draw, tuple(options.criteria)
            ):
                tallies[cell].add(error, claims)
        if options.output and draw % SAVE_EVERY == SAVE_EVERY - 1:
            options.output.write_text(table(tallies, full=options.full)[0] + "\n", "utf-8")
        if time.monotonic() > end:
            break
    text, rejected = table(tallies, full=options.full)
    if options.output:
        options.output.write_text(text + "\n", "utf-8")
    print(text)
    return rejected


def supported(
    weight: FloatArray, null: str, criterion: str, rng: np.random.Generator
) -> BoolArray:
    """What ``criterion`` finds at ``LEVEL``: nothing, where there is no empirical null."""
    evidence = gather_evidence(weight, null, Prior(*weight.shape))
    if evidence.source == "zero":
        return np.zeros(weight.shape, dtype=bool)
    return make_criterion(criterion, LEVEL).select(evidence, rng=rng).mask


def power_of_entries(effect: float, rng: np.random.Generator) -> list[float]:
    """Single entries moved by ``effect`` deviations: fdr, fwer, ksigma:3, empirical + fdr."""
    weight = rng.standard_normal((POWER_SIZE, POWER_SIZE), dtype=np.float32)
    touched = rng.random(weight.shape) < PLANTED
    weight[touched] += effect
    asked = [("normal:1", c) for c in ("fdr", "fwer", "ksigma:3")] + [("empirical", "fdr")]
    masks = [supported(weight, null, criterion, rng) for null, criterion in asked]
    return [float(m[touched].mean()) for m in masks]


def power_of_rows(scale: float, rng: np.random.Generator) -> list[float]:
    """Whole rows ``scale`` times as wide: group, any entry of the row by fdr."""
    weight = rng.standard_normal((POWER_SIZE, POWER_SIZE), dtype=np.float32)
    rows = np.arange(POWER_SIZE) < PLANTED_ROWS * POWER_SIZE
    weight[rows] *= np.float32(scale)
    masks = [supported(weight, "normal:1", criterion, rng) for criterion in ("group", "fdr")]
    return [float(m[rows].any(axis=1).mean()) for m in masks]


def power_through_decay(effect: float, rng: np.random.Generator) -> list[float]:
    """A tenth of the entries of 30 % of the rows moved, all decayed by 0.6.

    The null unshrunken, shrunk by what the rows show, and by what the user states.
    """
    weight = DECAYS[1] * rng.standard_normal((POWER_SIZE, POWER_SIZE))
    touched = rng.random(weight.shape) < np.where(np.arange(POWER_SIZE) < 77, 0.1, 0)[:, None]
    weight[touched] += effect
    wide = weight.astype(np.float32)
    nulls = ("normal:1,decay=1", "normal:1", f"normal:1,decay={DECAYS[1]}")
    return [float(supported(wide, null, "fdr", rng)[touched].mean()) for null in nulls]


def power_of_channels(effect: float, rng: np.random.Generator) -> list[float]:
    """2 % of the edges moved by ``effect`` in each of four gates: channel:4, any gate by fdr."""
    gates = rng.standard_normal((POWER_SIZE, 4 * POWER_SIZE), dtype=np.float32)
    edges = rng.random((POWER_SIZE, POWER_SIZE)) < PLANTED
    gates[np.tile(edges, 4)] += effect
    masks = [supported(gates, "normal:1", criterion, rng) for criterion in ("channel:4", "fdr")]
    return [float(np.asarray(stacked_channels(m, 4).any(axis=0))[edges].mean()) for m in masks]


POWER: dict[
    str, tuple[Callable[[float, np.random.Generator], list[float]], tuple[float, ...]]
] = {
    f"effect, {PLANTED:.0%} of entries | fdr | fwer | ksigma:3 | empirical + fdr": (
        power_of_entries,
        (2, 3, 4, 5, 6, 7, 8),
    ),
    "scale of touched rows, 10 % of rows | group | fdr, any entry of the row": (
        power_of_rows,
        (1.02, 1.05, 1.1, 1.15, 1.2, 1.3, 1.5, 2.0),
    ),
    "effect, decay 0.6 | unshrunken null | factor from the rows | factor stated": (
        power_through_decay,
        (1, 2, 3, 4, 5, 6),
    ),
    f"effect in each of 4 gates, {PLANTED:.0%} of edges | channel:4 | fdr, any gate": (
        power_of_channels,
        (1, 1.5, 2, 2.5, 3, 4),
    ),
}


def power(draws: int) -> None:
    """Print the share of planted effects found, per effect size in the null's deviations."""
    for heading, (measure, effects) in POWER.items():
        rng = np.random.default_rng(0)
        print(f"\n| {heading} |")
        print("|" + "---|" * (heading.count("|") + 1))
        for effect in effects:
            found = np.mean([measure(effect, rng) for _ in range(draws)], axis=0)
            print(f"| {effect} | {' | '.join(f'{x:.3f}' for x in found)} |", flush=True)


def main() -> None:
    """Run one of the two studies."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("study", choices=("false-edges", "power"))
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--minutes", type=float, default=math.inf, help="time limit")
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--criteria", nargs="+", default=list(CRITERIA))
    parser.add_argument("--full", action="store_true", help="one line per cell")
    parser.add_argument("--output", type=Path, help="where the table is kept up to date")
    options = parser.parse_args()
    if options.study == "power":
        power(options.draws)
    elif false_edges(options):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
