"""Where the time of a model goes: the median time of every kernel, added up by operator.

    python -m tools.kernel_times MODEL.onnx [OTHER.onnx ...] [--batch 256] [--runs 300] [--threads 2]

By onnxruntime's own profiler, on random inputs. Medians of single kernels hardly depend on what else the machine does;
what lies between kernels is not in them.
"""

from __future__ import annotations

import argparse
import collections
import json
import tempfile
from pathlib import Path

import numpy as np
import onnxruntime

from onnx_decompose.model.model_io import load_model
from onnx_decompose.model.tensors import graph_inputs
from onnx_decompose.runtime.feeds import dim_symbols, index_limits, random_feeds


def main() -> None:
    """Print a row for each model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--batch", type=int, default=256, help="size of every dynamic axis")
    parser.add_argument("--runs", type=int, default=300)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    first = 0.0
    print("| model | all, ms | faster | by operator, ms (kernels) |\n|---|---|---|---|")
    for path in options.models:
        kernels = kernel_times(path, options.batch, options.runs, options.threads)
        times: collections.Counter[str] = collections.Counter()
        for (operator, _), time in kernels.items():
            times[operator] += time  # type: ignore[assignment]  # a Counter of floats
        counts = collections.Counter(operator for operator, _ in kernels)
        total = sum(kernels.values())
        first = first or total
        told = ", ".join(f"{op} {time:.2f} ({counts[op]})" for op, time in times.most_common())
        print(f"| {path.name} | {total:.2f} | {first / total:.1f}x | {told} |")


def kernel_times(
    path: Path, batch: int, runs: int, threads: int
) -> dict[tuple[str, str], float]:
    """Median milliseconds by (operator, kernel)."""
    proto = load_model(path).proto
    specs = graph_inputs(proto)
    dims = dict.fromkeys(dim_symbols(specs), batch)
    rng = np.random.default_rng(0)
    feeds = random_feeds(specs, rng=rng, dims=dims, limits=index_limits(proto))
    settings = onnxruntime.SessionOptions()
    settings.enable_profiling = True
    settings.intra_op_num_threads = threads
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    found: dict[tuple[str, str], list[float]] = collections.defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        settings.profile_file_prefix = str(Path(folder) / "profile")
        session = onnxruntime.InferenceSession(
            str(path), settings, providers=["CPUExecutionProvider"]
        )
        for _ in range(runs):
            session.run(None, feeds)
        for event in json.loads(Path(session.end_profiling()).read_text("utf-8")):
            if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
                found[event["args"]["op_name"], event["name"]].append(event["dur"] / 1000)
    return {key: float(np.median(times)) for key, times in found.items()}


if __name__ == "__main__":
    main()
