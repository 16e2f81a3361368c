"""What models are compared on: made-up inputs over seeds, sizes and extremes, and the user's own."""

from __future__ import annotations

import dataclasses
import logging
from typing import TYPE_CHECKING

from onnx_decompose.errors import DataError, ModelError
from onnx_decompose.model.external_data import (
    ALIGNMENT,
    external_tensors,
    inline_bytes,
    outside_bytes,
    set_entry,
    without_weights,
)
from onnx_decompose.model.model_io import read_tensor
from onnx_decompose.model.tensors import graph_inputs, graph_outputs
from onnx_decompose.runtime.feeds import (
    batch_dims,
    batch_sizes,
    dim_symbols,
    entries_per_sample,
    index_limits,
    other_dims,
    poisoned_feeds,
    random_feeds,
    size_settings,
    special_feeds,
)
from onnx_decompose.runtime.sessions import SessionSettings, open_session

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import numpy as np
    import onnx

    from onnx_decompose.model.model_io import Model
    from onnx_decompose.runtime.feeds import Feeds
    from onnx_decompose.runtime.samples import Samples
    from onnx_decompose.runtime.sessions import Provider, Session

logger = logging.getLogger(__name__)

__all__ = [
    "OTHER_SIZES",
    "SAMPLES_AT_A_TIME",
    "Case",
    "made_up_cases",
    "open_model",
    "runnable",
    "sample_cases",
    "working_size",
]

SAMPLES_AT_A_TIME = 256
_MOST_GIVEN = 1 << 23
"""Entries of an input, or of what the model makes of it, of the samples that are run at a time, unless one has more."""
_LARGE = 2**29
"""Bytes of weights, some of them external, above which even timing leaves them mapped: loaded, two models need twice
that."""

_MOST_SERIALIZED = 2**31 - 2**26
"""Bytes of weights; protobuf's own limit is 2 GB for all of a model."""

OTHER_SIZES = ((32, 64), (512, 1024), (8, 16), (1, 2))
"""Sizes of dynamic axes that are not the batch: the first pair that a model accepts is used."""

_MOST_ENTRIES = 1 << 19
"""Entries of a made-up input, or of an output; what lies between the layers of a convolutional model can be a hundred
times that."""


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Case:
    """One set of inputs.

    Attributes:
        label: what it is, for messages.
        feeds: one array per model input.
        extras: arrays that came with them and are not inputs (labels, masks).
        typical: whether claim B is measured on it; the extremes are for claim A alone.
        kind: of the inputs: ``random``, ``given``, or which extreme.
        poison: symbols of the batch axis where the first sample has an entry that is NaN or infinite; else none.
    """

    label: str
    feeds: Feeds
    extras: Feeds = dataclasses.field(default_factory=dict)
    typical: bool = True
    kind: str = "random"
    poison: tuple[str, ...] = ()


def is_large(model: Model) -> bool:
    """Whether the weights of a model should stay in their files, mapped, whatever that costs in speed."""
    outside = outside_bytes(model.proto)
    return outside > 0 and outside + inline_bytes(model.proto) > _LARGE


def open_model(
    model: Model,
    provider: Provider,
    *,
    fast: bool = False,
    large: bool | None = None,
    settings: SessionSettings | None = None,
) -> Session:
    """A session on a model whose external data, if any, lies beside its file.

    Unless it is to be ``fast``, as for timing, the weights of a model with external data stay in their file, mapped,
    and activations are not rounded to fewer bits than the model has. Of one that is ``large``, as :func:`is_large`
    says unless told, they stay there in any case, and no optimization rearranges them in memory. Of two models that
    are compared both are opened alike, though the rewritten one may be small.

    A model that is too large to be serialized (rewritten weights of one with external data) is handed over without
    its weights, and these by reference.
    """
    proto, weights = model.proto, None
    large = is_large(model) if large is None else large
    mapped = large or (not fast and next(external_tensors(proto), None) is not None)
    if inline_bytes(proto) > _MOST_SERIALIZED:
        proto, emptied = without_weights(model.proto)
        weights = {tensor.name: read_tensor(model, source) for tensor, source in emptied}
        for number, (tensor, source) in enumerate(emptied):
            set_entry(tensor, "given", number * ALIGNMENT, weights[source.name].nbytes)
    return open_session(
        proto.SerializeToString(),
        provider,
        dataclasses.replace(
            settings or SessionSettings(), prepack=not mapped, layouts=not large, rounds=fast
        ),
        label=model.label,
        data_folder=model.folder,
        weights=weights,
    )


