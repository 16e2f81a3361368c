"""Which gates are found, who reads them, and what becomes of weights and biases around them."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper

from onnx_decompose.graph.biases import find_biases
from onnx_decompose.graph.gates import Gate, find_gates, reading_sites, with_slopes
from onnx_decompose.graph.sites import find_sites
from onnx_decompose.model.constants import Constants
from onnx_decompose.model.model_io import Model

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from onnx_decompose.graph.biases import Bias
    from onnx_decompose.graph.sites import Site

GATE = "t = Mul(z, b) q = Sigmoid(t) r = Mul(z, q)"
CHAIN = f"h = MatMul(x, w1) z = Add(h, b1) {GATE} y = MatMul(r, w2)"


@dataclasses.dataclass(frozen=True)
class Found:
    """A graph, its sites, and what is behind them."""

    graph: onnx.GraphProto
    sites: dict[str, Site]
    constants: Constants
    places: dict[str, Bias]

    @property
    def gates(self) -> dict[str, Gate]:
        return find_gates(self.graph, self.sites.values(), self.constants, self.places)

    def readers(self, name: str) -> list[str]:
        sites = self.sites.values()
        reading = reading_sites(self.graph, self.gates[name], self.sites[name], sites)
        return [site.name for site in reading]


def find(body: str, slope: Any = (2.0, -0.5, 1.0), dtype: Any = np.float32) -> Found:
    kind = onnx.TensorProto.DataType.Name(
        onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    ).lower()
    proto = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["": 17]> g ({kind}[B, 2] x) => ({kind}[B, 2] y) {{{body}}}'
    )
    tensors: dict[str, NDArray[Any]] = {
        "w1": np.arange(1, 7).reshape(2, 3),
        "w2": np.ones((3, 2)),
        "w3": np.ones((3, 2)),
        "b1": np.array([1, 2, 3]),
        "b": np.asarray(slope),
    }
    for name, values in tensors.items():
        proto.graph.initializer.append(numpy_helper.from_array(values.astype(dtype), name))
    model = Model(proto)
    constants = Constants(model)
    sites = {site.name: site for site in find_sites(model, constants)[0]}
    places = find_biases(proto.graph, sites.values(), constants)
    return Found(proto.graph, sites, constants, places)


def test_a_gate() -> None:
    gate = find(CHAIN).gates["h"]
    assert (gate.value, gate.scaling, gate.sigmoid, gate.output) == ("z", 2, 3, "r")
    np.testing.assert_array_equal(gate.slope, [2.0, -0.5, 1.0])


def test_one_slope_for_all() -> None:
    np.testing.assert_array_equal(find(CHAIN, 1.5).gates["h"].slope, [1.5, 1.5, 1.5])


def test_the_slope_goes_in_and_its_inverse_behind() -> None:
    found = find(CHAIN)
    places = with_slopes(
        found.graph, found.sites.values(), found.constants, found.places, {"h"}
    )
    first, second = places["h"], places["y"]
    np.testing.assert_array_equal(
        first.scaled(found.constants.array("w1")), [[2, -1, 3], [8, -2.5, 6]]
    )
    np.testing.assert_array_equal(first.stored(0.0), [2, -1, 3])
    np.testing.assert_array_equal(
        second.scaled(found.constants.array("w2")), [[0.5, 0.5], [-2, -2], [1, 1]]
    )


def test_no_slope_is_taken_in_that_is_not_asked_for() -> None:
    found = find(CHAIN)
    places = with_slopes(found.graph, found.sites.values(), found.constants, found.places, ())
    assert places == found.places


@pytest.mark.parametrize(
    ("dtype", "last", "fits"),
    [
        (np.float64, 2.0**-127, True),
        (np.float32, 2.0**-15, True),
        (np.float32, 2.0**-16, False),
        (np.float32, -(2.0**15), True),
        (np.float32, -(2.0**16), False),
        (np.float16, 0.3, True),
        (np.float16, 0.25, False),
        (ml_dtypes.bfloat16, 2.0**-15, True),
        (np.float32, 0.0, False),
        (np.float32, np.inf, False),
        (np.float32, np.nan, False),
    ],
)
def test_slopes_that_leave_the_range(dtype: Any, last: float, fits: bool) -> None:
    assert bool(find(CHAIN, (1.0, 1.0, last), dtype).gates) == fits


@pytest.mark.parametrize(
    "body",
    [
        CHAIN.replace("Mul(z, b)", "Div(z, b)"),
        CHAIN.replace("Sigmoid", "HardSigmoid"),
        CHAIN.replace("Mul(z, q)", "Mul(t, q)"),  # of t, which is u: no slope is left
        CHAIN.replace("Mul(z, q)", "Mul(q, q)"),
        CHAIN.replace("Mul(z, b)", "Mul(z, z)"),
        CHAIN.replace("MatMul(x, w1)", "Gemm <beta = 0.0> (x, w1, b1)"),
        CHAIN.replace("z = Add(h, b1)", "z = Relu(h)"),
        CHAIN.replace("y =", "k = Neg(t) y ="),
    ],
)
def test_no_gate(body: str) -> None:
    assert find(body).gates == {}


def test_a_slope_with_more_axes_than_the_value() -> None:
    """The rank of what a MatMul makes is not known; a bias tells that there are as many axes as it has."""
    slope = np.array([[2.0, -0.5, 1.0]])
    assert find(CHAIN, slope).gates == {}
    gemm = CHAIN.replace("h = MatMul(x, w1) z = Add(h, b1)", "z = Gemm(x, w1, b1)")
    assert list(find(gemm, slope).gates) == ["z"]
    assert find(gemm, slope[None]).gates == {}


@pytest.mark.parametrize(
    ("after", "readers"),
    [
        ("y = MatMul(r, w2)", ["y"]),
        ("a = MatMul(r, w2) c = Gemm(r, w3) y = Add(a, c)", ["a", "c"]),
        ("m = Mul(r, b1) n = Neg(m) d = Div(n, b1) i = Identity(d) y = MatMul(i, w2)", ["y"]),
        ("a = MatMul(r, w2) m = Mul(b1, r) c = MatMul(m, w3) y = Add(a, c)", ["a", "c"]),
        ("a = Relu(r) y = MatMul(a, w2)", []),
        ("a = Div(b1, r) y = MatMul(a, w2)", []),
        ("a = Mul(r, r) y = MatMul(a, w2)", []),
        ("a = Mul(r, b1) c = Mul(r, a) y = MatMul(c, w2)", []),
        ("a = MatMul(r, w2) c = ReduceSum(r) y = Add(a, c)", []),
        ("e = Add(r, b1) y = MatMul(e, w2)", []),
        ("e = Mul(r, b1) y = MatMul(x, w1)", []),
    ],
)
def test_who_reads_it(after: str, readers: list[str]) -> None:
    found = find(CHAIN.replace("y = MatMul(r, w2)", after))
    assert sorted(found.readers("h")) == readers


def test_who_reads_it_as_a_graph_output() -> None:
    found = find(CHAIN)
    found.graph.output.add().name = "r"
    assert found.readers("h") == []
