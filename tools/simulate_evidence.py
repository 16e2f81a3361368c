"""Measured error rates and power of the evidence, by simulation.

    python tools/simulate_evidence.py false-edges --draws 1000 --sizes 64 256 1024
    python tools/simulate_evidence.py power --draws 200

``false-edges`` draws weights that nobody trained (and weights with planted effects), and counts
what is supported all the same. A cell fails when it exceeds the nominal level by more than two
standard errors. ``power`` shows the share of planted effects that each criterion finds.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import itertools
import math
from typing import TYPE_CHECKING, Any

import numpy as np

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
KSIGMA_LEVEL = 0.01
DTYPES = ("float32", "float16")
DECAYS = (1.0, 0.6)


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

# null as the command line names it -> initialization it is true for
NULLS = {
    f"normal:{SIGMA}": "normal",
    f"uniform:{math.sqrt(3) * SIGMA!r}": "uniform",
    f"trunc_normal:{SIGMA}": "trunc_normal",
    "recorded (normal)": "normal",
    "recorded (uniform)": "uniform",
    "recorded (other)": "logistic",
    "empirical": "normal",
    "snapshot": "normal",
    "optimizer": "normal",
}
CRITERIA = ("fdr", "fwer", "ksigma", "displacement", "group")
EXACT = ("snapshot", "optimizer")


@dataclasses.dataclass(frozen=True, slots=True)
class Setting:
    """What is drawn."""

    null: str
    size: int
    dtype: str
    decay: float
    planted: str


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


def touch(
    initial: FloatArray, setting: Setting, rng: np.random.Generator
) -> tuple[FloatArray, BoolArray]:
    """The weight after training, and which entries were touched."""
    touched = np.zeros(initial.shape, dtype=bool)
    if setting.planted == "rows":
        touched[rng.random(initial.shape[0]) < PLANTED_ROWS] = True
    elif setting.planted == "entries":
        touched = rng.random(initial.shape) < PLANTED
    weight = initial * np.float32(setting.decay)
    effects = rng.choice([-EFFECT, EFFECT], np.count_nonzero(touched)) * SIGMA
    weight[touched] += effects.astype(np.float32)
    return weight.astype(setting.dtype), touched


def evidence_of(
    setting: Setting, weight: FloatArray, initial: FloatArray, touched: BoolArray
) -> Evidence:
    """As the pipeline would gather it."""
    prior = Prior(*weight.shape)
    spec = setting.null.split(" ")[0]
    if spec == "recorded":
        record = record_of(initial, setting.null.split("(")[1].rstrip(")"))
        prior = dataclasses.replace(prior, record=record)
    elif spec == "snapshot":
        prior = dataclasses.replace(prior, snapshot=initial)
    elif spec == "optimizer":
        moment = np.where(touched, np.float32(1e-6), np.float32(0))
        prior = dataclasses.replace(prior, second_moment=moment)
    return gather_evidence(weight, spec, prior)


def one_draw(setting: Setting, criteria: tuple[str, ...], seed: int) -> list[float]:
    """Each criterion's false discovery proportion, or its own kind of error rate."""
    rng = np.random.default_rng(seed)
    initial = INITIALIZATIONS[NULLS[setting.null]](rng, setting.size)
    weight, touched = touch(initial, setting, rng)
    evidence = evidence_of(setting, weight, initial, touched)
    errors = []
    for name in criteria:
        level = KSIGMA_LEVEL if name == "ksigma" else LEVEL
        mask = make_criterion(name, level).select(evidence, rng=rng).mask
        if name == "group":  # rows are judged: every column holds some touched entry
            mask, truth = np.asarray(mask.any(axis=1)), np.asarray(touched.any(axis=1))
        else:
            truth = touched
        false = int(np.count_nonzero(mask & ~truth))
        if name == "ksigma":
            errors.append(false / int(np.count_nonzero(~truth)))
        elif name == "fwer":
            errors.append(float(false > 0))
        else:
            errors.append(false / max(int(np.count_nonzero(mask)), 1))
    return errors


def nominal_of(setting: Setting, criterion: str) -> float:
    """The level; for ``ksigma``, which guarantees none, the family's own tail beyond k."""
    if criterion != "ksigma":
        return LEVEL
    k = 2.5758293
    family = NULLS[setting.null]
    beyond = {
        "normal": KSIGMA_LEVEL,
        "logistic": 2 / (1 + math.exp(k * math.pi / math.sqrt(3))),
    }
    return 0.0 if setting.null in EXACT else beyond.get(family, 0.0)


