"""Speed of entrywise criteria against a plain numpy pass over the same weight.

    python tools/bench_evidence.py --size 4096 --rounds 15

The yardstick is ``np.abs(weight) > threshold``. Both sides run in turn, the medians are
compared; the goal is at least half the yardstick's speed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from onnx_decompose.analysis.criteria import make_criterion
from onnx_decompose.analysis.evidence import Evidence
from onnx_decompose.analysis.null import Normal

if TYPE_CHECKING:
    from collections.abc import Callable

SIGMA = 0.02


def weights(size: int) -> dict[str, np.ndarray[Any, Any]]:
    """Untouched, half touched and nearly all touched, (size, size)."""
    rng = np.random.default_rng(0)
    untouched = rng.standard_normal((size, size), dtype=np.float32) * np.float32(SIGMA)
    half = untouched.copy()
    half[: size // 2] *= 4
    return {
        "untouched": untouched,
        "half touched": half,
        "all touched": untouched * 5,
        "float16, half touched": half.astype(np.float16),
    }


def interleaved(
    first: Callable[[], object], second: Callable[[], object], rounds: int
) -> tuple[float, float]:
    """Median seconds of each, run in turn."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for kept, run in zip(times, (first, second), strict=True):
            start = time.perf_counter()
            run()
            kept.append(time.perf_counter() - start)
    return statistics.median(times[0]), statistics.median(times[1])


def main() -> None:
    """Print one row per weight and criterion."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    print("| weight | criterion | GB/s | numpy abs + compare, GB/s | ratio |")
    print("|---|---|---|---|---|")
    for label, weight in weights(options.size).items():
        evidence = Evidence(weight, weight, Normal(SIGMA), "declared")
        for name in ("ksigma", "fdr", "fwer"):
            criterion = make_criterion(name, 0.01)

            def select(criterion: Any = criterion, evidence: Evidence = evidence) -> object:
                return criterion.select(evidence, rng=rng)

            def plain(weight: np.ndarray[Any, Any] = weight) -> object:
                return np.abs(weight) > weight.dtype.type(3 * SIGMA)

            ours, theirs = interleaved(select, plain, options.rounds)
            rate, plain_rate = weight.nbytes / ours / 1e9, weight.nbytes / theirs / 1e9
            print(
                f"| {label} | {name} | {rate:.2f} | {plain_rate:.2f} | {theirs / ours:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
