"""How fast models are against each other, and whether a rewrite does harm.

All models are loaded in one process and take turns: within a round each runs for a couple of
milliseconds, and every second round goes in reverse order (ABBA), so that what else happens on
the machine meets all of them alike. Where the weights come to lie in memory makes one session
on a model faster than another by a few per cent, for as long as it is open; so the models are
opened several times. Each opening gives one ratio of times per batch size, the median over its
rounds; the speed-up is the median over the openings, with the distribution-free interval of a
median (order statistics).
"""

from __future__ import annotations

import dataclasses
import gc
import logging
import math
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import special

from onnx_decompose.errors import OptionError
from onnx_decompose.runtime.feeds import Feeds, batch_dims, dim_symbols, random_feeds
from onnx_decompose.runtime.sessions import ModelSource, Provider, Session, open_session

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from onnx_decompose.model.tensors import TensorSpec
    from onnx_decompose.runtime.samples import Samples

__all__ = [
    "BatchTiming",
    "BenchSettings",
    "Timing",
    "bench_candidates",
    "bench_models",
    "is_slower",
    "slowdown",
    "timing_feeds",
]

logger = logging.getLogger(__name__)

CONFIDENCE = 0.99
OPENINGS = 8
"""The least number of values that gives a 99 % interval of their median."""

TOLERATED = 0.98
"""A batch size may lose 2 %, about what a measurement can tell."""


@dataclasses.dataclass(frozen=True, slots=True)
class BenchSettings:
    """How long to measure, per batch size and pair of models.

    Attributes:
        seconds: measure about this long, in equal parts over ``OPENINGS`` openings.
        max_seconds: go on with further openings up to here, until the interval is as narrow as
            ``precision``; also the time after which loading and warming up are not repeated.
        precision: relative half width of the interval to aim for.
        block_seconds: a model's turn within a round; a model that takes longer runs once.
        warmup: runs of each model in each opening before anything is measured; one for a model
            that takes longer than ``seconds``.
    """

    seconds: float = 1.0
    max_seconds: float = 4.0
    precision: float = 0.01
    block_seconds: float = 0.002
    warmup: int = 3

    @classmethod
    def quick(cls) -> BenchSettings:
        """For choosing between emissions, where a few per cent do not matter."""
        return cls(seconds=0.25, max_seconds=0.5, precision=0.03)


@dataclasses.dataclass(frozen=True, slots=True)
class BatchTiming:
    """One batch size.

    Attributes:
        batch: the batch size.
        original_ms: median time of one run of the original.
        rewritten_ms: the same of the rewritten model.
        speedup: median over the openings of original time / rewritten time.
        low: lower end of its 99 % interval.
        high: upper end.
        openings: ratios that the interval is made of.
    """

    batch: int
    original_ms: float
    rewritten_ms: float
    speedup: float
    low: float
    high: float
    openings: int


@dataclasses.dataclass(frozen=True, slots=True)
class Timing:
    """A rewritten model's times against the original's, over all batch sizes.

    Attributes:
        provider: where both ran.
        batches: one entry per batch size, in the order asked.
        mapped: the weights of both stayed in their files, for want of memory.
        axes: the size of every dynamic axis but the batch, by name.
    """

    provider: Provider
    batches: tuple[BatchTiming, ...]
    mapped: bool = False
    axes: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def original_ms(self) -> float:
        """Geometric mean over the batch sizes."""
        return _geometric_mean([entry.original_ms for entry in self.batches])

    @property
    def rewritten_ms(self) -> float:
        """Geometric mean over the batch sizes."""
        return _geometric_mean([entry.rewritten_ms for entry in self.batches])

    @property
    def speedup(self) -> float:
        """Geometric mean of the speed-ups: every batch size counts the same."""
        return _geometric_mean([entry.speedup for entry in self.batches])

    def to_json(self) -> dict[str, Any]:
        """The report's ``timing``."""
        return {
            "original_ms": self.original_ms,
            "rewritten_ms": self.rewritten_ms,
            "speedup": self.speedup,
            "provider": self.provider.value,
            "mapped": self.mapped,
            "axes": dict(self.axes),
            "batches": [dataclasses.asdict(entry) for entry in self.batches],
        }


