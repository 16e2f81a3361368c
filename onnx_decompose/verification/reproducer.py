"""Where claim A fails first, as two small models and their inputs that show it."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from onnx_decompose.errors import DataError, ModelError, OutputError
from onnx_decompose.graph.sites import find_sites
from onnx_decompose.model.constants import Constants
from onnx_decompose.model.metadata import read_decomposition
from onnx_decompose.model.model_io import Model
from onnx_decompose.model.tensors import is_float
from onnx_decompose.runtime.cases import made_up_cases, open_model, runnable
from onnx_decompose.verification.cut import cut, reads, varying, with_outputs
from onnx_decompose.verification.proof import annealed_model, prove_structure
from onnx_decompose.verification.reference import Reference, open_reference
from onnx_decompose.verification.rounding import Compared, compare, first_miss
from onnx_decompose.verification.unrolled import unrolled

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    import onnx
    from numpy.typing import NDArray

    from onnx_decompose.graph.sites import Site
    from onnx_decompose.runtime.cases import Case
    from onnx_decompose.runtime.feeds import Feeds
    from onnx_decompose.runtime.sessions import Provider
    from onnx_decompose.verification.claims import StructuralClaim

__all__ = [
    "Reproducer",
    "agreeing",
    "first_value",
    "part_of_both",
    "reproduce",
    "write_reproducer",
]

logger = logging.getLogger(__name__)

_AT_A_TIME = 32
"""Values inside the models that are compared in one run."""

_DRAWS = 4
"""Of inputs on which a wrong weight is looked for."""

_ABOUT = 1e-2
"""How far values of two models that are to be the same may be apart, relative to their size, to count as that."""


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Reproducer:
    """Two parts of models that differ.

    Attributes:
        value: what they make, and where they differ.
        sites: the sites between the inputs and it.
        fault: what failed, in the words of the claim.
        before: the part of the annealed model, or of the original where the stored weights are at fault.
        after: the part of the rewritten model.
        inputs: what to run both on.
        deviation: largest difference between their outputs; None where the rewritten part does not run.
        is_annealed: whether ``before`` is of the annealed model.
    """

    value: str
    sites: tuple[str, ...]
    fault: str
    before: onnx.ModelProto
    after: onnx.ModelProto
    inputs: Feeds
    deviation: float | None
    is_annealed: bool


def reproduce(
    original: Model, rewritten: Model, claim: StructuralClaim, provider: Provider
) -> Reproducer | None:
    """The first value at which the two models part, or the first that a faulty weight is in.

    Args:
        original: the model before the rewrite.
        rewritten: the model that failed.
        claim: how.
        provider: where to run.

    Returns:
        None where nothing can be shown: no value inside is in both models, or one does not run.
    """
    decomposition = read_decomposition(rewritten.proto, rewritten.label)
    if decomposition is None:
        return None
    try:
        fault, weights, biases, *_ = prove_structure(original, rewritten, decomposition)
        if fault is not None:
            first, cases = original, _some_cases(original, provider)
        elif claim.failed_case is None:
            return None
        else:
            first = annealed_model(original, decomposition, weights, biases)
            cases = [claim.failed_case]
    except (ModelError, DataError) as error:
        logger.info("no reproducer: %s", error)
        return None
    for models, case in _versions(first, rewritten, cases, provider):
        try:
            if fault is not None:
                found = _of_weights(models, fault, case, provider)
            else:
                found = _of_outputs(models, claim, case, provider)
        except ModelError as error:
            logger.info("no part that shows it: %s", error)
            continue
        if found is not None:
            return found
    return None if fault is not None else _whole((first, rewritten), claim, cases[0], provider)


def _versions(
    first: Model, rewritten: Model, cases: Sequence[Case], provider: Provider
) -> Iterator[tuple[tuple[Model, Model], Case]]:
    """Both models with nothing inside their nodes, as they run on each case, where there was; then as they are."""
    for case in cases:
        try:
            inside = [unrolled(model, case.feeds, provider) for model in (first, rewritten)]
        except ModelError as error:
            logger.info("not looked into: %s", error)
            continue
        if inside[0] is not first or inside[1] is not rewritten:
            yield (inside[0], inside[1]), case
    yield (first, rewritten), cases[0]


def write_reproducer(found: Reproducer, folder: Path) -> None:
    """Write both parts, their inputs and how to run them into ``folder``, all of it or nothing.

    Raises:
        OutputError: it cannot be written.
    """
    before = "annealed.onnx" if found.is_annealed else "original.onnx"
    content = {
        before: found.before.SerializeToString(),
        "rewritten.onnx": found.after.SerializeToString(),
        "README.md": _readme(found, before).encode(),
    }
    try:
        # A part of it would be of no use: all of it is written beside, and then put there.
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as new:
            for name, data in content.items():
                (Path(new) / name).write_bytes(data)
            np.savez(Path(new) / "inputs.npz", **found.inputs)  # type: ignore[arg-type]
            folder.mkdir(exist_ok=True)
            for path in Path(new).iterdir():
                path.replace(folder / path.name)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written ({error.strerror})") from error


def _readme(found: Reproducer, before: str) -> str:
    sites = ", ".join(f"`{site}`" for site in found.sites) or "none"
    kind = "annealed" if found.is_annealed else "original"
    differ = "The second does not run"
    if found.deviation is not None:
        differ = f"Largest difference here: {found.deviation:.3g}"
    return f"""# Where claim A fails

