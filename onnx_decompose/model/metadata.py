"""What a rewritten model says about itself: enough to rebuild every dense weight from its blocks.

Stored as model metadata: ``onnx_decompose.version`` and ``onnx_decompose.decomposition``, the latter JSON. Unit
numbers are run-length text: ``0:64,70`` are the units 0 to 63 and 70, in that order.
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
    "Reordered",
    "FoldedBias",
    "SiteBlocks",
    "SlicedConstant",
    "carry_the_same",
    "digest",
    "parse_units",
    "read_decomposition",
    "rewritten_before",
    "units_text",
    "write_decomposition",
]

FORMAT = 1
_ROWS_AT_A_TIME = 1024
_BROKEN = (
    *(ValueError, TypeError, KeyError, AttributeError),
    *(MemoryError, OverflowError, RecursionError),
)
"""What reading metadata that someone else wrote, or cut short, may raise."""

VERSION_KEY = "onnx_decompose.version"
DECOMPOSITION_KEY = "onnx_decompose.decomposition"

Annealing = Literal["exact", "masked", "refitted"]
"""What became of a weight: only exact zeros removed; other entries removed or folded; entries changed.

Scales that are absorbed change every entry in a way of its own, which the original tells: see ``SiteBlocks.absorbed``.
"""


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Block:
    """A part of a dense weight, and where the rewritten model stores it.

    Attributes:
        rows: input units of the part, each once.
        columns: output units of the part, each once.
        initializer: the tensor that stores it: a matrix, a stack of matrices, or a convolution's weight, which is a
            matrix with the outputs first.
        transposed: each stored matrix is (columns, rows).
        part: which matrix of a stack; None where the tensor is one matrix.
        stored_rows: row of the stored matrix, seen as (rows, columns), that holds each of ``rows``; None for all of
            them in order. A row may stand for several units.
        stored_columns: the same for the columns.
    """

    rows: IntArray
    columns: IntArray
    initializer: str
    transposed: bool
    part: int | None = None
    stored_rows: IntArray | None = None
    stored_columns: IntArray | None = None

    def view(self, stored: NDArray[Any]) -> NDArray[Any]:
        """The matrix of ``stored`` that holds this part, as (rows, columns).

        Raises:
            ValueError: ``stored`` has another number of axes, or the part does not lie inside it.
        """
        if self.part is None and self.transposed and stored.ndim > 2:
            stored = stored.reshape(stored.shape[0], -1)
        # A stack has axes of size 1 where its matrices are broadcast to the axes of a batch.
        while self.part is not None and stored.ndim > 3 and stored.shape[1] == 1:
            stored = stored[:, 0]
        if stored.ndim != (2 if self.part is None else 3):
            raise ValueError(f"'{self.initializer}' has {stored.ndim} axes")
        if self.part is not None and not self.part < stored.shape[0]:
            raise ValueError(f"'{self.initializer}' has no part {self.part}")
        matrix = stored if self.part is None else stored[self.part]
        matrix = matrix.T if self.transposed else matrix
        for size, units, place in zip(
            matrix.shape,
            (self.rows, self.columns),
            (self.stored_rows, self.stored_columns),
            strict=True,
        ):
            if (units.size != size) if place is None else (place.max(initial=-1) >= size):
                raise ValueError(f"'{self.initializer}' has another shape")
        return matrix

    @property
    def places(self) -> tuple[IntArray, IntArray]:
        """Rows and columns of :meth:`view` that hold ``rows`` and ``columns``."""
        rows = np.arange(self.rows.size) if self.stored_rows is None else self.stored_rows
        columns = (
            np.arange(self.columns.size) if self.stored_columns is None else self.stored_columns
        )
        return rows, columns

    def read(self, stored: NDArray[Any]) -> NDArray[Any]:
        """The part itself, (rows, columns), out of the stored tensor; raises as :meth:`view`."""
        return self.view(stored)[np.ix_(*self.places)]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class FoldedBias:
    """A site's annealed bias, where it is not the original's, and where the rewritten model stores it.

    Attributes:
        sha256: of the annealed bias's bytes, (N,).
        blocks: the branches' parts, each of one row; what no block covers is the original's bias.
    """

    sha256: str
    blocks: tuple[Block, ...]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class SiteBlocks:
    """How one site's dense weight is spread over blocks.

    Attributes:
        site: the site's name in the original model.
        shape: (K, N).
        annealing: what became of the weight.
        sha256: of the annealed dense weight's bytes, (K, N) in C order.
        blocks: the branches' parts; what no block covers is zero.
        bias: its bias, where that is another one: constant units were folded into it, or what followed it was absorbed.
        absorbed: how many nodes after the site (``biases.absorbable``) are in its weight and bias now; None where the
            weight keeps its scale.
        slope: the slope of the gate after all that (``gates.find_gates``) is in its weight and bias too, and its
            inverse in the rows of every site that reads the gate.
    """

    site: str
    shape: tuple[int, int]
    annealing: Annealing
    sha256: str
    blocks: tuple[Block, ...]
    bias: FoldedBias | None = None
    absorbed: int | None = None
    slope: bool = False


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Reordered:
    """A constant that is stored with its units in another order.

    Attributes:
        source: the value in the original model.
        axes: negative axis -> old number of the unit at each place.
    """

    source: str
    axes: Mapping[int, IntArray]

    def apply(self, values: NDArray[Any]) -> NDArray[Any]:
        """The constant as it is stored.

        Raises:
            ValueError: an axis is not there, or of another size.
        """
        for axis, order in self.axes.items():
            if not -values.ndim <= axis < 0 or values.shape[axis] != order.size:
                raise ValueError(f"'{self.source}' has no axis {axis} of size {order.size}")
            values = np.take(values, order, axis=axis)
        return values


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class SlicedConstant:
    """A per-unit constant that rewritten operators read in parts: a bias, a scale.

    Attributes:
        shape: (M, N): all axes but that of the units taken together, and the units; N also where there is one number
            for all units, and it is stored for each.
        blocks: the parts; several may hold the same entries, for operators that read the same constant.
        axis: of the constant that has the units, counted from the last.
    """

    shape: tuple[int, int]
    blocks: tuple[Block, ...]
    axis: int = -1


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Decomposition:
    """All that the metadata holds.

    Attributes:
        budget: bound of claim B that the model was accepted with.
        sites: every site by name whose weight is stored otherwise than in the original.
        reordered: initializer name -> the constant whose units it holds in another order.
        constants: name in the original -> where the rewritten model stores its parts.
        budgets: bounds of claim B by output name, where they are not ``budget``.
    """

    budget: float
    sites: Mapping[str, SiteBlocks]
    reordered: Mapping[str, Reordered] = dataclasses.field(default_factory=dict)
    constants: Mapping[str, SlicedConstant] = dataclasses.field(default_factory=dict)
    budgets: Mapping[str, float] = dataclasses.field(default_factory=dict)


def digest(weight: NDArray[Any]) -> str:
    """SHA-256 of a weight's bytes in C order; -0.0 counts as 0.0, which it equals."""
    found = hashlib.sha256()
    for start in range(0, weight.shape[0], _ROWS_AT_A_TIME):
        rows = np.ascontiguousarray(weight[start : start + _ROWS_AT_A_TIME])
        found.update((rows + np.zeros((), weight.dtype)).tobytes())
    return found.hexdigest()


