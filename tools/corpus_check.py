"""One model through analyze, rewrite in exact mode, validate and bench; the outcome as JSON on stdout.

    python -m tools.corpus_check MODEL.onnx [--batch 1,16]

Run in a process of its own, so that its peak memory is its own and a crash of native code ends nothing else.
"""

from __future__ import annotations

import argparse
import collections
import json
import resource
import sys
import tempfile
import traceback
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import onnx

import onnx_decompose
from onnx_decompose.errors import DecomposeError
from onnx_decompose.graph.sites import find_sites
from onnx_decompose.model.constants import Constants
from onnx_decompose.model.model_io import load_model
from tools.untouched import untouched_faults

if TYPE_CHECKING:
    from onnx_decompose.graph.sites import Site
    from onnx_decompose.model.constants import Constant
    from onnx_decompose.model.model_io import Model
    from onnx_decompose.reporting.report import Report

__all__ = ["check_file"]

_SEEDS = 2


def check_file(
    path: Path, *, batch: tuple[int, ...] = (1, 16), seeds: int = _SEEDS
) -> dict[str, Any]:
    """Everything that the table says of one model; ``error`` or ``traceback`` where a stage ended in one.

    Args:
        path: the model.
        batch: batch sizes to time at.
        seeds: random draws at each size in validate.
    """
    found: dict[str, Any] = {"seconds": {}}
    with tempfile.TemporaryDirectory() as folder:
        try:
            _stages(path, Path(folder) / path.name, found, batch, seeds)
        except DecomposeError as error:
            found["error"] = {
                "stage": _stage(found),
                "kind": type(error).__name__,
                "text": str(error),
            }
        except Exception:  # what this tool is there to find
            found["traceback"] = {"stage": _stage(found), "text": traceback.format_exc()}
    found["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return found


def _stages(
    path: Path, output: Path, found: dict[str, Any], batch: tuple[int, ...], seeds: int
) -> None:
    with _Timed(found, "analyze"):
        onnx_decompose.analyze(path)
    found["forms"] = _forms(load_model(path))
    options = onnx_decompose.Options(null="zero", batch=batch, seeds=seeds)
    with _Timed(found, "rewrite"):
        report = onnx_decompose.rewrite(path, output, options).report
    _describe(report, found)
    with _Timed(found, "compare"):
        found["same_file"] = output.read_bytes() == path.read_bytes()
        found["changed"] = untouched_faults(path, output)
        if not report.summary.decomposable and not found["same_file"]:
            found["changed"].append("nothing was rewritten, and the file is another")
    with _Timed(found, "validate"):
        validation = onnx_decompose.validate(path, output, seeds=seeds, budget=0.0)
    found["valid"], found["invalid_because"] = bool(validation), validation.failure
    if not found["same_file"]:
        with _Timed(found, "bench"):
            found["speedup"] = onnx_decompose.bench(path, output, batch=batch).speedup


def _describe(report: Report, found: dict[str, Any]) -> None:
    found["sites"] = report.summary.sites
    found["rewritten"] = report.summary.rewritten
    found["decision"] = "rewritten" if report.summary.decomposable else "unchanged"
    found["reason"] = report.summary.reason
    refused = collections.Counter((node.op_type, node.reason) for node in report.refused)
    found["refused"] = [
        {"op_type": op_type, "reason": reason, "nodes": count}
        for (op_type, reason), count in refused.most_common()
    ]


def _forms(model: Model) -> dict[str, int]:
    """How many sites hold their weight in which form."""
    constants = Constants(model)
    sites, _ = find_sites(model, constants)
    readers = collections.Counter(site.tensor for site in sites)
    initializers = {tensor.name for tensor in model.proto.graph.initializer}
    held = [site.quantized.codes.name if site.quantized else site.weight for site in sites]
    forms = collections.Counter(
        _form(site, constants[name], initializers, readers)
        for site, name in zip(sites, held, strict=True)
    )
    return dict(forms.most_common())


def _form(
    site: Site, constant: Constant, initializers: set[str], readers: dict[str, int]
) -> str:
    parts = [site.op_type]
    parts.append("initializer" if site.tensor in initializers else "Constant node")
    if site.quantized is not None:
        parts.append(onnx.TensorProto.DataType.Name(constant.data_type))
    if site.weight != site.tensor:
        parts.append("through other nodes")
    if site.transposed:
        parts.append("stored transposed")
    if readers[site.tensor] > 1:
        parts.append("shared by sites")
    if constant.tensor.external_data:
        parts.append("external data")
    return ", ".join(parts)


class _Timed:
    """Notes the seconds of a stage, and that it was begun."""

    def __init__(self, found: dict[str, Any], stage: str) -> None:
        self._found, self._stage, self._start = found, stage, 0.0

    def __enter__(self) -> None:
        self._found["seconds"][self._stage] = None
        self._start = perf_counter()

    def __exit__(self, *_: object) -> None:
        self._found["seconds"][self._stage] = perf_counter() - self._start


def _stage(found: dict[str, Any]) -> str:
    return next(reversed(found["seconds"]), "start")


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path)
    parser.add_argument("--batch", default="1,16")
    options = parser.parse_args()
    batch = tuple(int(size) for size in options.batch.split(","))
    json.dump(check_file(options.model, batch=batch), sys.stdout)


if __name__ == "__main__":
    _main()