def settings(sizes: list[int], nulls: list[str]) -> Iterator[Setting]:
    """Every combination that is drawn; whole rows are planted apart, for ``group``."""
    for null, size, dtype, decay, planted in itertools.product(
        nulls, sizes, DTYPES, DECAYS, ("nothing", "entries", "rows")
    ):
        yield Setting(null, size, dtype, decay, planted)


def measure(
    setting: Setting, chosen: tuple[str, ...], draws: int
) -> list[tuple[str, float, float]]:
    """Criterion, mean and standard error over ``draws``."""
    group = ("group",) if setting.planted != "entries" else ()
    others = ("fdr", "fwer", "ksigma") if setting.planted != "rows" else ()
    moved = ("displacement",) if setting.null == "snapshot" else ()
    criteria = tuple(c for c in (*others, *moved, *group) if c in chosen)
    if not criteria:
        return []
    key = [ord(c) for c in f"{setting}"]
    seeds = np.random.SeedSequence(key).generate_state(draws, np.uint64)
    values = np.array([one_draw(setting, criteria, int(seed)) for seed in seeds])
    errors = values.std(axis=0, ddof=1) / math.sqrt(draws)
    return list(zip(criteria, values.mean(axis=0).tolist(), errors.tolist(), strict=True))


def false_edges(options: argparse.Namespace) -> int:
    """Print the table; returns the number of cells above their nominal level."""
    print("| null | criterion | size | dtype | decay | planted | nominal | measured | s.e. | |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    above = total = 0
    nulls = [null for null in NULLS if any(null.startswith(n) for n in options.nulls)]
    asked = list(settings(options.sizes, nulls))
    with concurrent.futures.ProcessPoolExecutor(options.jobs) as pool:
        chosen = itertools.repeat(tuple(options.criteria))
        results = pool.map(measure, asked, chosen, itertools.repeat(options.draws))
        for s, rows in zip(asked, results, strict=True):
            for criterion, mean, error in rows:
                nominal = nominal_of(s, criterion)
                fails = mean > nominal + 2 * error
                above, total = above + fails, total + 1
                print(
                    f"| {s.null} | {criterion} | {s.size} | {s.dtype} | {s.decay} | {s.planted} | "
                    f"{nominal:.4g} | {mean:.4f} | {error:.4f} | {'ABOVE' if fails else 'ok'} |",
                    flush=True,
                )
    print(f"\n{above} of {total} cells above nominal by more than two standard errors")
    return above


def power(draws: int, size: int = 256) -> None:
    """Print the share of planted effects found, per effect size."""
    rng = np.random.default_rng(0)
    names = ("fdr", "fwer", "ksigma:3")
    print(f"| effect (sigma), {PLANTED:.0%} of entries | {' | '.join(names)} |")
    print("|---|---|---|---|")
    for effect in (2, 3, 4, 5, 6, 7, 8):
        found = np.zeros(len(names))
        for _ in range(draws):
            weight = rng.standard_normal((size, size), dtype=np.float32)
            touched = rng.random(weight.shape) < PLANTED
            weight[touched] += effect
            evidence = gather_evidence(weight, "normal:1", Prior(size, size))
            for i, name in enumerate(names):
                mask = make_criterion(name, LEVEL).select(evidence, rng=rng).mask
                found[i] += mask[touched].mean()
        print(f"| {effect} | {' | '.join(f'{x:.3f}' for x in found / draws)} |", flush=True)
    print(
        "\n| scale of touched rows, 10 % of rows | group | entrywise fdr, any entry of the row |"
    )
    print("|---|---|---|")
    for scale in (1.02, 1.05, 1.1, 1.15, 1.2, 1.3, 1.5, 2.0):
        found = np.zeros(2)
        for _ in range(draws):
            weight = rng.standard_normal((size, size), dtype=np.float32)
            rows = rng.random(size) < 0.1
            weight[rows] *= np.float32(scale)
            evidence = gather_evidence(weight, "normal:1", Prior(size, size))
            for i, name in enumerate(("group", "fdr")):
                mask = make_criterion(name, LEVEL).select(evidence, rng=rng).mask
                found[i] += mask[rows].any(axis=1).mean() if rows.any() else 0
        print(f"| {scale} | {' | '.join(f'{x:.3f}' for x in found / draws)} |", flush=True)


def main() -> None:
    """Run one of the two studies."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("study", choices=("false-edges", "power"))
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--nulls", nargs="+", default=[""], help="beginnings of null names")
    parser.add_argument("--criteria", nargs="+", default=list(CRITERIA))
    parser.add_argument("--jobs", type=int, default=1)
    options = parser.parse_args()
    if options.study == "power":
        power(options.draws)
    elif false_edges(options):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
