"""What sites read, while a model runs: the model itself in onnxruntime, with the values between its nodes as outputs.

Batch by batch, and only as far into the graph as the values asked for. Values are handed on: what is kept is for the
caller to add up (``analysis.gram``), or held up to a number of bytes (``Held``), so that a model that is looked at
again runs from there on. Second moments are held up to a number of bytes, too (``InputMoments``): those of more views
take more runs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from onnx_decompose.analysis.gram import MomentAccumulator, Moments
from onnx_decompose.calibrated.views import Rows, View
from onnx_decompose.graph.regions import reads
from onnx_decompose.model.model_io import Model
from onnx_decompose.runtime.cases import SAMPLES_AT_A_TIME, open_model

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from numpy.typing import NDArray

    from onnx_decompose.runtime.samples import Samples
    from onnx_decompose.runtime.sessions import Provider

__all__ = [
    "BATCH_BYTES",
    "HELD_BYTES",
    "MOMENT_BYTES",
    "Held",
    "InputMoments",
    "in_batches",
    "input_moments",
    "moment_bytes",
    "observe",
]

HELD_BYTES = 1 << 29
"""Of a model's values on one set of samples; what goes beyond it is computed again."""

MOMENT_BYTES = 1 << 31
"""Of second moments on one set of samples; a site that reads over 16,384 units has more of its own."""

BATCH_BYTES = 1 << 29
"""Of the values that all sites read, on the samples that are run at a time."""


class Held:
    """Values of one model on one set of samples that do not change any more, batch by batch.

    Args:
        most: bytes in all.
    """

    def __init__(self, most: int = HELD_BYTES) -> None:
        self._left = most
        self._batches: dict[str, list[NDArray[Any]]] = {}

    @property
    def room(self) -> int:
        """Bytes that are left."""
        return self._left

    @property
    def names(self) -> Collection[str]:
        """The values that are held."""
        return self._batches.keys()

    def batch(self, name: str, number: int) -> NDArray[Any]:
        """One value on one batch."""
        return self._batches[name][number]

    def hold(self, values: Mapping[str, list[NDArray[Any]]]) -> None:
        """Hold whole values, on all batches, as far as there is room."""
        for name, batches in values.items():
            size = sum(array.nbytes for array in batches)
            if size <= self._left and name not in self._batches:
                self._left -= size
                self._batches[name] = batches


def observe(
    model: Model,
    values: Sequence[str],
    samples: Samples,
    provider: Provider,
    held: Held | None = None,
) -> Iterator[dict[str, NDArray[Any]]]:
    """The named values of ``model`` on every batch of ``samples``.

    Args:
        model: the model.
        values: names of values of its main graph, inputs included.
        samples: what it is run on.
        provider: where it runs.
        held: values of this model on these samples: it starts from them, and the ones asked for join them.
    """
    held = Held(0) if held is None else held
    inputs = {value.name for value in model.proto.graph.input}
    known = set(held.names) - inputs
    made = [name for name in values if name not in inputs | known]
    types = {name: held.batch(name, 0) for name in known}
    session = open_model(_exposed(model, made, types), provider) if made else None
    new: dict[str, list[NDArray[Any]]] = {name: [] for name in made}
    room = held.room
    for number, (feeds, _) in enumerate(samples.batches(SAMPLES_AT_A_TIME)):
        found = {name: feeds[name] for name in values if name in inputs}
        found |= {name: held.batch(name, number) for name in values if name in known}
        if session is not None:
            given = {
                spec.name: held.batch(spec.name, number)
                if spec.name in known
                else feeds[spec.name]
                for spec in session.inputs
            }
            run = session.run(given)
            room -= sum(array.nbytes for array in run.values())
            if room >= 0:
                for name, array in run.items():
                    new[name].append(array)
            else:
                new.clear()
            found |= run
        yield found
    held.hold(new)


