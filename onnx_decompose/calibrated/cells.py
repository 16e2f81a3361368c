"""Recurrent operators whose hidden units can go: what they read while a model runs, and who reads their units.

The state that an operator reads is its own output of the step before (``analysis.states``). Where a model does not use
the output of every step, it is asked for.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from onnx_decompose.analysis.states import steps_read
from onnx_decompose.graph.exposing import Inside
from onnx_decompose.graph.sites import attribute_values
from onnx_decompose.graph.state_readers import find_state_readers
from onnx_decompose.model.model_io import Model

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from numpy.typing import NDArray

    from onnx_decompose.graph.flat import Flat
    from onnx_decompose.graph.recurrent import RecurrentSite, RecurrentWeight
    from onnx_decompose.graph.state_readers import StateReaders
    from onnx_decompose.graph.study import Study

__all__ = ["Cell", "find_cells", "with_states"]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Cell:
    """A recurrent operator of one direction.

    Attributes:
        site: the operator.
        readers: who reads its units, beside itself; None where something does that needs them all.
        applies_reset_after: whether a GRU's candidate multiplies by the reset gate what R makes of the state, and not
            the state.
    """

    site: RecurrentSite
    readers: StateReaders | None
    applies_reset_after: bool

    @property
    def weights(self) -> tuple[RecurrentWeight, RecurrentWeight]:
        """W and R."""
        return self.site.weights[0]

    @property
    def output(self) -> str:
        """The value that has the output of every step."""
        return self.site.outputs[0] or f"{self.site.name}.every_step"

    @property
    def values(self) -> tuple[str, ...]:
        """Names of the values that tell what it reads."""
        operands = ("X", "sequence_lens", "initial_h")
        given = (self.site.operands[o] for o in operands if o in self.site.operands)
        return (self.output, *given)

    def rows(self, found: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
        """(rows, I + H) inputs and states side by side, of the values by name."""
        operands, lengths = self.site.operands, self._lengths(found)
        initial = found[operands["initial_h"]][0] if "initial_h" in operands else None
        x, h = steps_read(
            found[operands["X"]],
            found[self.output][:, 0],
            initial,
            lengths,
            reverse=self.site.directions[0] == "reverse",
        )
        return np.hstack([x, h])

    def made(self, found: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
        """(rows, H) what it makes, of the values by name."""
        y, lengths = found[self.output][:, 0], self._lengths(found)
        if lengths is None:
            return y.reshape(-1, y.shape[-1])
        return y[np.arange(len(y))[:, None] < lengths]

    def _lengths(self, found: Mapping[str, NDArray[Any]]) -> NDArray[np.integer[Any]] | None:
        name = self.site.operands.get("sequence_lens")
        return None if name is None else found[name]


def find_cells(study: Study, refittable: Collection[str]) -> tuple[Cell, ...]:
    """The recurrent operators of one direction outside bodies, in graph order.

    Args:
        study: the model.
        refittable: names of the sites that can be refitted: others need all units that they read.
    """
    inside = Inside(study.flat)
    seen = {value.name for value in study.source.proto.graph.input}
    seen.update(name for node in study.model.proto.graph.node for name in node.output)
    found: list[Cell] = []
    for site in study.recurrent:
        node = study.model.proto.graph.node[site.node]
        cell = Cell(site, None, bool(attribute_values(node).get("linear_before_reset", 0)))
        outside = not any(inside.path(name) for name in (*node.output, *cell.values))
        known = set(cell.values) - {cell.output} <= seen
        if outside and known and len(site.directions) == 1:
            found.append(cell)
    names = {cell.site.name for cell in found}
    told = study.constants, study.shapes
    sites = [site for site in study.sites if site.name in refittable]
    cells = [site for site in study.recurrent if site.name in names]
    return tuple(
        dataclasses.replace(
            cell,
            readers=find_state_readers(study.model.proto.graph, cell.site, sites, cells, told),
        )
        for cell in found
    )


def with_states(flat: Flat, cell: Cell) -> Flat:
    """A model with a name for what an operator makes at every step."""
    if cell.site.outputs[0]:
        return flat
    proto = onnx.ModelProto()
    proto.CopyFrom(flat.model.proto)
    proto.graph.node[cell.site.find(proto.graph)].output[0] = cell.output
    return dataclasses.replace(flat, model=Model(proto, flat.model.path))
