"""Planted networks, quantized by onnxruntime's own tools: found, proved and timed, dense against rewritten.

    python -m tools.bench_quantized [--width 1024] [--rows 1,16,256] [--only qdq] [--seconds 1]

Every network is quantized in every form, blocks in order and behind permutations, and as a control with the same
number of entries in other places. Rewritten with default options, so that do no harm applies; then once more without,
which tells what was held back. Exit code 1 if a structure was not found or a control was touched.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx

import onnx_decompose
from onnx_decompose.errors import DecomposeError
from onnx_decompose.runtime.sessions import Provider
from onnx_decompose.timing.bench import BenchSettings, bench_candidates
from tools.planted_models import Blocks, control, ffn
from tools.quantize_model import FORMS, quantize

if TYPE_CHECKING:
    from collections.abc import Sequence

    from onnx_decompose.timing.bench import Timing

BLOCKS = 8
CALIBRATION = (4, 16)
"""Sets of inputs, and rows of each, that scales of activations are taken from."""


def quantized(
    model: onnx.ModelProto, form: str, folder: Path, rng: np.random.Generator
) -> onnx.ModelProto:
    """What onnxruntime's quantizers make of ``model``.

    Args:
        model: with one input ``x`` of shape (batch, K).
        form: one of ``FORMS``: products of integers, inputs quantized as they come; pairs of quantizers around every
            operator; operators on integers. Weights have one scale per tensor, or per output (``-channel``).
        folder: for files.
        rng: draws what scales of activations are taken from.
    """
    width = model.graph.input[0].type.tensor_type.shape.dim[1].dim_value
    sets, rows = CALIBRATION
    before, after = folder / "float.onnx", folder / "quantized.onnx"
    onnx.save(model, before)
    drawn = ({"x": rng.normal(size=(rows, width)).astype(np.float32)} for _ in range(sets))
    quantize(before, after, form, drawn)
    return onnx.load(after)


def _networks(width: int, rng: np.random.Generator) -> dict[str, onnx.ModelProto]:
    sizes = (width, 4 * width, width)
    return {
        "in order": ffn(sizes, Blocks(BLOCKS, shuffle=False), np.float32, rng).model,
        "permuted": ffn(sizes, Blocks(BLOCKS), np.float32, rng).model,
        "control": control(sizes, 1 / BLOCKS, np.float32, rng).model,
    }


def _timed(
    model: onnx.ModelProto, other: onnx.ModelProto, rows: Sequence[int], seconds: float
) -> Timing:
    rng = np.random.default_rng(0)
    width = model.graph.input[0].type.tensor_type.shape.dim[1].dim_value
    feeds = {n: {"x": rng.normal(size=(n, width)).astype(np.float32)} for n in rows}
    return bench_candidates(
        model.SerializeToString(),
        {"other": other.SerializeToString()},
        feeds_by_batch=feeds,
        provider=Provider.CPU,
        rng=rng,
        settings=BenchSettings(seconds=seconds, max_seconds=2 * seconds),
    )["other"]


def _row(name: str, form: str, model: onnx.ModelProto, options: argparse.Namespace) -> bool:
    """Print one line; returns whether all is as it was planted."""
    rows = [int(size) for size in options.rows.split(",")]
    asked = onnx_decompose.Options(batch=tuple(rows))
    rewrite = onnx_decompose.rewrite(model, options=asked)
    taken = rewrite.report.summary.decomposable
    decisions = " / ".join(dict.fromkeys(site.decision for site in rewrite.report.sites))
    found = min(site.components for site in rewrite.report.sites)
    right = found == (1 if name == "control" else BLOCKS) and not (taken and name == "control")
    forced = rewrite.model
    if not taken and name != "control":
        loose = onnx_decompose.Options(batch=tuple(rows), force=True, emit="split")
        try:
            forced = onnx_decompose.rewrite(model, options=loose).model
        except DecomposeError as error:
            decisions += f" ({error})"
    cells = ["-"] * (2 * len(rows))
    if forced is not model and name != "control":
        timing = _timed(model, forced, rows, options.seconds)
        cells = [
            cell
            for entry in timing.batches
            for cell in (f"{entry.original_ms:.3f}", f"{entry.speedup:.2f}x")
        ]
    kept = "" if taken or name == "control" else ", forced for the figures"
    print(
        f"| {form} | {name} | {found} | {decisions}{kept} | {' | '.join(cells)} |", flush=True
    )
    return right


def _main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--rows", default="1,16,256")
    parser.add_argument("--only", choices=FORMS)
    parser.add_argument("--seconds", type=float, default=1.0)
    options = parser.parse_args()
    heads = [cell for n in options.rows.split(",") for cell in (f"{n}: ms", "speed-up")]
    print(f"| form | blocks | components | decision | {' | '.join(heads)} |")
    print("|---" * (4 + len(heads)) + "|")
    right = True
    for form in [options.only] if options.only else FORMS:
        rng = np.random.default_rng(0)
        for name, model in _networks(options.width, rng).items():
            with tempfile.TemporaryDirectory() as folder:
                right &= _row(name, form, quantized(model, form, Path(folder), rng), options)
    return int(not right)


if __name__ == "__main__":
    sys.exit(_main())