def made_up_cases(
    proto: onnx.ModelProto,
    *,
    seeds: int,
    rng: np.random.Generator,
    batch: tuple[int, ...] = (1, 5, 32),
    other: tuple[int, ...] = OTHER_SIZES[0],
) -> Iterator[Case]:
    """Random inputs at every setting of the dynamic axes, then extremes, then NaN and infinities in one sample.

    Batches are smaller where a single sample is large. The extremes come at the second setting, and the last
    ones only where every input's first axis counts samples.

    Args:
        proto: the model.
        seeds: random draws at each setting.
        rng: source of randomness.
        batch: sizes of the batch axis.
        other: sizes of the other dynamic axes, from ``OTHER_SIZES``.
    """
    specs, limits = graph_inputs(proto), index_limits(proto)
    outputs = graph_outputs(proto)
    fitting = batch_sizes(specs, outputs, batch, other=max(other), most_entries=_MOST_ENTRIES)
    settings = size_settings(specs, batch=fitting, other=other)
    for dims in settings:
        sizes = ", ".join(f"{name} {size}" for name, size in dims.items()) or "fixed sizes"
        for draw in range(seeds):
            feeds = random_feeds(specs, rng=rng, dims=dims, limits=limits)
            yield Case(f"random inputs {draw + 1} at {sizes}", feeds)
    dims = settings[min(1, len(settings) - 1)]
    for kind, feeds in special_feeds(specs, rng=rng, dims=dims, limits=limits).items():
        yield Case(f"{kind} inputs", feeds, typical=False, kind=kind)
    batches = batch_dims(specs)
    if all(spec.shape and spec.axis_symbol(0) in batches for spec in specs):
        for kind, feeds in poisoned_feeds(specs, rng=rng, dims=dims, limits=limits).items():
            label = f"random inputs with {kind} in the first sample"
            yield Case(label, feeds, typical=False, kind=kind, poison=batches)


def working_size(proto: onnx.ModelProto, session: Session, rng: np.random.Generator) -> int:
    """A size of the dynamic axes other than the batch that the model accepts; the usual one if it accepts none."""
    specs, limits = graph_inputs(proto), index_limits(proto)
    sizes = [max(other) for other in OTHER_SIZES]
    for size in sizes:
        dims = size_settings(specs, batch=(1,), other=(size,))[0]
        feeds = random_feeds(specs, rng=rng, dims=dims, limits=limits)
        if _resizable(session) and not session.survives([feeds]):
            continue
        try:
            session.run(feeds)
        except ModelError as error:
            logger.info("%s: does not accept size %d: %s", session.label, size, error)
            continue
        return size
    return sizes[0]


def sample_cases(proto: onnx.ModelProto, samples: Samples) -> Iterator[Case]:
    """The user's inputs, a batch at a time: of a model that makes much of each, few of them."""
    specs = graph_inputs(proto)
    one, _ = next(samples.batches(1))
    each = entries_per_sample(specs, graph_outputs(proto), other_dims(specs, one))
    size = min(max(_MOST_GIVEN // each, 1), SAMPLES_AT_A_TIME)
    for number, (feeds, extras) in enumerate(samples.batches(size)):
        yield Case(f"{samples.source}, batch {number + 1}", feeds, extras, kind="given")


def runnable(
    cases: Callable[[tuple[int, ...]], Iterator[Case]], session: Session
) -> Iterator[tuple[Case, Feeds]]:
    """The cases that the model accepts, with its outputs: not every size fits every model.

    Args:
        cases: makes them at given sizes of the dynamic axes that are not the batch; other sizes are tried where the
            model accepts nothing at the first.
        session: the model.

    Raises:
        DataError: it accepts none of them.
    """
    refusal = None
    for other in OTHER_SIZES:
        accepted = 0
        trials = _shapes_once(cases(other)) if _resizable(session) else ()
        if trials and not session.survives(trials):
            refusal = refusal or ModelError(f"onnxruntime itself crashes at sizes {other}")
            continue
        for case in cases(other):
            try:
                outputs = session.run(case.feeds)
            except ModelError as error:
                logger.info("%s: left out, the model does not accept it: %s", case.label, error)
                refusal = refusal or error
                continue
            accepted += 1
            yield case, outputs
        if accepted:
            return
    raise DataError(
        f"{session.label}: does not run on made-up inputs ({refusal}); give real ones with "
        "--inputs or --calibration"
    )


def _shapes_once(cases: Iterator[Case]) -> list[Feeds]:
    """Inputs of every combination of shapes, once each; of made-up cases alone."""
    found = {
        tuple(array.shape for array in case.feeds.values()): case.feeds
        for case in cases
        if not case.extras
    }
    return list(found.values())


def _resizable(session: Session) -> bool:
    """Whether the model has dynamic axes other than the batch: its operators may not have been made for every size."""
    return len(dim_symbols(session.inputs)) > len(batch_dims(session.inputs))
