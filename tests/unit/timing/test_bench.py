"""The clock is a fake: models are functions that advance it, with noise that is known."""

from __future__ import annotations

import functools
import itertools
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx.parser
import pytest
from scipy import stats

from onnx_decompose.errors import DataError, ModelError, OptionError
from onnx_decompose.model.tensors import TensorSpec
from onnx_decompose.runtime.samples import samples_from_arrays
from onnx_decompose.runtime.sessions import Provider, Session, open_session
from onnx_decompose.timing import bench
from onnx_decompose.timing.bench import (
    OPENINGS,
    BatchTiming,
    BenchSettings,
    Timing,
    _measure,
    _median_interval,
    _Turn,
    bench_candidates,
    bench_models,
    is_slower,
    slowdown,
    timing_feeds,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

FLOAT = np.dtype(np.float32)


def reopen_nothing() -> Session:
    raise AssertionError


class Clock:
    """Time that passes only when a fake model runs."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []
        self.opened: list[str] = []

    def __call__(self) -> float:
        return self.now

    def model(self, name: str, seconds: Callable[[Clock], float]) -> Session:
        """A session whose every run takes ``seconds``."""
        clock = self

        class FakeSession(Session):
            def bind(self, feeds: Mapping[str, Any]) -> Callable[[], None]:
                del feeds

                def run() -> None:
                    clock.log.append(name)
                    clock.now += seconds(clock)

                return run

            def reopen(self) -> Session:
                clock.opened.append(name)
                return self

        return FakeSession((), (), Provider.CPU, name, None, functools.partial(reopen_nothing))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    # The package's attribute of this name is the function, so the module is asked for by name.
    monkeypatch.setattr(bench, "perf_counter", clock)
    return clock


def bench_turn(session: Session) -> _Turn:
    return _Turn(session.bind({}), 1)


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def bench_fakes(
    original: Session, rewritten: Session, settings: BenchSettings | None = None
) -> BatchTiming:
    timing = bench_models(
        original,
        rewritten,
        feeds_by_batch={8: {}},
        provider=Provider.CPU,
        rng=rng(),
        settings=settings,
    )
    return timing.batches[0]


class TestMeasuring:
    def test_times_and_speedup(self, clock: Clock) -> None:
        entry = bench_fakes(
            clock.model("original", lambda _: 0.003), clock.model("rewritten", lambda _: 0.002)
        )
        assert entry.batch == 8
        assert entry.original_ms == pytest.approx(3.0)
        assert entry.rewritten_ms == pytest.approx(2.0)
        assert (entry.low, entry.speedup, entry.high) == pytest.approx((1.5, 1.5, 1.5))

    def test_short_runs_fill_a_block(self, clock: Clock) -> None:
        bench_fakes(clock.model("o", lambda _: 1e-5), clock.model("r", lambda _: 1e-3))
        turns = [(name, len(list(group))) for name, group in itertools.groupby(clock.log[6:])]
        # Two turns of one model meet where the order is reversed; warm-up adds a few runs.
        assert {round(length / 200) for name, length in turns if name == "o"} <= {0, 1, 2}
        assert {length for name, length in turns if name == "r"} <= {2, 3, 4, 5, 7}

    def test_models_take_turns_in_both_orders(self, clock: Clock) -> None:
        turns = [bench_turn(clock.model(name, lambda _: 0.004)) for name in "or"]
        _measure(turns, 0.4, rng())
        rounds = [a + b for a, b in zip(clock.log[::2], clock.log[1::2], strict=True)]
        assert set(rounds) == {"or", "ro"}
        assert rounds[::2] == [one[::-1] for one in rounds[1::2]]

    def test_a_machine_that_slows_down_meets_both_alike(self, clock: Clock) -> None:
        def drifting(seconds: float) -> Callable[[Clock], float]:
            return lambda clock: seconds * (1 + clock.now / 5)

        entry = bench_fakes(clock.model("o", drifting(0.011)), clock.model("r", drifting(0.01)))
        assert entry.speedup == pytest.approx(1.1, abs=0.005)
        assert entry.original_ms > 12  # one after the other would have been 10 % off

    def test_bursts_of_other_work_do_not_move_the_median(self, clock: Clock) -> None:
        noise = np.random.default_rng(1)

        def disturbed(seconds: float) -> Callable[[Clock], float]:
            return lambda _: seconds * (1 + 9 * (noise.random() < 0.15))

        entry = bench_fakes(
            clock.model("o", disturbed(0.0025)), clock.model("r", disturbed(0.002))
        )
        assert entry.speedup == pytest.approx(1.25)

    def test_the_luck_of_an_opening_is_part_of_the_interval(self, clock: Clock) -> None:
        luck = np.random.default_rng(1).lognormal(0, 0.05, 100)

        def lucky(clock: Clock) -> float:
            return float(0.004 * luck[len(clock.opened)])

        entry = bench_fakes(clock.model("o", lambda _: 0.004), clock.model("r", lucky))
        assert entry.low < 1 < entry.high
        assert entry.high / entry.low > 1.02
        assert entry.openings > OPENINGS
        assert clock.opened.count("o") == clock.opened.count("r") == entry.openings - 1

    def test_stops_once_the_interval_is_narrow(self, clock: Clock) -> None:
        settings = BenchSettings(seconds=0.8, max_seconds=60.0)
        entry = bench_fakes(
            clock.model("o", lambda _: 0.002), clock.model("r", lambda _: 0.002), settings
        )
        assert entry.openings == OPENINGS
        assert 0.8 < clock.now < 1.1

    def test_noise_is_measured_longer_up_to_the_limit(self, clock: Clock) -> None:
        noise = np.random.default_rng(1)

        def noisy(_: Clock) -> float:
            return float(0.01 * noise.lognormal(0, 1))

        settings = BenchSettings(seconds=0.5, max_seconds=5.0)
        bench_fakes(clock.model("o", noisy), clock.model("r", noisy), settings)
        assert 5.0 < clock.now < 10.1  # as much again, at most, for warming up

    def test_slow_models_are_neither_reopened_nor_repeated_more_than_needed(
        self, clock: Clock
    ) -> None:
        entry = bench_fakes(clock.model("o", lambda _: 60.0), clock.model("r", lambda _: 30.0))
        assert entry.speedup == pytest.approx(2.0)
        assert clock.opened == []
        assert clock.log.count("o") == 1 + 2 * OPENINGS

    def test_candidates_are_timed_against_one_original(self, clock: Clock) -> None:
        found = bench_candidates(
            clock.model("o", lambda _: 0.006),
            {
                "split": clock.model("s", lambda _: 0.003),
                "grouped": clock.model("g", lambda _: 0.002),
            },
            feeds_by_batch={1: {}, 16: {}},
            provider=Provider.CPU,
            rng=rng(),
        )
        assert list(found) == ["split", "grouped"]
        assert found["split"].speedup == pytest.approx(2.0)
        assert found["grouped"].speedup == pytest.approx(3.0)
        assert [entry.batch for entry in found["split"].batches] == [1, 16]

    def test_no_batch_size(self, clock: Clock) -> None:
        model = clock.model("o", lambda _: 1.0)
        with pytest.raises(OptionError, match="no batch size"):
            bench_models(model, model, feeds_by_batch={}, provider=Provider.CPU, rng=rng())


@pytest.mark.parametrize("count", [8, 9, 25, 200])
def test_the_interval_of_the_median_is_the_sign_tests(count: int) -> None:
    values = np.random.default_rng(count).standard_normal(count)
    low, middle, high = _median_interval(values)
    assert low <= middle == np.median(values) <= high
    below, at_or_below = int((values < low).sum()), int((values <= low).sum())
    # The lower end is the innermost value that the test at 1 % still rejects as too low.
    assert stats.binomtest(below, count).pvalue <= 0.01
    assert stats.binomtest(at_or_below, count).pvalue > 0.01
    assert int((values > high).sum()) == below


def test_the_interval_covers_the_median_as_often_as_it_says() -> None:
    draws = np.random.default_rng(0).lognormal(0, 1, (2000, 40)) - 1.0
    intervals = [_median_interval(row) for row in draws]
    covered = sum(low <= 0 <= high for low, _, high in intervals) / len(intervals)
    assert 0.985 <= covered <= 0.999


def timing(*entries: tuple[float, float, float]) -> Timing:
    batches = tuple(
        BatchTiming(2**i, speedup, 1.0, speedup, low, high, 8)
        for i, (low, speedup, high) in enumerate(entries)
    )
    return Timing(Provider.CPU, batches)


class TestDoNoHarm:
    def test_faster_everywhere(self) -> None:
        assert slowdown(timing((1.2, 1.3, 1.4), (2.0, 2.1, 2.2))) is None

    def test_slower_at_one_batch_size_blocks_whatever_the_rest_gains(self) -> None:
        told = slowdown(timing((2.9, 3.0, 3.1), (0.93, 0.95, 0.97)))
        assert told == "slower at batch 2: 0.95x (99 % interval 0.93 to 0.97)"

    def test_noise_at_one_batch_size_does_not_block(self) -> None:
        assert slowdown(timing((1.9, 2.0, 2.1), (0.80, 0.96, 1.10))) is None

    def test_a_trifle_at_one_batch_size_does_not_block(self) -> None:
        assert slowdown(timing((1.9, 2.0, 2.1), (0.975, 0.98, 0.985))) is None

    def test_not_faster_overall(self) -> None:
        assert is_slower(timing((0.98, 1.0, 1.02)))
        told = slowdown(timing((0.98, 1.01, 1.04), (0.9, 0.985, 1.05)))
        assert told == "not faster: 1.00x over all batch sizes"

    def test_overall_is_the_geometric_mean(self) -> None:
        both = timing((4.0, 4.0, 4.0), (1.0, 1.0, 1.0))
        assert both.speedup == pytest.approx(2.0)
        assert both.original_ms / both.rewritten_ms == pytest.approx(2.0)


def test_json_has_the_reports_keys() -> None:
    content = timing((1.9, 2.0, 2.1)).to_json()
    assert {key: content[key] for key in ("provider", "speedup", "original_ms")} == {
        "provider": "cpu",
        "speedup": pytest.approx(2.0),
        "original_ms": pytest.approx(2.0),
    }
    assert content["rewritten_ms"] == pytest.approx(1.0)
    assert content["batches"][0]["batch"] == 1
    assert content["batches"][0]["low"] == 1.9


class TestTimingFeeds:
    X = TensorSpec("x", FLOAT, ("N", "T"))

    def test_random(self) -> None:
        feeds = timing_feeds([self.X], (1, 16), rng=rng(), other=7)
        assert {batch: one["x"].shape for batch, one in feeds.items()} == {
            1: (1, 7),
            16: (16, 7),
        }

    def test_a_fixed_batch_is_timed_once(self) -> None:
        fixed = TensorSpec("x", FLOAT, (4, 3))
        assert list(timing_feeds([fixed], (1, 16), rng=rng())) == [1]

    def test_samples_are_repeated_where_too_few(self) -> None:
        samples = samples_from_arrays({"x": np.arange(6.0).reshape(3, 2)}, [self.X])
        feeds = timing_feeds([self.X], (2, 8), rng=rng(), samples=samples)
        assert feeds[2]["x"].shape == (2, 2)
        assert feeds[8]["x"].shape == (8, 2)
        assert set(feeds[8]["x"][:, 0]) == {0.0, 2.0, 4.0}

    def test_samples_of_a_fixed_batch(self) -> None:
        fixed = TensorSpec("x", FLOAT, (1, 2))
        samples = samples_from_arrays({"x": np.ones((3, 2))}, [fixed])
        feeds = timing_feeds([fixed], (1, 16), rng=rng(), samples=samples)
        assert {batch: one["x"].shape for batch, one in feeds.items()} == {1: (1, 2)}


class TestRealModels:
    QUICK = BenchSettings(seconds=0.05, max_seconds=0.05)

    def product(self, count: int) -> bytes:
        steps = " ".join(f"t{i + 1} = MatMul(t{i}, w)" for i in range(count))
        text = (
            '<ir_version: 8, opset_import: ["": 18]> g (float[N, 128] x, float[128, 128] w)'
            f" => (float[N, 128] y) {{ t0 = Identity(x) {steps} y = Identity(t{count}) }}"
        )
        return bytes(onnx.parser.parse_model(text).SerializeToString())

    def feeds(self, batch: int) -> dict[str, Any]:
        return {
            "x": np.ones((batch, 128), np.float32),
            "w": np.eye(128, dtype=np.float32),
        }

    def test_twenty_times_the_work_is_slower(self) -> None:
        found = bench_models(
            self.product(20),
            self.product(1),
            feeds_by_batch={64: self.feeds(64)},
            provider=Provider.CPU,
            rng=rng(),
            settings=self.QUICK,
        )
        assert found.speedup > 2
        assert not is_slower(found)
        assert found.provider is Provider.CPU

    def test_open_sessions_and_refused_inputs(self) -> None:
        session = open_session(self.product(1), Provider.CPU, label="m.onnx")
        for feeds, error in (
            ({}, DataError),
            ({**self.feeds(1), "x": np.ones((1, 3), np.float32)}, ModelError),
        ):
            with pytest.raises(error, match=r"^m\.onnx: "):
                bench_models(
                    session,
                    session,
                    feeds_by_batch={1: feeds},
                    provider=Provider.CPU,
                    rng=rng(),
                )