class InputMoments(Mapping[View, Moments]):
    """Moments of views with themselves, worked out when one is asked for: as many in one run as may be held.

    Whoever goes through the views in their order has the model run once for every ``most`` bytes.

    Args:
        model: the model.
        sizes: the units of each view, in the order of the graph.
        samples: what the model is run on.
        provider: where it runs.
        seed: as of ``Rows``.
        most: bytes in all; one view alone may take more.
    """

    def __init__(
        self,
        model: Model,
        sizes: Mapping[View, int],
        samples: Samples,
        provider: Provider,
        seed: int,
        most: int = MOMENT_BYTES,
    ) -> None:
        self._model, self._samples, self._provider = model, samples, provider
        self._sizes, self._seed, self._most = sizes, seed, most
        self._found: dict[View, Moments] = {}

    def __getitem__(self, view: View) -> Moments:
        if view not in self._found:
            views = self._from(view)
            self._found.clear()
            self._found = input_moments(
                self._model, views, self._samples, self._provider, self._seed
            )
        return self._found[view]

    def __iter__(self) -> Iterator[View]:
        return iter(self._sizes)

    def __len__(self) -> int:
        return len(self._sizes)

    def _from(self, view: View) -> list[View]:
        """This view and those behind it that there is room for."""
        if view not in self._sizes:
            raise KeyError(view)
        order = list(self._sizes)
        views, room = [view], self._most - moment_bytes(self._sizes[view])
        for other in order[order.index(view) + 1 :]:
            room -= moment_bytes(self._sizes[other])
            if room < 0:
                break
            views.append(other)
        return views


def moment_bytes(units: int) -> int:
    """What the second moments of so many units take, in float64."""
    return 8 * units**2


def input_moments(
    model: Model, views: Sequence[View], samples: Samples, provider: Provider, seed: int
) -> dict[View, Moments]:
    """Moments of each view with itself; ``seed`` as of ``Rows``, and their count is what rows are worth by it."""
    adding = {view: (Rows(view, samples.count, seed), MomentAccumulator()) for view in views}
    values = list(dict.fromkeys(name for view in views for name in view.values))
    for found in observe(model, values, samples, provider):
        for rows, accumulator in adding.values():
            for (x,) in rows.each(found):
                accumulator.update(x)
    return {
        view: dataclasses.replace(accumulator.result(), count=float(rows.worth))
        for view, (rows, accumulator) in adding.items()
    }


def in_batches(
    model: Model, values: Sequence[str], samples: Samples, provider: Provider
) -> Samples:
    """The samples, to be run as many at a time as leaves the named values of ``model`` within ``BATCH_BYTES``."""
    first = samples.take(np.arange(1))
    each = sum(
        array.nbytes
        for found in observe(model, values, first, provider)
        for array in found.values()
    )
    most = max(BATCH_BYTES // max(each, 1), 1)
    return dataclasses.replace(samples, at_a_time=min(most, SAMPLES_AT_A_TIME))


def _exposed(model: Model, values: Sequence[str], known: Mapping[str, NDArray[Any]]) -> Model:
    """The part of ``model`` that makes ``values`` of its inputs and what is ``known``, with them as its outputs."""
    graph = model.proto.graph
    wanted = set(values)
    nodes: list[onnx.NodeProto] = []
    for node in reversed(graph.node):
        if wanted.difference(known).intersection(node.output):
            nodes.append(node)
            wanted.update(reads(node))
    proto = onnx.ModelProto()
    proto.CopyFrom(_without_graph(model.proto))
    part = proto.graph
    part.name = graph.name
    part.node.extend(reversed(nodes))
    part.initializer.extend(tensor for tensor in graph.initializer if tensor.name in wanted)
    part.sparse_initializer.extend(
        tensor for tensor in graph.sparse_initializer if tensor.values.name in wanted
    )
    part.input.extend(value for value in graph.input if value.name in wanted)
    part.input.extend(
        onnx.helper.make_tensor_value_info(
            name,
            onnx.helper.np_dtype_to_tensor_dtype(np.dtype(array.dtype)),
            [None] * array.ndim,
        )
        for name, array in known.items()
        if name in wanted
    )
    part.output.extend(onnx.ValueInfoProto(name=name) for name in values)
    return Model(proto, model.path)


def _without_graph(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Everything but the graph: versions, operator sets, functions."""
    rest = onnx.ModelProto(ir_version=proto.ir_version)
    rest.opset_import.extend(proto.opset_import)
    rest.functions.extend(proto.functions)
    return rest