def units_text(units: IntArray) -> str:
    """Unit numbers as run-length text, in their order."""
    if units.size == 0:
        return ""
    breaks = np.flatnonzero(np.diff(units) != 1) + 1
    runs = np.split(units, breaks)
    return ",".join(str(run[0]) if run.size == 1 else f"{run[0]}:{run[-1] + 1}" for run in runs)


def parse_units(text: str, size: int, *, repeated: bool = False) -> IntArray:
    """Inverse of :func:`units_text` on an axis of ``size`` units.

    Raises:
        ValueError: not unit numbers under ``size``, or one comes twice and ``repeated`` is not set.
    """
    runs: list[IntArray] = []
    for part in text.split(",") if text else ():
        first, colon, last = part.partition(":")
        start = int(first)
        stop = int(last) if colon else start + 1
        if not 0 <= start < stop <= size:
            raise ValueError(f"not unit numbers under {size}: {text[:40]}")
        runs.append(np.arange(start, stop, dtype=np.intp))
    units = np.concatenate(runs) if runs else np.empty(0, np.intp)
    if not repeated and np.unique(units).size != units.size:
        raise ValueError(f"a unit comes twice: {text[:40]}")
    return units


def write_decomposition(
    proto: onnx.ModelProto, decomposition: Decomposition, version: str
) -> None:
    """Put ``decomposition`` into the metadata of ``proto``, in place of what was there."""
    sites = {site.site: _site_json(site) for site in decomposition.sites.values()}
    content: dict[str, Any] = {
        "format": FORMAT,
        "budget": decomposition.budget,
        "sites": sites,
    }
    if decomposition.budgets:
        content["budgets"] = dict(decomposition.budgets)
    if decomposition.reordered:
        content["reordered"] = {
            name: {
                "source": constant.source,
                "axes": {str(axis): units_text(order) for axis, order in constant.axes.items()},
            }
            for name, constant in decomposition.reordered.items()
        }
    if decomposition.constants:
        content["constants"] = {
            name: {
                "shape": list(constant.shape),
                "blocks": [_block_json(block) for block in constant.blocks],
                **({} if constant.axis == -1 else {"axis": constant.axis}),
            }
            for name, constant in decomposition.constants.items()
        }
    for key, value in ((VERSION_KEY, version), (DECOMPOSITION_KEY, json.dumps(content))):
        _set(proto, key, value)


