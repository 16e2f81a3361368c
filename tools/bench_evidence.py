"""Speed of entrywise criteria against a plain numpy pass over the same weight.

    python tools/bench_evidence.py --size 4096 --rounds 15

The yardstick is ``np.abs(weight) > threshold``. Both sides run in turn, the medians are
compared; the goal is at least half the yardstick's speed. ``gathered`` rows include the search
for a common decay factor, which comes before every criterion under a recorded or declared null.
Peak memory is what the call allocates, its mask included, over the weight's own size.
"""

from __future__ import annotations

import argparse
import statistics
import time
import tracemalloc
from typing import TYPE_CHECKING, Any

import numpy as np

from onnx_decompose.analysis.criteria import make_criterion
from onnx_decompose.analysis.evidence import Evidence, gather_evidence
from onnx_decompose.analysis.null import Normal
from onnx_decompose.analysis.record import Prior

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
    print("| weight | criterion | GB/s | numpy abs + compare, GB/s | ratio | peak memory |")
    print("|---|---|---|---|---|---|")
    for label, weight in weights(options.size).items():
        for name in ("ksigma", "fdr", "fwer", "fdr, gathered"):
            criterion = make_criterion(name.split(",")[0], 0.01)

            def select(
                criterion: Any = criterion,
                weight: np.ndarray[Any, Any] = weight,
                gathered: bool = "gathered" in name,
            ) -> object:
                if gathered:
                    evidence = gather_evidence(weight, f"normal:{SIGMA}", Prior(*weight.shape))
                else:
                    evidence = Evidence(weight, weight, Normal(SIGMA), "declared")
                return criterion.select(evidence, rng=rng)

            def plain(weight: np.ndarray[Any, Any] = weight) -> object:
                return np.abs(weight) > weight.dtype.type(3 * SIGMA)

            ours, theirs = interleaved(select, plain, options.rounds)
            rate, plain_rate = weight.nbytes / ours / 1e9, weight.nbytes / theirs / 1e9
            memory = peak_bytes(select) / weight.nbytes
            print(
                f"| {label} | {name} | {rate:.2f} | {plain_rate:.2f} | {theirs / ours:.2f} "
                f"| {memory:.2f} |",
                flush=True,
            )
    mask = np.abs(weights(options.size)["half touched"]) > 3 * SIGMA
    packed = np.packbits(mask)
    pack, unpack = interleaved(
        lambda: np.packbits(mask), lambda: np.unpackbits(packed).view(bool), options.rounds
    )
    print(
        f"\nmask of {mask.size} entries: {mask.nbytes / 1e6:.1f} MB, packed "
        f"{packed.nbytes / 1e6:.1f} MB; packing takes {1e3 * pack:.1f} ms, unpacking "
        f"{1e3 * unpack:.1f} ms"
    )


def peak_bytes(run: Callable[[], object]) -> int:
    """Most memory that one call holds at a time."""
    tracemalloc.start()
    run()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


if __name__ == "__main__":
    main()