def bench_models(
    original: ModelSource | Session,
    rewritten: ModelSource | Session,
    *,
    feeds_by_batch: Mapping[int, Feeds],
    provider: Provider,
    rng: np.random.Generator,
    settings: BenchSettings | None = None,
) -> Timing:
    """Time a rewritten model against its original.

    Args:
        original: bytes, a path, or an open session; sessions are closed when their models are loaded again.
        rewritten: the same.
        feeds_by_batch: the inputs to run at each batch size (see :func:`timing_feeds`).
        provider: where to run those that are not sessions yet.
        rng: draws the order of the models.
        settings: how long to measure.

    Raises:
        ModelError: a model does not load, or does not run on the inputs.
        OptionError: no batch size is given.
    """
    return bench_candidates(
        original,
        {"rewritten": rewritten},
        feeds_by_batch=feeds_by_batch,
        provider=provider,
        rng=rng,
        settings=settings,
    )["rewritten"]


def bench_candidates(
    original: ModelSource | Session,
    candidates: Mapping[str, ModelSource | Session],
    *,
    feeds_by_batch: Mapping[int, Feeds],
    provider: Provider,
    rng: np.random.Generator,
    settings: BenchSettings | None = None,
) -> dict[str, Timing]:
    """Time several rewritten models against their original, all taking turns.

    Returns:
        By candidate its timing against the original; see :func:`bench_models` for the rest.
    """
    if not feeds_by_batch:
        raise OptionError("no batch size to time at; give one or more, as in 1,16,256")
    settings = settings or BenchSettings()
    # Sessions only: their models are loaded again and again.
    sessions = [_opened(model, provider) for model in (original, *candidates.values())]
    medians = _measure_openings(sessions, feeds_by_batch, settings, rng)
    found: dict[str, Timing] = {}
    for column, name in enumerate(candidates, start=1):
        entries = [_batch_timing(batch, rows, column) for batch, rows in medians.items()]
        logger.debug("%s: %s", name, entries)
        found[name] = Timing(sessions[0].provider, tuple(entries))
    return found


def slowdown(timing: Timing) -> str | None:
    """Why a rewritten model must not replace its original; None where it may.

    It must be faster over all batch sizes together (geometric mean of the speed-ups over 1),
    and slower at none: a batch size is slower if the whole interval of its speed-up lies under
    0.98, so that neither trifles nor noise block an improvement.
    """
    for entry in timing.batches:
        if entry.high < TOLERATED:
            return (
                f"slower at batch {entry.batch}: {entry.speedup:.2f}x "
                f"(99 % interval {entry.low:.2f} to {entry.high:.2f})"
            )
    if timing.speedup <= 1.0:
        return f"not faster: {timing.speedup:.2f}x over all batch sizes"
    return None


def is_slower(timing: Timing) -> bool:
    """Whether :func:`slowdown` has a reason."""
    return slowdown(timing) is not None


def timing_feeds(
    specs: Sequence[TensorSpec],
    batches: Sequence[int],
    *,
    rng: np.random.Generator,
    other: int = 64,
    limits: Mapping[str, tuple[int, int]] | None = None,
    samples: Samples | None = None,
) -> dict[int, Feeds]:
    """Inputs to time at: one set per batch size.

    Args:
        specs: the model's inputs.
        batches: batch sizes; a model with a fixed batch gets one set, under the first of them.
        rng: draws random inputs, or which samples are used.
        other: size of every dynamic axis that is not the batch (random inputs).
        limits: integer ranges for random inputs.
        samples: the user's inputs instead of random ones, repeated where they are too few.
    """
    if samples is not None:
        sizes = batches if samples.batchable else batches[:1]
        picks = {
            size: np.resize(rng.permutation(samples.count), size if samples.batchable else 1)
            for size in sizes
        }
        return {size: next(samples.take(pick).batches(size))[0] for size, pick in picks.items()}
    batch_symbols = batch_dims(specs)
    symbols = dim_symbols(specs)
    return {
        size: random_feeds(
            specs,
            rng=rng,
            dims={symbol: size if symbol in batch_symbols else other for symbol in symbols},
            limits=limits,
        )
        for size in (batches if batch_symbols else batches[:1])
    }


def _opened(model: ModelSource | Session, provider: Provider) -> Session:
    return model if isinstance(model, Session) else open_session(model, provider)


def _measure_openings(
    sessions: Sequence[Session],
    feeds_by_batch: Mapping[int, Feeds],
    settings: BenchSettings,
    rng: np.random.Generator,
) -> dict[int, list[_Medians]]:
    """Per batch size, the medians of each opening."""
    medians: dict[int, list[_Medians]] = {batch: [] for batch in feeds_by_batch}
    pairs = len(feeds_by_batch) * max(len(sessions) - 1, 1)
    part = settings.seconds * max(len(sessions) - 1, 1) / OPENINGS
    turns: dict[int, list[_Turn]] = {}
    prepared = measured = 0.0
    done = 0
    while done < OPENINGS or not _enough(medians, measured / pairs, settings):
        start = perf_counter()
        if not turns or prepared < settings.max_seconds:
            if done:
                turns = {}  # frees the memory of the models that are loaded now
                sessions = _reopened(sessions, rng)
            turns = {
                batch: [_turn(session, feeds, settings) for session in sessions]
                for batch, feeds in feeds_by_batch.items()
            }
        prepared += perf_counter() - start
        start = perf_counter()
        for batch, models in turns.items():
            medians[batch].append(_measure(models, part, rng))
        measured += perf_counter() - start
        done += 1
    return medians


