"""A region as a model of its own: its entries are the inputs, its exits the outputs."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import onnx
from onnx import helper, numpy_helper

from onnx_decompose.errors import ModelError
from onnx_decompose.graph.rearranged import Rearranged
from onnx_decompose.graph.recurrent import find_recurrent
from onnx_decompose.model.constants import Constants
from onnx_decompose.model.model_io import Model
from onnx_decompose.model.shapes import infer_values

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from onnx_decompose.graph.recurrent import RecurrentSite
    from onnx_decompose.graph.regions import Region
    from onnx_decompose.graph.study import Study

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

    def extract_operator(self, site: RecurrentSite) -> tuple[Model, RecurrentSite]:
        """A recurrent operator with its weights as a model, and the site inside that model.

        Raises:
            ModelError: the type of a value is not known, or the lengths of sequences come from outside: what is made up
                for them need not be lengths.
        """
        label, proto = self._study.model.label, self._study.model.proto
        node = proto.graph.node[site.find(proto.graph)]
        known = Rearranged(self._study.model, self._study.constants)
        read = list(dict.fromkeys(filter(None, node.input)))
        outside = [name for name in read if name not in known]
        if site.operands.get("sequence_lens") in outside:
            raise ModelError(
                f"{label}: operator '{site.name}': its sequence lengths are not known"
            )
        for name in (*outside, *filter(None, site.outputs)):
            if name not in self._values:
                raise ModelError(
                    f"{label}: operator '{site.name}': the type of '{name}' is not known"
                )
        graph = helper.make_graph(
            [node],
            site.name,
            [self._values[name] for name in outside],
            [self._values[name] for name in site.outputs if name],
            [
                numpy_helper.from_array(known.array(name), name)
                for name in read
                if name in known
            ],
        )
        small = Model(
            onnx.ModelProto(
                ir_version=proto.ir_version, opset_import=proto.opset_import, graph=graph
            ),
            None,
        )
        (inner,), _ = find_recurrent(small, Constants(small))
        return small, inner

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
