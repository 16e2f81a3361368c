"""Outputs side by side: what rounding explains and what it does not."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pytest

from onnx_decompose.model.model_io import Model
from onnx_decompose.model.tensors import TensorSpec, graph_inputs
from onnx_decompose.runtime.cases import Case
from onnx_decompose.runtime.samples import samples_from_arrays
from onnx_decompose.runtime.sessions import Provider
from onnx_decompose.verification import equivalence
from onnx_decompose.verification.claims import Inputs
from onnx_decompose.verification.equivalence import _spread, measure_structural
from onnx_decompose.verification.reference import Reference, open_reference
from onnx_decompose.verification.rounding import CONVICTING
from tests.passes.harness import parse

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from onnx_decompose.runtime.feeds import Feeds

IN_ORDER = "s = Add(a, b) t = Add(s, c) z = Add(t, d)"
OTHERWISE = "s = Add(a, c) t = Add(s, d) z = Add(t, b)"
WRONG = "s = Add(a, b) t = Add(s, c) q = Add(t, d) z = Mul(q, factor)"


def model(terms: str) -> Model:
    """A sum of four inputs through a sigmoid."""
    text = f"""g (float[B] a, float[B] b, float[B] c, float[B] d) => (float[B] y) {{
        {terms} y = Sigmoid(z)
    }}"""
    given = {"factor": np.asarray(1 + 1e-3, np.float32)} if "factor" in terms else {}
    return Model(parse(text, given))


def inputs(**values: float) -> Inputs:
    arrays = {name: np.array([value], np.float32) for name, value in values.items()}
    return Inputs(samples_from_arrays(arrays, graph_inputs(model(IN_ORDER).proto)))


def test_a_single_entry_that_is_right_by_luck_convicts_nobody() -> None:
    """Large terms that nearly cancel: in one order every sum is exact, in the other one is half a last bit off."""
    bit = 2.0**-13  # of numbers from 1024 to 2048
    lucky = inputs(a=1700.25 + bit, b=900.25 + bit, c=2500.5 + 2 * bit, d=-5101)
    found = measure_structural(
        model(IN_ORDER), model(OTHERWISE), inputs=lucky, provider=Provider.CPU
    )
    assert found, found.reason
    assert found.rewritten_error is not None
    other = measure_structural(
        model(OTHERWISE), model(IN_ORDER), inputs=lucky, provider=Provider.CPU
    )
    assert other, other.reason


def test_a_fault_gains_nothing_by_it() -> None:
    mild = inputs(a=0.5, b=0.25, c=-0.125, d=1.0)
    found = measure_structural(
        model(IN_ORDER), model(WRONG), inputs=mild, provider=Provider.CPU
    )
    assert not found
    assert "deviates" in found.reason


FORWARDS, BACKWARDS = (0, 1, 2, 3, 4, 5, 6, 7), (4, 5, 6, 7, 0, 1, 2, 3)


def chain(order: tuple[int, ...]) -> str:
    """Nodes that add up x in this order, and a fault that its first entry makes."""
    names = [f"x{number}" for number in range(8)]
    lines = [f"{', '.join(names)} = Split<axis=1>(x)", f"s0 = Identity(x{order[0]})"]
    for number, place in enumerate(order[1:]):
        lines.append(f"s{number + 1} = Add(s{number}, x{place})")
    return " ".join([*lines, "off = Mul(x0, fault)"])


def a_sum(order: tuple[int, ...], fault: float = 0.0) -> Model:
    """The sum of eight numbers, one after the other, and ``fault`` times the first of them."""
    text = f"g (float[B, 8] x) => (float[B, 1] y) {{ {chain(order)} y = Add(s7, off) }}"
    return Model(parse(text, {"fault": np.asarray(fault, np.float32)}))


def nearly_nothing() -> NDArray[np.float32]:
    """(1, 8) numbers of about 1000 whose sum is 0.3.

    Found among 6,000: backwards the sum is off by 1.6e-4, forwards by 9e-6, and by less than 2e-5 a last bit beside. A
    little further, both are off by as much.
    """
    x = np.random.default_rng(790).standard_normal(8) * 1000
    x[7] = 0.3 - x[:7].sum()
    return x.astype(np.float32)[None]


def test_an_error_that_is_large_by_luck_convicts_nobody() -> None:
    x = nearly_nothing()
    given = Inputs(samples_from_arrays({"x": x}, graph_inputs(a_sum(FORWARDS).proto)))
    found = measure_structural(
        a_sum(FORWARDS), a_sum(BACKWARDS), inputs=given, provider=Provider.CPU
    )
    assert found, found.reason
    # What it was suspected for.
    assert found.error > 1e-4


def test_a_fault_of_the_same_size_is_convicted() -> None:
    x = nearly_nothing()
    given = Inputs(samples_from_arrays({"x": x}, graph_inputs(a_sum(FORWARDS).proto)))
    wrong = a_sum(
        FORWARDS, fault=1.6e-4 / float(x[0, 0])
    )  # under the last bit of random inputs
    found = measure_structural(a_sum(FORWARDS), wrong, inputs=given, provider=Provider.CPU)
    assert not found
    assert "batch 1" in found.reason


def test_whole_numbers_are_not_moved_and_acquit_nobody() -> None:
    """The same luck, in numbers that may count something: the bound alone decides."""
    x = nearly_nothing() * 2.0**26
    assert np.array_equal(x, np.rint(x))
    given = Inputs(samples_from_arrays({"x": x}, graph_inputs(a_sum(FORWARDS).proto)))
    assert not measure_structural(
        a_sum(FORWARDS), a_sum(BACKWARDS), inputs=given, provider=Provider.CPU
    )


@pytest.mark.parametrize("fault", [0.0, 3e-2])
def test_luck_where_inputs_are_nothing(fault: float) -> None:
    """Biases alone make the output, and one sum of them is unlucky: zeros are moved, too, and tell it from a fault."""
    biases = nearly_nothing()
    models = []
    for order, wrong in ((FORWARDS, 0.0), (BACKWARDS, fault)):
        text = f"""g (float[B, 8] small) => (float[B, 1] y) {{
            x = Add(small, biases) {chain(order)} y = Add(s7, off)
        }}"""
        given = {"biases": biases, "fault": np.asarray(wrong / biases[0, 0], np.float32)}
        models.append(Model(parse(text, given)))
    found = measure_structural(*models, inputs=Inputs(), provider=Provider.CPU)
    assert bool(found) is (not fault), found.reason


def test_a_slow_reference_still_answers_for_a_suspect(monkeypatch: pytest.MonkeyPatch) -> None:
    """After one run that took too long it is only asked beside, where an output is suspected."""
    monkeypatch.setattr(equivalence, "_MOST_SECONDS", -1.0)
    opened = open_reference(a_sum(FORWARDS))
    assert isinstance(opened, Reference)
    slow = dataclasses.replace(opened, slow=True)
    monkeypatch.setattr(equivalence, "open_reference", lambda _: slow)
    wrong = a_sum(FORWARDS, fault=1e-3)
    runs = 0
    plain = Reference.run

    def counted(self: Reference, feeds: Feeds) -> Feeds:
        nonlocal runs
        runs += 1
        return plain(self, feeds)

    monkeypatch.setattr(Reference, "run", counted)
    right = measure_structural(
        a_sum(FORWARDS), a_sum(FORWARDS), inputs=Inputs(), provider=Provider.CPU
    )
    assert right
    assert runs == 1
    assert not measure_structural(
        a_sum(FORWARDS), wrong, inputs=Inputs(), provider=Provider.CPU
    )
    assert runs == 1 + 1 + CONVICTING


@pytest.mark.parametrize("coupled", [False, True])
def test_what_is_not_finite_reaches_samples_that_stand_alone(coupled: bool) -> None:
    """Samples that hang on the first one (their largest entry decides about all) may differ with it."""
    x = np.arange(6, dtype=np.float32).reshape(3, 2)
    x[0, 0] = np.inf

    class Dense:
        outputs = (TensorSpec("y", np.dtype(np.float32), ("n", 2)),)

        @staticmethod
        def run(feeds: dict[str, Any]) -> dict[str, Any]:
            given = feeds["x"]
            return {"y": given + np.minimum(given.max(), 9.0) if coupled else given}

    case = Case("poisoned", {"x": x}, poison=("n",))
    expected = Dense.run(case.feeds)
    got = {"y": np.where([[False], [False], [True]], np.nan, expected["y"])}
    found = _spread(case, cast("Any", Dense()), expected, got)
    assert (found is None) is coupled