def _enough(
    medians: Mapping[int, list[_Medians]], seconds: float, settings: BenchSettings
) -> bool:
    if seconds >= settings.max_seconds:
        return True
    widest = 0.0
    for rows in medians.values():
        for ratios in zip(*(row.log_ratios for row in rows), strict=True):
            low, _, high = _median_interval(np.array(ratios))
            widest = max(widest, (high - low) / 2)
    return widest <= settings.precision


def _reopened(sessions: Sequence[Session], rng: np.random.Generator) -> list[Session]:
    """All models loaded again, in a random order: the first may get the better memory.

    The sessions are closed, so that no model is in memory twice.
    """
    fresh = list(sessions)
    for index in rng.permutation(len(sessions)):
        sessions[index].close()
        fresh[index] = sessions[index].reopen()
    return fresh


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Turn:
    """One model within a round."""

    run: Callable[[], None]
    repeats: int

    def seconds(self) -> float:
        """Time of one run."""
        start = perf_counter()
        for _ in range(self.repeats):
            self.run()
        return (perf_counter() - start) / self.repeats


@dataclasses.dataclass(frozen=True, slots=True)
class _Medians:
    """One opening at one batch size: seconds per model, log(original / candidate) times."""

    seconds: tuple[float, ...]
    log_ratios: tuple[float, ...]


def _turn(session: Session, feeds: Feeds, settings: BenchSettings) -> _Turn:
    """Warm up, and find how many runs fill a block."""
    once = _Turn(session.bind(feeds), 1)
    fastest = math.inf
    for _ in range(max(settings.warmup, 1)):
        fastest = min(fastest, once.seconds())
        if fastest > settings.seconds:
            break
    return _Turn(once.run, max(1, math.ceil(settings.block_seconds / max(fastest, 1e-7))))


def _measure(turns: Sequence[_Turn], seconds: float, rng: np.random.Generator) -> _Medians:
    """Rounds for so many seconds, at least one each way."""
    rounds: list[list[float]] = []
    order = rng.permutation(len(turns))
    collecting = gc.isenabled()
    gc.disable()
    try:
        start = perf_counter()
        while len(rounds) < 2 or perf_counter() - start < seconds:
            order = order[::-1] if len(rounds) % 2 else rng.permutation(len(turns))
            row = [0.0] * len(turns)
            for index in order:
                row[index] = turns[index].seconds()
            rounds.append(row)
    finally:
        if collecting:
            gc.enable()
    times = np.array(rounds)
    ratios = np.median(np.log(times[:, :1] / times[:, 1:]), axis=0)
    return _Medians(tuple(np.median(times, axis=0).tolist()), tuple(ratios.tolist()))


def _batch_timing(batch: int, rows: Sequence[_Medians], column: int) -> BatchTiming:
    low, middle, high = _median_interval(np.array([row.log_ratios[column - 1] for row in rows]))
    return BatchTiming(
        batch=batch,
        original_ms=float(np.median([row.seconds[0] for row in rows])) * 1e3,
        rewritten_ms=float(np.median([row.seconds[column] for row in rows])) * 1e3,
        speedup=math.exp(middle),
        low=math.exp(low),
        high=math.exp(high),
        openings=len(rows),
    )


def _median_interval(values: NDArray[np.float64]) -> tuple[float, float, float]:
    """(low, median, high): the sign test's interval, free of any distribution's shape.

    The number of values under the true median is Binomial(n, 1/2), so the k-th smallest and
    the k-th largest value hold it between them with probability 1 - 2 P(X < k).
    """
    ordered = np.sort(values)
    tail = special.bdtr(np.arange(len(ordered) // 2), len(ordered), 0.5)
    k = max(int(np.count_nonzero(tail <= (1 - CONFIDENCE) / 2)), 1)
    return float(ordered[k - 1]), float(np.median(ordered)), float(ordered[-k])


def _geometric_mean(values: Sequence[float]) -> float:
    return math.exp(math.fsum(map(math.log, values)) / len(values))
