"""A region as a model of its own: its entries are the inputs, its exits the outputs."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import onnx
from onnx import helper, numpy_helper

from onnx_decompose.errors import ModelError
from onnx_decompose.model_io import Model
from onnx_decompose.shapes import infer_values

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from onnx_decompose.regions import Region
    from onnx_decompose.study import Study

__all__ = ["RegionModels"]


class RegionModels:
    """Takes regions out of one model.

    Args:
        study: the model.
    """

    def __init__(self, study: Study) -> None:
        self._study = study
        self._values: Mapping[str, onnx.ValueInfoProto] = infer_values(study.model.proto)

    def extract(self, region: Region) -> tuple[Model, Region]:
        """The region's nodes with the constants that they read, as a model, and the region inside that model.

        What the nodes read from outside, the entries and values that are broadcast to every unit, are the inputs.

        Raises:
            ModelError: the type of such a value is not known.
        """
        proto = self._study.model.proto
        indices = self._with_weights(region)
        nodes = [proto.graph.node[index] for index in indices]
        made = {name for node in nodes for name in node.output}
        read = list(dict.fromkeys(name for node in nodes for name in node.input if name))
        constants = self._study.constants
        tensors = [
            numpy_helper.from_array(constants.array(name), name)
            for name in read
            if name in constants
        ]
        outside = [name for name in read if name not in made and name not in constants]
        graph = helper.make_graph(
            nodes,
            region.name,
            [self._value(name, region) for name in outside],
            [self._value(name, region) for name in region.exits],
            tensors,
        )
        small = onnx.ModelProto(
            ir_version=proto.ir_version,
            opset_import=proto.opset_import,
            functions=proto.functions,
            graph=graph,
        )
        return Model(small, None), _relocated(region, indices)

    def _with_weights(self, region: Region) -> list[int]:
        """The region's nodes, and those that make weights of integers."""
        weights = {
            name for site in region.sites if site.quantized for name in site.quantized.made
        }
        graph = self._study.model.proto.graph
        making = {i for i, node in enumerate(graph.node) if not weights.isdisjoint(node.output)}
        return sorted(making.union(region.nodes))

    def _value(self, name: str, region: Region) -> onnx.ValueInfoProto:
        """A declaration of ``name``; a value of unknown rank is taken to be (batch, units, positions)."""
        known = self._values.get(name)
        element = 0 if known is None else known.type.tensor_type.elem_type
        if known is None or element == onnx.TensorProto.UNDEFINED:
            raise ModelError(
                f"{self._study.model.label}: region '{region.name}': the type of '{name}' is not known"
            )
        if known.type.tensor_type.HasField("shape"):
            return known
        if name not in region.axis_of:
            raise ModelError(
                f"{self._study.model.label}: region '{region.name}': the shape of '{name}' is not known"
            )
        units = region.axis_sizes[region.axis_of[name]]
        positions = [f"position{number}" for number in range(-1 - region.unit_axis)]
        shape: Sequence[int | str] = ("batch", units, *positions)
        return helper.make_tensor_value_info(name, element, shape)


def _relocated(region: Region, indices: Sequence[int]) -> Region:
    """The same region in a graph of the nodes ``indices``."""
    place = {index: number for number, index in enumerate(indices)}
    return dataclasses.replace(
        region,
        nodes=tuple(place[index] for index in region.nodes),
        sites=tuple(dataclasses.replace(site, node=place[site.node]) for site in region.sites),
    )
