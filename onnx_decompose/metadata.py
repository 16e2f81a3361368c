"""What a rewritten model says about itself: enough to rebuild every dense weight from its blocks.

Stored as model metadata: ``onnx_decompose.version`` and ``onnx_decompose.decomposition``, the latter JSON. Unit
numbers are run-length text: ``0:64,70`` are the units 0 to 63 and 70.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import operator
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from onnx_decompose.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import onnx
    from numpy.typing import NDArray

    IntArray = NDArray[np.intp]

__all__ = [
    "Annealing",
    "Block",
    "Decomposition",
    "SiteBlocks",
    "digest",
    "parse_units",
    "read_decomposition",
    "units_text",
    "write_decomposition",
]

FORMAT = 1
_ROWS_AT_A_TIME = 1024
VERSION_KEY = "onnx_decompose.version"
DECOMPOSITION_KEY = "onnx_decompose.decomposition"

Annealing = Literal["exact", "masked", "refitted"]
"""What became of a weight: only exact zeros removed; other entries removed; entries changed."""


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Block:
    """One branch's part of a dense weight.

    Attributes:
        rows: input units, ascending.
        columns: output units, ascending.
        initializer: where the rewritten model stores the block.
        transposed: the stored block is (columns, rows).
    """

    rows: IntArray
    columns: IntArray
    initializer: str
    transposed: bool


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class SiteBlocks:
    """How one site's dense weight is spread over blocks.

    Attributes:
        site: the site's name in the original model.
        shape: (K, N).
        annealing: what became of the weight.
        sha256: of the annealed dense weight's bytes, (K, N) in C order.
        blocks: the branches' parts; what no block covers is zero.
    """

    site: str
    shape: tuple[int, int]
    annealing: Annealing
    sha256: str
    blocks: tuple[Block, ...]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Decomposition:
    """All that the metadata holds.

    Attributes:
        budget: bound of claim B that the model was accepted with.
        sites: every rewritten site by name.
    """

    budget: float
    sites: Mapping[str, SiteBlocks]


def digest(weight: NDArray[Any]) -> str:
    """SHA-256 of a weight's bytes in C order; -0.0 counts as 0.0, which it equals."""
    found = hashlib.sha256()
    for start in range(0, weight.shape[0], _ROWS_AT_A_TIME):
        rows = np.ascontiguousarray(weight[start : start + _ROWS_AT_A_TIME])
        found.update((rows + np.zeros((), weight.dtype)).tobytes())
    return found.hexdigest()


def units_text(units: IntArray) -> str:
    """Ascending unit numbers as run-length text."""
    if units.size == 0:
        return ""
    breaks = np.flatnonzero(np.diff(units) != 1) + 1
    runs = np.split(units, breaks)
    return ",".join(str(run[0]) if run.size == 1 else f"{run[0]}:{run[-1] + 1}" for run in runs)


def parse_units(text: str, size: int) -> IntArray:
    """Inverse of :func:`units_text` on an axis of ``size`` units; raises ``ValueError`` on anything else."""
    runs: list[IntArray] = []
    least = 0
    for part in text.split(",") if text else ():
        first, colon, last = part.partition(":")
        start = int(first)
        stop = int(last) if colon else start + 1
        if not least <= start < stop <= size:
            raise ValueError(f"not ascending unit numbers under {size}: {text[:40]}")
        runs.append(np.arange(start, stop, dtype=np.intp))
        least = stop
    return np.concatenate(runs) if runs else np.empty(0, np.intp)


def write_decomposition(
    proto: onnx.ModelProto, decomposition: Decomposition, version: str
) -> None:
    """Put ``decomposition`` into the metadata of ``proto``, in place of what was there."""
    sites = {
        site.site: {
            "shape": list(site.shape),
            "annealing": site.annealing,
            "sha256": site.sha256,
            "blocks": [
                {
                    "rows": units_text(block.rows),
                    "columns": units_text(block.columns),
                    "initializer": block.initializer,
                    "transposed": block.transposed,
                }
                for block in site.blocks
            ],
        }
        for site in decomposition.sites.values()
    }
    content = {"format": FORMAT, "budget": decomposition.budget, "sites": sites}
    for key, value in ((VERSION_KEY, version), (DECOMPOSITION_KEY, json.dumps(content))):
        _set(proto, key, value)


def read_decomposition(proto: onnx.ModelProto, label: str) -> Decomposition | None:
    """The decomposition that ``proto`` carries; None if it carries none.

    Raises:
        ModelError: the metadata is there but broken, or of a newer format.
    """
    text = next((p.value for p in proto.metadata_props if p.key == DECOMPOSITION_KEY), None)
    if text is None:
        return None
    try:
        content = json.loads(text)
        if content["format"] > FORMAT:
            raise ModelError(
                f"{label}: was rewritten by a newer onnx-decompose; update this one to validate it"
            )
        sites = {name: _site_blocks(name, fields) for name, fields in content["sites"].items()}
        return Decomposition(float(content["budget"]), sites)
    except (ValueError, TypeError, KeyError, AttributeError, MemoryError) as error:
        raise ModelError(
            f"{label}: the metadata '{DECOMPOSITION_KEY}' is broken ({error!r}); rewrite the model again"
        ) from error


def _site_blocks(name: str, fields: Mapping[str, Any]) -> SiteBlocks:
    inputs, outputs = (operator.index(size) for size in fields["shape"])
    if fields["annealing"] not in get_args(Annealing):
        raise ValueError(f"site '{name}': annealing {fields['annealing']!r}")
    blocks = tuple(
        Block(
            parse_units(block["rows"], inputs),
            parse_units(block["columns"], outputs),
            str(block["initializer"]),
            bool(block["transposed"]),
        )
        for block in fields["blocks"]
    )
    return SiteBlocks(
        name, (inputs, outputs), fields["annealing"], str(fields["sha256"]), blocks
    )


def _set(proto: onnx.ModelProto, key: str, value: str) -> None:
    for entry in proto.metadata_props:
        if entry.key == key:
            entry.value = value
            return
    proto.metadata_props.add(key=key, value=value)