{found.fault}

`{before}` and `rewritten.onnx` make the value `{found.value}` as the {kind} and the rewritten model do, out of values
on which these still agree (`inputs.npz`). Sites in between: {sites}. {differ}.

Run both from this folder:

    python -c "import numpy as np, onnxruntime as rt; x = dict(np.load('inputs.npz')); \\
    a, b = (rt.InferenceSession(m).run(None, x)[0] for m in ('{before}', 'rewritten.onnx')); print(abs(a - b).max())"
"""


def _of_outputs(
    models: tuple[Model, Model], claim: StructuralClaim, case: Case, provider: Provider
) -> Reproducer | None:
    agree: set[str] = set(case.feeds)
    for values in _side_by_side(*models, case, provider):
        for name, (first, second, exact) in values.items():
            one = Compared(
                name,
                case.label,
                case.kind,
                first.dtype,
                *compare(first, second, exact),
                moves=lambda: 0.0,
            )
            if first_miss([one], None) is None:
                agree.add(name)
            elif not _same_in_another_order(first, second):
                return _cut_both(models, agree, name, claim.reason, case, provider)
    return None


def _of_weights(
    models: tuple[Model, Model], fault: str, case: Case, provider: Provider
) -> Reproducer | None:
    """The smallest part with the site, or the tensor, that the fault names; no run can tell which weight is wrong."""
    named = re.findall(r"'([^']+)'", fault)
    upstream = set(_common(*models))
    values = (first_value(models[0], upstream, name) for name in named)
    found = next(filter(None, values), None)
    if found is None:
        return None
    return _cut_both(models, {*case.feeds, *upstream}, found, fault, case, provider, False)


def _some_cases(original: Model, provider: Provider) -> list[Case]:
    """A few sets of inputs: not each of them takes every branch."""
    rng = np.random.default_rng(0)
    found = runnable(
        lambda other: made_up_cases(original.proto, seeds=_DRAWS, rng=rng, other=other),
        open_model(original, provider),
    )
    return [case for case, _ in itertools.islice(found, _DRAWS)]


def _whole(
    models: tuple[Model, Model], claim: StructuralClaim, case: Case, provider: Provider
) -> Reproducer:
    """All that makes the output that the claim names, where no smaller part shows it or the rewritten model stops."""
    outputs = [value.name for value in models[0].proto.graph.output]
    named = [name for name in re.findall(r"'([^']+)'", claim.reason) if name in outputs]
    value = (named or outputs)[0]
    parts, feeds, sites = part_of_both(models, set(), value, case, provider)
    try:
        deviation = _deviation(parts, feeds, value, provider)
    except ModelError as error:
        logger.info("the rewritten part does not run: %s", error)
        deviation = None
    return Reproducer(value, sites, claim.reason, parts[0], parts[1], feeds, deviation, True)


def _deviation(
    parts: Sequence[onnx.ModelProto], feeds: Feeds, value: str, provider: Provider
) -> float:
    """The largest difference between two parts; each is given what it reads, perhaps nothing."""
    first, second = (
        open_model(Model(part), provider).run({v.name: feeds[v.name] for v in part.graph.input})
        for part in parts
    )
    return compare(first[value], second[value], None)[1]


def first_value(original: Model, common: Collection[str], named: str) -> str | None:
    """The first of the ``common`` values that a site or tensor of ``original`` has a part in."""
    sites = {site.name: site.output for site in _sites(original)}
    reached = {sites.get(named, named)}
    for node in original.proto.graph.node:
        if node.name == named or not reached.isdisjoint((*reads(node), *node.output)):
            reached.update(filter(None, node.output))
            for name in node.output:
                if name in common:
                    return str(name)
    return None


def _cut_both(  # noqa: PLR0913, PLR0917 (what a reproducer is made of)
    models: tuple[Model, Model],
    agree: set[str],
    value: str,
    fault: str,
    case: Case,
    provider: Provider,
    is_annealed: bool = True,
) -> Reproducer:
    """Both models between the values that agree and ``value``; from the inputs on where that alone shows nothing."""
    made = None
    for frontier in (agree, set[str]()):
        parts, feeds, sites = part_of_both(models, frontier, value, case, provider)
        deviation = _deviation(parts, feeds, value, provider)
        made = Reproducer(
            value, sites, fault, parts[0], parts[1], feeds, deviation, is_annealed
        )
        if deviation:
            break
    assert made is not None
    return made


def agreeing(first: Model, second: Model, case: Case, provider: Provider) -> set[str]:
    """The floats of the main graph that both models have, about equal and with their units in one order."""
    found: set[str] = set()
    names = _common(first, second)
    for start in range(0, len(names), _AT_A_TIME):
        part = names[start : start + _AT_A_TIME]
        values = [
            open_model(with_outputs(model, part), provider).run(case.feeds)
            for model in (first, second)
        ]
        for name in part:
            size, deviation, _, _ = compare(values[0][name], values[1][name], None)
            if is_float(values[0][name].dtype) and deviation <= _ABOUT * size:
                found.add(name)
    return found


def part_of_both(
    models: tuple[Model, Model], agree: set[str], value: str, case: Case, provider: Provider
) -> tuple[list[onnx.ModelProto], Feeds, tuple[str, ...]]:
    """What makes ``value`` of the values before it on which both models agree.

    Returns:
        The part of each model, the first model's values at its border, and the sites in it.
    """
    frontier = {*case.feeds, *agree}
    inputs = [name for model in models for name in _inputs_of(model, frontier, value)]
    inner = [name for name in dict.fromkeys(inputs) if name not in case.feeds]
    wanted = with_outputs(models[0], [*inner, value])
    values = {**case.feeds, **open_model(wanted, provider).run(case.feeds)}
    parts = [cut(model, frontier, value, values)[0] for model in models]
    sites = tuple(site.name for site in _sites(Model(parts[0])))
    return parts, {name: values[name] for name in dict.fromkeys(inputs)}, sites


def _inputs_of(model: Model, frontier: set[str], value: str) -> list[str]:
    stand_in = np.zeros(1, np.float32)
    names: dict[str, Any] = dict.fromkeys([*frontier, value], stand_in)
    return cut(model, frontier, value, names)[1]


def _sites(model: Model) -> tuple[Site, ...]:
    return find_sites(model, Constants(model))[0]


def _common(first: Model, second: Model) -> list[str]:
    """The values that both models make of their inputs, in the order of the first."""
    names = set(varying(second.proto))
    return [name for name in varying(first.proto) if name in names]


def _side_by_side(
    annealed: Model, rewritten: Model, case: Case, provider: Provider
) -> Iterator[dict[str, tuple[NDArray[Any], NDArray[Any], NDArray[Any] | None]]]:
    """Both models' values, and the exact ones where they can be had, some at a time and in order."""
    names = _common(annealed, rewritten)
    for start in range(0, len(names), _AT_A_TIME):
        part: Sequence[str] = names[start : start + _AT_A_TIME]
        dense = with_outputs(annealed, part)
        first = open_model(dense, provider).run(case.feeds)
        second = open_model(with_outputs(rewritten, part), provider).run(case.feeds)
        opened = open_reference(dense)
        exact: Feeds = {}
        if isinstance(opened, Reference):
            try:
                exact = opened.run(case.feeds)
            except ModelError as error:
                logger.debug("bisecting without float64: %s", error)
        yield {name: (first[name], second[name], exact.get(name)) for name in part}


def _same_in_another_order(first: NDArray[Any], second: NDArray[Any]) -> bool:
    """Whether two values differ by nothing but the order of units, on the last axis or on axis 1."""
    if first.shape != second.shape or not first.ndim or not is_float(first.dtype):
        return False
    return any(
        np.allclose(
            np.sort(first.astype(np.float64), axis=axis),
            np.sort(second.astype(np.float64), axis=axis),
            rtol=1e-4,
            atol=1e-5 * float(np.abs(first.astype(np.float64)).max(initial=0.0)),
            equal_nan=True,
        )
        for axis in {first.ndim - 1, min(1, first.ndim - 1)}
    )
