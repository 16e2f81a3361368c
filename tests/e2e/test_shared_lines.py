"""A vocabulary whose unused tokens drifted together: computed once, in every mode that allows it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.e2e.planted import array_of, decomposition, save

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from tests.e2e.conftest import Command, Result

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("quick_bench")]

WIDTH, TOKENS = 48, 600
QUICK = ("--batch", "1", "--force", "--emit", "shared")


def language_model(embedding: NDArray[np.float32]) -> onnx.ModelProto:
    """ids -> embedding -> softmax over the same, transposed: input and output weight are one tensor."""
    nodes = [
        helper.make_node("Gather", ["embedding", "ids"], ["x"]),
        helper.make_node("Transpose", ["embedding"], ["head"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "head"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "language",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", "time"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "time", TOKENS])],
        [numpy_helper.from_array(embedding, "embedding")],
    )
    opsets = [helper.make_opsetid("", 17)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


class Case:
    """A language model of which some tokens were never seen."""

    def __init__(
        self, command: Command, folder: Path, unused: NDArray[np.intp], drift: float
    ) -> None:
        rng = np.random.default_rng(3)
        self.unused = unused
        self.embedding = rng.normal(0, 0.05, (TOKENS, WIDTH)).astype(np.float32)
        noise = rng.normal(0, drift, (unused.size, WIDTH))
        self.embedding[unused] = (rng.normal(0, 0.05, WIDTH) + noise).astype(np.float32)
        self.source = save(language_model(self.embedding), folder / "in.onnx")
        self.output = folder / "out.onnx"
        self._report = folder / "report.json"
        self._command = command

    def __call__(self, *options: object) -> Result:
        arguments = ("-o", self.output, "--report", self._report, *QUICK, *options)
        result = self._command("rewrite", self.source, *arguments)
        assert result.code == 0, result.err
        return result

    @property
    def report(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads(self._report.read_text("utf-8"))
        return content

    @property
    def rewritten(self) -> onnx.ModelProto:
        return onnx.load(self.output)

    @property
    def ops(self) -> list[str]:
        return [node.op_type for node in self.rewritten.graph.node]

    def validates(self) -> bool:
        return self._command("validate", self.source, self.output, "--samples", "2").code == 0


@pytest.fixture
def scattered() -> NDArray[np.intp]:
    rng = np.random.default_rng(5)
    return np.sort(rng.choice(TOKENS, TOKENS // 2, replace=False))


def test_tokens_that_drifted_together_are_computed_once(
    command: Command, tmp_path: Path, scattered: NDArray[np.intp]
) -> None:
    case = Case(command, tmp_path, scattered, drift=1e-6)
    assert case("--criterion", "shared").last_line.startswith("rewritten: ")
    assert case.ops == ["Gather", "MatMul", "ArrayFeatureExtractor"]
    # The embedding is read by token: it stays as it was, every row its own.
    np.testing.assert_array_equal(array_of(case.rewritten, "embedding"), case.embedding)
    (site,) = case.report["sites"]
    assert site["decision"] == "shared"
    assert site["blocks"] == [[WIDTH, TOKENS // 2 + 1]]
    claims = case.report["claims"]
    assert claims["structural"]["passed"] is True
    assert claims["structural"]["error"] < 1e-6
    assert 1e-7 < claims["annealing"]["error"] < 1e-4
    (blocks,) = decomposition(case.rewritten)["sites"].values()
    assert blocks["annealing"] == "refitted"
    assert case.validates()


def test_without_a_budget_only_bitwise_equal_ones_are(
    command: Command, tmp_path: Path, scattered: NDArray[np.intp]
) -> None:
    case = Case(command, tmp_path, scattered, drift=1e-6)
    case("--criterion", "shared", "--budget", "0")
    assert case.output.read_bytes() == case.source.read_bytes()
    assert case.report["summary"]["decomposable"] is False


def test_over_the_budget_nothing_is_merged(
    command: Command, tmp_path: Path, scattered: NDArray[np.intp]
) -> None:
    case = Case(command, tmp_path, scattered, drift=1e-3)
    case("--criterion", "shared", "--budget", "1e-4")
    assert case.output.read_bytes() == case.source.read_bytes()
    assert "at shared the relative L2 error would be" in case.report["summary"]["reason"]


@pytest.mark.parametrize("options", [(), ("--budget", "0"), ("--criterion", "shared")])
def test_an_equal_tail_is_found_in_every_mode(
    command: Command, tmp_path: Path, options: tuple[str, ...]
) -> None:
    case = Case(command, tmp_path, np.arange(TOKENS // 3, TOKENS), drift=0.0)
    assert case(*options).last_line.startswith("rewritten: ")
    assert case.ops == ["Gather", "MatMul", "Pad"]
    (blocks,) = decomposition(case.rewritten)["sites"].values()
    assert blocks["annealing"] == "exact"
    assert case.report["claims"]["annealing"]["error"] < 1e-6
    assert case.validates()


def test_a_changed_copy_is_no_proof(
    command: Command, tmp_path: Path, scattered: NDArray[np.intp]
) -> None:
    case = Case(command, tmp_path, scattered, drift=1e-6)
    case("--criterion", "shared")
    model = case.rewritten
    (stored,) = [t for t in model.graph.initializer if t.name.endswith(".different")]
    values = numpy_helper.to_array(stored).copy()
    values[0, 0] = np.nextafter(values[0, 0], np.float32(1))
    stored.CopyFrom(numpy_helper.from_array(values, stored.name))
    save(model, case.output)
    assert not case.validates()
