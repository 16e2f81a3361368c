"""What sites read, while a model runs: the model itself in onnxruntime, with the values between its nodes as outputs.

Values inside the bodies of If, Loop and Scan come as rows, those of all iterations, one after the other; inside calls
they are values like others. Names are those of the flat graph (``graph.flat``).

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
from onnx_decompose.graph.exposing import exposed
from onnx_decompose.graph.regions import reads
from onnx_decompose.model.model_io import Model
from onnx_decompose.runtime.cases import SAMPLES_AT_A_TIME, open_model

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from numpy.typing import NDArray

    from onnx_decompose.graph.exposing import Shown
    from onnx_decompose.graph.flat import Flat
    from onnx_decompose.runtime.samples import Samples
    from onnx_decompose.runtime.sessions import Provider

    Observe = Callable[[Sequence[str], Samples], Iterator[dict[str, NDArray[Any]]]]

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
    flat: Flat,
    values: Sequence[str],
    samples: Samples,
    provider: Provider,
    held: Held | None = None,
    inside: Mapping[str, Shown] | None = None,
) -> Iterator[dict[str, NDArray[Any]]]:
    """The named values of a model on every batch of ``samples``.

    Args:
        flat: the model, or a changed version of it.
        values: names of values of the flat graph, inputs of the model included.
        samples: what it is run on.
        provider: where it runs.
        held: values of this model on these samples: it starts from them, and the ones asked for join them.
        inside: what those inside bodies come out as.

    Raises:
        ModelError: it does not run.
    """
    held = Held(0) if held is None else held
    graph = flat.source.proto.graph
    # A stored tensor that is an input too is what it is without one.
    inputs = {value.name for value in graph.input} - {t.name for t in graph.initializer}
    known = set(held.names) - inputs
    made = [name for name in values if name not in inputs | known]
    inside = inside or {}
    # Nothing can start from rows that come from inside a body.
    types = {name: held.batch(name, 0) for name in known - inside.keys()}
    rows = {name: inside[name] for name in made if name in inside}
    session, names = None, dict[str, str]()
    if made:
        model, names = _exposed(flat, made, types, rows)
        session = open_model(model, provider)
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
            run = {name: run[names[name]] for name in made}
            room -= sum(array.nbytes for array in run.values())
            if room >= 0:
                for name, array in run.items():
                    # An output keeps all that its session has allocated, a copy does not.
                    new[name].append(array.copy())
            else:
                new.clear()
            found |= run
        yield found
    held.hold(new)


class InputMoments(Mapping[View, Moments]):
    """Moments of views with themselves, worked out when one is asked for: as many in one run as may be held.

    Whoever goes through the views in their order has the model run once for every ``most`` bytes.

    Args:
        observe: gives values of the model on samples, batch by batch.
        sizes: the units of each view, in the order of the graph.
        samples: what the model is run on.
        seed: as of ``Rows``.
        most: bytes in all; one view alone may take more.
    """

    def __init__(
        self,
        observe: Observe,
        sizes: Mapping[View, int],
        samples: Samples,
        seed: int,
        most: int = MOMENT_BYTES,
    ) -> None:
        self._observe, self._samples = observe, samples
        self._sizes, self._seed, self._most = sizes, seed, most
        self._found: dict[View, Moments] = {}

    def __getitem__(self, view: View) -> Moments:
        if view not in self._found:
            views = self._from(view)
            self._found.clear()
            self._found = input_moments(self._observe, views, self._samples, self._seed)
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
    observe: Observe, views: Sequence[View], samples: Samples, seed: int
) -> dict[View, Moments]:
    """Moments of each view with itself; ``seed`` as of ``Rows``, and their count is what rows are worth by it."""
    adding = {view: (Rows(view, samples.count, seed), MomentAccumulator()) for view in views}
    values = list(dict.fromkeys(name for view in views for name in view.values))
    for found in observe(values, samples):
        for rows, accumulator in adding.values():
            for (x,) in rows.each(found):
                accumulator.update(x)
    return {
        view: dataclasses.replace(accumulator.result(), count=float(rows.worth))
        for view, (rows, accumulator) in adding.items()
    }


def in_batches(observe: Observe, values: Sequence[str], samples: Samples) -> Samples:
    """The samples, to be run as many at a time as leaves the named values of a model within ``BATCH_BYTES``."""
    first = samples.take(np.arange(1))
    each = sum(array.nbytes for found in observe(values, first) for array in found.values())
    most = max(BATCH_BYTES // max(each, 1), 1)
    return dataclasses.replace(samples, at_a_time=min(most, SAMPLES_AT_A_TIME))


def _exposed(
    flat: Flat,
    values: Sequence[str],
    known: Mapping[str, NDArray[Any]],
    inside: Mapping[str, Shown],
) -> tuple[Model, dict[str, str]]:
    """The part of a model that makes ``values`` of its inputs and what is ``known``, with them as its outputs.

    Returns:
        The part, and by value what it is called there.
    """
    graph, inputs = flat.model.proto.graph, flat.source.proto.graph.input
    shown = exposed(flat, inside)
    names = {name: shown.names.get(name, name) for name in values}
    wanted = set(names.values())
    nodes: list[onnx.NodeProto] = []
    for node in reversed(shown.nodes):
        if wanted.difference(known).intersection(node.output):
            nodes.append(node)
            wanted.update(name for name in reads(node) if name)
    known = {
        name: array
        for name, array in known.items()
        if all(name not in node.output for node in nodes)
    }
    proto = onnx.ModelProto()
    proto.CopyFrom(_without_graph(flat.source.proto))
    part = proto.graph
    part.name = graph.name
    part.node.extend(reversed(nodes))
    part.initializer.extend(tensor for tensor in graph.initializer if tensor.name in wanted)
    part.sparse_initializer.extend(
        tensor for tensor in graph.sparse_initializer if tensor.values.name in wanted
    )
    part.input.extend(value for value in inputs if value.name in wanted)
    part.input.extend(
        onnx.helper.make_tensor_value_info(
            name,
            onnx.helper.np_dtype_to_tensor_dtype(np.dtype(array.dtype)),
            [None] * array.ndim,
        )
        for name, array in known.items()
        if name in wanted
    )
    part.output.extend(onnx.ValueInfoProto(name=name) for name in names.values())
    return Model(proto, flat.source.path), names


def _without_graph(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Everything but the graph: versions, operator sets, functions."""
    rest = onnx.ModelProto(ir_version=proto.ir_version)
    rest.opset_import.extend(proto.opset_import)
    rest.functions.extend(proto.functions)
    return rest