def read_decomposition(proto: onnx.ModelProto, label: str) -> Decomposition | None:
    """The decomposition that ``proto`` carries; None if it carries none.

    Raises:
        ModelError: the metadata is there but broken, or of a newer format.
    """
    text = _text(proto)
    if text is None:
        return None
    try:
        content = json.loads(text)
        if content["format"] > FORMAT:
            raise ModelError(
                f"{label}: was rewritten by a newer onnx-decompose; update this one to validate it"
            )
        sites = {name: _site_blocks(name, fields) for name, fields in content["sites"].items()}
        reordered = {
            name: _reordered(fields) for name, fields in content.get("reordered", {}).items()
        }
        constants = {
            name: _sliced(fields) for name, fields in content.get("constants", {}).items()
        }
        budgets = {str(name): float(b) for name, b in content.get("budgets", {}).items()}
        return Decomposition(float(content["budget"]), sites, reordered, constants, budgets)
    except _BROKEN as error:
        raise ModelError(
            f"{label}: the metadata '{DECOMPOSITION_KEY}' is broken ({error!r}); rewrite the model again"
        ) from error


def carry_the_same(first: onnx.ModelProto, second: onnx.ModelProto) -> bool:
    """Whether both models carry one decomposition: that of an earlier rewrite, which made the first of them."""
    return _text(first) == _text(second) is not None


def rewritten_before(proto: onnx.ModelProto) -> str | None:
    """Why a model is not rewritten again; None for one that never was.

    Its metadata speaks of the model before the first rewrite, and would be lost, with the proof of it.
    """
    if _text(proto) is None:
        return None
    return "the model was rewritten before; rewrite the original instead"


def _text(proto: onnx.ModelProto) -> str | None:
    return next((p.value for p in proto.metadata_props if p.key == DECOMPOSITION_KEY), None)


