"""Coefficients that were measured on this machine, kept in the user's cache directory.

A cache that is missing, broken or of another machine, thread count or onnxruntime is not used; that is a line in the
log and never an error.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import logging
import math
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnx_decompose.model.model_io import check_output, writing
from onnx_decompose.planning.cost import CPU, CUDA, CostModel
from onnx_decompose.runtime.sessions import Provider

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = [
    "COEFFICIENTS",
    "Machine",
    "cache_path",
    "cost_model",
    "prepare",
    "store",
    "this_machine",
]

logger = logging.getLogger(__name__)

_BUILT_IN = {"batches", "lanes", "pick_ratio", "waking"}

COEFFICIENTS = tuple(
    field.name for field in dataclasses.fields(CostModel) if field.name not in _BUILT_IN
)
"""What is measured and kept: of a cost model all but the rows to compare at, and what holds for a kind of machine."""

_DEFAULTS = {Provider.CPU: CPU, Provider.CUDA: CUDA}
_DISTRIBUTIONS = ("onnxruntime", "onnxruntime-gpu")


@dataclasses.dataclass(frozen=True, slots=True)
class Machine:
    """What the coefficients hold for.

    Attributes:
        onnxruntime: its version.
        device: model of the processor, or of the GPU.
        threads: processors that onnxruntime may use; 0 on a GPU.
    """

    onnxruntime: str
    device: str
    threads: int


def cost_model(provider: Provider, batches: tuple[int, ...]) -> CostModel:
    """The coefficients to plan with: measured here if they were, else the built-in ones.

    Args:
        provider: where the model will run.
        batches: numbers of rows at which candidates are compared.
    """
    measured = _load(provider)
    return dataclasses.replace(measured or _DEFAULTS[provider], batches=batches)


def store(cost: CostModel, provider: Provider) -> Path:
    """Keep measured coefficients for this machine.

    Returns:
        The file.

    Raises:
        OutputError: it cannot be written.
    """
    path = prepare(provider)
    content = {
        "machine": dataclasses.asdict(this_machine(provider)),
        "cost": {name: getattr(cost, name) for name in COEFFICIENTS},
    }
    with writing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
    return path


def prepare(provider: Provider) -> Path:
    """The file that :func:`store` writes, in a folder that is there: asked before minutes are spent on measuring.

    Raises:
        OutputError: it cannot be written.
    """
    path = cache_path(provider)
    with contextlib.suppress(OSError):  # the check names what is wrong
        path.parent.mkdir(parents=True, exist_ok=True)
    check_output(path)
    return path


def cache_path(provider: Provider) -> Path:
    """``cost-cpu.json`` in ``$XDG_CACHE_HOME/onnx-decompose``, by default ``~/.cache/onnx-decompose``."""
    root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(root).expanduser() / "onnx-decompose" / f"cost-{provider}.json"


def this_machine(provider: Provider) -> Machine:
    """Where we are."""
    if provider is Provider.CUDA:
        return Machine(_onnxruntime_version(), _gpu_name(), 0)
    return Machine(_onnxruntime_version(), _processor_name(), _processors())


def _load(provider: Provider) -> CostModel | None:
    path = cache_path(provider)
    try:
        content = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        logger.debug(
            "no measured cost coefficients for %s; run onnx-decompose calibrate", provider
        )
        return None
    except (OSError, ValueError) as error:
        logger.warning("%s: cannot be read, built-in costs are used: %s", path, error)
        return None
    found = _valid(content, this_machine(provider), _DEFAULTS[provider])
    if isinstance(found, str):
        logger.info("%s: %s; built-in costs are used until the next calibrate", path, found)
        return None
    logger.info("cost coefficients measured on this machine: %s", path)
    return found


def _valid(content: Any, here: Machine, built_in: CostModel) -> CostModel | str:
    """The cost model in a cache, with what is not measured from the built-in one; or why it is not used."""
    if not isinstance(content, dict) or not isinstance(content.get("cost"), dict):
        return "is not a cost cache"
    if content.get("machine") != dataclasses.asdict(here):
        return "was measured on another machine, or with another onnxruntime or thread count"
    cost = content["cost"]
    if set(cost) != set(COEFFICIENTS):
        return "holds other coefficients than this version has"
    if not _all_positive(cost.values()):
        return "holds coefficients that are no positive numbers"
    values: dict[str, Any] = {name: float(value) for name, value in cost.items()}
    return dataclasses.replace(built_in, **values)


def _all_positive(values: Iterable[Any]) -> bool:
    return all(
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and value > 0
        and math.isfinite(value)
        for value in values
    )


def _onnxruntime_version() -> str:
    for name in _DISTRIBUTIONS:
        try:
            return f"{name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown"


def _processors() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _processor_name() -> str:
    for line in _lines(Path("/proc/cpuinfo")):
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _gpu_name() -> str:
    for folder in sorted(Path("/proc/driver/nvidia/gpus").glob("*")):
        for line in _lines(folder / "information"):
            if line.startswith("Model:"):
                return line.partition(":")[2].strip()
    return "unknown"


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text("utf-8", errors="replace").splitlines()
    except OSError:
        return []