def _site_blocks(name: str, fields: Mapping[str, Any]) -> SiteBlocks:
    inputs, outputs = (operator.index(size) for size in fields["shape"])
    if fields["annealing"] not in get_args(Annealing):
        raise ValueError(f"site '{name}': annealing {fields['annealing']!r}")
    blocks = tuple(_block(block, inputs, outputs) for block in fields["blocks"])
    bias = None
    if "bias" in fields:
        parts = tuple(_block(block, 1, outputs) for block in fields["bias"]["blocks"])
        bias = FoldedBias(str(fields["bias"]["sha256"]), parts)
    absorbed = _index(fields["absorbed"]) if "absorbed" in fields else None
    return SiteBlocks(
        name,
        (inputs, outputs),
        fields["annealing"],
        str(fields["sha256"]),
        blocks,
        bias,
        absorbed,
        bool(fields.get("slope", False)),
    )


def _site_json(site: SiteBlocks) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "shape": list(site.shape),
        "annealing": site.annealing,
        "sha256": site.sha256,
        "blocks": [_block_json(block) for block in site.blocks],
    }
    if site.bias is not None:
        parts = [_block_json(block) for block in site.bias.blocks]
        fields["bias"] = {"sha256": site.bias.sha256, "blocks": parts}
    if site.absorbed is not None:
        fields["absorbed"] = site.absorbed
    if site.slope:
        fields["slope"] = True
    return fields


def _block_json(block: Block) -> dict[str, Any]:
    """Plain values; what is None is left out."""
    optional = {
        "part": block.part,
        "stored_rows": None if block.stored_rows is None else units_text(block.stored_rows),
        "stored_columns": (
            None if block.stored_columns is None else units_text(block.stored_columns)
        ),
    }
    return {
        "rows": units_text(block.rows),
        "columns": units_text(block.columns),
        "initializer": block.initializer,
        "transposed": block.transposed,
        **{key: value for key, value in optional.items() if value is not None},
    }


def _block(fields: Mapping[str, Any], inputs: int, outputs: int) -> Block:
    rows, columns = parse_units(fields["rows"], inputs), parse_units(fields["columns"], outputs)
    part = fields.get("part")
    return Block(
        rows,
        columns,
        str(fields["initializer"]),
        bool(fields["transposed"]),
        None if part is None else _index(part),
        _places(fields, "stored_rows", rows.size),
        _places(fields, "stored_columns", columns.size),
    )


def _reordered(fields: Mapping[str, Any]) -> Reordered:
    axes = {int(axis): parse_units(text, _LARGEST) for axis, text in fields["axes"].items()}
    for order in axes.values():
        if not np.array_equal(np.sort(order), np.arange(order.size)):
            raise ValueError(f"'{fields['source']}': an order of units that leaves some out")
    return Reordered(str(fields["source"]), axes)


def _sliced(fields: Mapping[str, Any]) -> SlicedConstant:
    rows, units = (operator.index(size) for size in fields["shape"])
    blocks = tuple(_block(block, rows, units) for block in fields["blocks"])
    axis = operator.index(fields.get("axis", -1))
    return SlicedConstant((rows, units), blocks, axis)


def _index(value: Any) -> int:
    number = operator.index(value)
    if number < 0:
        raise ValueError(f"negative number {number}")
    return number


_LARGEST = np.iinfo(np.int32).max


def _places(fields: Mapping[str, Any], key: str, count: int) -> IntArray | None:
    """Where a stored matrix holds each of ``count`` units; its size is checked when it is read."""
    if key not in fields:
        return None
    found = parse_units(fields[key], _LARGEST, repeated=True)
    if found.size != count:
        raise ValueError(f"{key} names {found.size} places for {count} units")
    return found


def _set(proto: onnx.ModelProto, key: str, value: str) -> None:
    for entry in proto.metadata_props:
        if entry.key == key:
            entry.value = value
            return
    proto.metadata_props.add(key=key, value=value)
