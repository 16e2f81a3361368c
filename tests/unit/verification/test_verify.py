"""The two claims on models small enough to work out by hand."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from onnx_decompose.errors import DataError, ModelError
from onnx_decompose.model.metadata import (
    Annealing,
    Block,
    Decomposition,
    Reordered,
    SiteBlocks,
    SlicedConstant,
    digest,
    read_decomposition,
    write_decomposition,
)
from onnx_decompose.model.model_io import Model
from onnx_decompose.model.tensors import graph_inputs
from onnx_decompose.passes.splice import ORIGIN_KEY
from onnx_decompose.runtime.cases import open_model as open_model_as_usual
from onnx_decompose.runtime.samples import samples_from_arrays
from onnx_decompose.runtime.sessions import Provider, Session, SessionSettings
from onnx_decompose.verification import equivalence
from onnx_decompose.verification.metrics import Metric
from onnx_decompose.verification.proof import prove_structure
from onnx_decompose.verification.reference import Reference, open_reference
from onnx_decompose.verification.verify import (
    AnnealingClaim,
    Inputs,
    StructuralClaim,
    Tolerance,
    Validation,
    measure_annealing,
    structural_claim,
    validate_models,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

WEIGHT = np.array(
    [[1, 2, 0, 0], [3, 4, 0, 0], [0, 0, 5, 6], [0, 0, 7, 8], [0, 0, 9, 10]], np.float32
)
FIRST, SECOND = (np.arange(2), np.arange(2)), (np.arange(2, 5), np.arange(2, 4))


def model(
    nodes: Sequence[onnx.NodeProto],
    weights: dict[str, np.ndarray[Any, Any]],
    dtype: type = np.float32,
) -> Model:
    """(n, 5) -> (n, 4)."""
    element = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", element, ["n", 5])],
        [helper.make_tensor_value_info("y", element, ["n", 4])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    opsets = [helper.make_opsetid("", 17)]
    return Model(helper.make_model(graph, opset_imports=opsets, ir_version=8))


def original(weight: np.ndarray[Any, Any] = WEIGHT, other: float = 1.0) -> Model:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], "product"),
        helper.make_node("Mul", ["h", "other"], ["y"], "scaled"),
    ]
    return model(nodes, {"w": weight, "other": np.array(other, np.float32)})


def rewritten(
    blocks: tuple[np.ndarray[Any, Any], ...] = (WEIGHT[:2, :2], WEIGHT[2:, 2:]),
    *,
    annealed: np.ndarray[Any, Any] = WEIGHT,
    annealing: Annealing = "exact",
    other: float = 1.0,
    units: tuple[Any, ...] = (FIRST, SECOND),
) -> Model:
    nodes = [
        helper.make_node("Split", ["x", "sizes"], ["x0", "x1"], "cut", axis=-1),
        helper.make_node("MatMul", ["x0", "w.0"], ["h0"], "product.0"),
        helper.make_node("MatMul", ["x1", "w.1"], ["h1"], "product.1"),
        helper.make_node("Concat", ["h0", "h1"], ["h"], "joined", axis=-1),
        helper.make_node("Mul", ["h", "other"], ["y"], "scaled"),
    ]
    made = model(
        nodes,
        {
            "sizes": np.array([2, 3], np.int64),
            "w.0": blocks[0],
            "w.1": blocks[1],
            "other": np.array(other, np.float32),
        },
    )
    site = SiteBlocks(
        "product",
        (5, 4),
        annealing,
        digest(annealed),
        tuple(Block(r, c, f"w.{n}", False) for n, (r, c) in enumerate(units)),
    )
    write_decomposition(made.proto, Decomposition(0.01, {"product": site}), "0")
    return made


def prove(before: Model, after: Model) -> str | None:
    decomposition = read_decomposition(after.proto, "after")
    assert decomposition is not None
    return prove_structure(before, after, decomposition)[0]


def claim(before: Model, after: Model, **options: Any) -> StructuralClaim:
    return structural_claim(
        before, after, inputs=Inputs(seeds=1), provider=Provider.CPU, **options
    )


def measure(before: Model, after: Model, budget: float, inputs: Inputs | None = None) -> Any:
    inputs = inputs or Inputs(seeds=1)
    return measure_annealing(before, after, inputs=inputs, provider=Provider.CPU, budget=budget)


class TestProof:
    def test_blocks_that_make_the_weight(self) -> None:
        before, after = original(), rewritten()
        decomposition = read_decomposition(after.proto, "after")
        assert decomposition is not None
        fault, weights, biases = prove_structure(before, after, decomposition)
        assert not biases
        assert fault is None
        assert weights == {}  # the annealed weight is the original's

    def test_blocks_without_some_entries_make_another_weight(self) -> None:
        removed = WEIGHT.copy()
        removed[3, 3] = 0
        after = rewritten(
            (WEIGHT[:2, :2], removed[2:, 2:]), annealed=removed, annealing="masked"
        )
        decomposition = read_decomposition(after.proto, "after")
        assert decomposition is not None
        fault, weights, _ = prove_structure(original(), after, decomposition)
        assert fault is None
        (weight,) = weights.values()
        np.testing.assert_array_equal(weight, removed)

    @pytest.mark.parametrize("change", [0.01, 1e-6, -1.0])
    def test_a_changed_entry_fails_the_digest(self, change: float) -> None:
        block = WEIGHT[2:, 2:].copy()
        block[1, 1] += np.float32(change)
        fault = prove(original(), rewritten((WEIGHT[:2, :2], block)))
        assert fault is not None
        assert "site 'product'" in fault

    def test_a_changed_entry_with_its_own_digest_is_not_the_original_s(self) -> None:
        """Whoever tampers with the weight can also make the digest fit."""
        weight = WEIGHT.copy()
        weight[3, 3] += np.float32(0.01)
        after = rewritten((WEIGHT[:2, :2], weight[2:, 2:]), annealed=weight)
        assert prove(original(), after) == (
            "site 'product': entry (3, 3) is neither the original's nor zero"
        )

    def test_removed_entries_are_allowed_where_entries_were_removed(self) -> None:
        weight = WEIGHT.copy()
        weight[3, 3] = 0
        blocks = (weight[:2, :2], weight[2:, 2:])
        assert prove(original(), rewritten(blocks, annealed=weight, annealing="masked")) is None

    def test_removed_entries_are_not_exact(self) -> None:
        """The metadata says that only exact zeros were removed, which is not so."""
        weight = WEIGHT.copy()
        weight[3, 3] = 0
        blocks = (weight[:2, :2], weight[2:, 2:])
        fault = prove(original(), rewritten(blocks, annealed=weight, annealing="exact"))
        assert fault is not None
        assert "(3, 3)" in fault

    def test_a_negative_zero_is_a_zero(self) -> None:
        weight = WEIGHT.copy()
        weight[0, 3] = -0.0
        assert prove(original(weight), rewritten()) is None

    def test_a_missing_block(self) -> None:
        after = rewritten()
        del after.proto.graph.initializer[1]
        assert "block 'w.0' is missing" in str(prove(original(), after))

    def test_a_block_of_another_type(self) -> None:
        after = rewritten((WEIGHT[:2, :2].astype(np.float64), WEIGHT[2:, 2:]))
        assert "block 'w.0' has another type" in str(prove(original(), after))

    def test_a_block_of_another_shape(self) -> None:
        after = rewritten((WEIGHT[:2, :3].copy(), WEIGHT[2:, 2:]))
        assert "block 'w.0' has another shape" in str(prove(original(), after))

    def test_units_that_overlap_hide_nothing(self) -> None:
        units = (FIRST, (np.array([0, 2, 3]), np.array([1, 2])))
        assert "holds entries that another block holds too" in str(
            prove(original(), rewritten(units=units))
        )

    def test_padding_that_is_not_zero(self) -> None:
        """A stack of unequal blocks is padded with zeros, and nothing else."""
        stack = np.zeros((2, 3, 2), np.float32)
        stack[0, :2], stack[1] = WEIGHT[:2, :2], WEIGHT[2:, 2:]
        for padding, told in ((0.0, None), (0.5, "block 'w.0' holds entries that are no part")):
            stack[0, 2, 1] = padding
            after = rewritten()
            decomposition = read_decomposition(after.proto, "after")
            assert decomposition is not None
            site = decomposition.sites["product"]
            parts = tuple(
                dataclasses.replace(
                    block, initializer="w.0", part=n, stored_rows=np.arange(block.rows.size)
                )
                for n, block in enumerate(site.blocks)
            )
            next(t for t in after.proto.graph.initializer if t.name == "w.0").CopyFrom(
                numpy_helper.from_array(stack, "w.0")
            )
            stacked = {"product": dataclasses.replace(site, blocks=parts)}
            fault = prove_structure(original(), after, Decomposition(0.01, stacked))[0]
            assert (fault is None) if told is None else (told in str(fault))

    def test_padding_of_a_convolution_that_is_not_zero(self) -> None:
        """Two groups of (3, 2) channels, of which the first one needs two rows."""
        kernel = np.zeros((4, 3, 1, 1), np.float32)
        kernel[:2, :2, 0, 0], kernel[2:, :, 0, 0] = WEIGHT[:2, :2].T, WEIGHT[2:, 2:].T
        for padding, told in ((0.0, None), (0.5, "block 'w.0' holds entries that are no part")):
            kernel[1, 2] = padding
            after = rewritten()
            decomposition = read_decomposition(after.proto, "after")
            assert decomposition is not None
            site = decomposition.sites["product"]
            parts = tuple(
                dataclasses.replace(
                    block,
                    initializer="w.0",
                    transposed=True,
                    stored_rows=np.arange(block.rows.size),
                    stored_columns=2 * n + np.arange(2),
                )
                for n, block in enumerate(site.blocks)
            )
            next(t for t in after.proto.graph.initializer if t.name == "w.0").CopyFrom(
                numpy_helper.from_array(kernel, "w.0")
            )
            grouped = {"product": dataclasses.replace(site, blocks=parts)}
            fault = prove_structure(original(), after, Decomposition(0.01, grouped))[0]
            assert (fault is None) if told is None else (told in str(fault))

    def test_a_tensor_that_was_not_rewritten(self) -> None:
        fault = prove(original(), rewritten(other=1.0000001))
        assert fault == "tensor 'other', which was not rewritten, is not the original's"

    def test_another_original(self) -> None:
        before = original()
        before.proto.graph.node[0].name = "something else"
        with pytest.raises(ModelError, match="has no site 'product' of shape"):
            prove(before, rewritten())


class TestClaimA:
    def test_holds(self) -> None:
        found = claim(original(), rewritten())
        assert found
        assert found.sites == 1
        assert found.cases >= 4
        assert found.error <= 1e-6
        assert "rebuilt bit for bit" in found.reason

    def test_a_fault_in_the_weights_is_found_without_running(self) -> None:
        found = claim(original(), rewritten((WEIGHT[:2, :2] + 1, WEIGHT[2:, 2:])))
        assert not found
        assert found.cases == 0
        assert math.isnan(found.error)

    def test_weights_that_are_right_in_a_graph_that_is_not(self) -> None:
        after = rewritten()
        concat = after.proto.graph.node[3]
        concat.input[:] = ["h1", "h0"]
        found = claim(original(), after)
        assert not found
        assert "output 'y' deviates" in found.reason
        assert found.cases > 0

    def test_a_tolerance_of_the_user_s(self) -> None:
        after = rewritten()
        node = after.proto.graph.node[4]
        node.op_type = "Add"
        assert not claim(original(), after)
        assert claim(original(), after, tolerance=Tolerance(rtol=1e9, atol=10.0))

    def test_it_says_what_it_was_compared_with(self) -> None:
        found = claim(original(), rewritten())
        assert found.reference == "onnxruntime in float64"
        assert found.annealed_error is not None
        assert found.rewritten_error is not None
        assert found.annealed_error < 1e-6
        assert found.repeatable is True
        assert found.tf32_error is None
        given = claim(original(), rewritten(), tolerance=Tolerance(1e-4))
        assert given.reference == "the tolerance that was given"

    def test_far_less_than_the_type_s_tolerance_is_caught(self) -> None:
        """A scale that is 2e-5 off: claim A's tolerance of float32 without a reference is 1e-4."""
        after = rewritten()
        after.proto.graph.initializer.append(
            numpy_helper.from_array(np.array(1 + 2e-5, np.float32), "another")
        )
        after.proto.graph.node[4].input[1] = "another"
        found = claim(original(), after)
        assert not found
        assert found.error < 1e-4
        assert found.failed_case is not None
        assert found.failed_case.label in found.reason

    def test_without_a_reference_the_type_decides(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(
            "onnx_decompose.verification.equivalence.open_reference", lambda _: "too large"
        )
        found = claim(original(), rewritten())
        assert found
        assert found.annealed_error is None
        assert found.reference.endswith("no float64 reference: too large")

    @pytest.mark.parametrize("seconds", [0.0, 100.0])
    def test_a_slow_reference_runs_a_few_times_or_once(
        self, monkeypatch: pytest.MonkeyPatch, seconds: float
    ) -> None:
        monkeypatch.setattr("onnx_decompose.verification.equivalence._MOST_SECONDS", 50.0)
        clock = itertools.count(0.0, seconds)
        monkeypatch.setattr("time.process_time", lambda: next(clock))
        opened = open_reference(original())
        assert isinstance(opened, Reference)
        slow = dataclasses.replace(opened, slow=True)
        monkeypatch.setattr(
            "onnx_decompose.verification.equivalence.open_reference", lambda _: slow
        )
        found = structural_claim(
            original(), rewritten(), inputs=Inputs(seeds=4), provider=Provider.CPU
        )
        assert found
        gave_up = found.reference.endswith("no float64 reference: 100 s a run")
        assert gave_up is (seconds > 0)

    def test_nan_of_one_sample_in_another(self) -> None:
        """The sum over all samples, times zero: nothing, but for what is not finite."""
        after = rewritten()
        graph = after.proto.graph
        graph.node[4].output[0] = "z"
        graph.initializer.append(numpy_helper.from_array(np.zeros(1, np.float32), "nothing"))
        graph.node.extend(
            [
                helper.make_node("ReduceSum", ["x"], ["sum"], "sum", keepdims=0),
                helper.make_node("Mul", ["sum", "nothing"], ["none"], "none"),
                helper.make_node("Add", ["z", "none"], ["y"], "last"),
            ]
        )
        found = claim(original(), after)
        assert not found
        assert found.reason.endswith(
            "; output 'y' is not finite in a sample where the annealed model's is "
            "on random inputs with NaN in the first sample"
        )

    def test_a_rewritten_model_that_does_not_run(self) -> None:
        after = rewritten()
        graph = after.proto.graph
        graph.initializer.append(numpy_helper.from_array(np.array([5, 4], np.int64), "shape"))
        graph.node[4].output[0] = "z"
        graph.node.append(helper.make_node("Reshape", ["z", "shape"], ["y"], "five rows"))
        found = claim(original(), after)
        assert not found
        assert "; does not run on random inputs 1 at n 1: " in found.reason

    def test_a_model_without_metadata(self) -> None:
        with pytest.raises(ModelError, match="only claim B can be checked"):
            claim(original(), original())

    def test_another_shape_of_the_output_fails(self) -> None:
        after = rewritten()
        after.proto.graph.node[3].input[:] = ["h0"]
        del after.proto.graph.output[0].type.tensor_type.shape.dim[:]
        assert not claim(original(), after)

    @staticmethod
    def wave(source: Model, factors: Sequence[float]) -> Model:
        """``source`` with y = sin(y * factors[0] * factors[1] ...): it makes much of the last bits of its inputs."""
        graph = source.proto.graph
        graph.node[-1].output[0] = "s0"
        for number, factor in enumerate(factors):
            graph.initializer.append(
                numpy_helper.from_array(np.array(factor, np.float32), f"f{factor}")
            )
            graph.node.append(
                helper.make_node(
                    "Mul", [f"s{number}", f"f{factor}"], [f"s{number + 1}"], f"times{number}"
                )
            )
        graph.node.append(helper.make_node("Sin", [f"s{len(factors)}"], ["y"], "sine"))
        return source

    def test_no_less_is_asked_than_the_last_bits_of_the_inputs_make(self) -> None:
        """sin(300 h) turns a rounding error of h into one 1e4 times as large, in whatever order h is added up."""
        before = self.wave(original(), [300.0])
        found = claim(before, self.wave(rewritten(), [3.0, 100.0]))
        assert found.error > Tolerance.for_dtype(np.dtype(np.float32)).rtol
        assert found

    def test_more_than_the_last_bits_still_fails(self) -> None:
        before = self.wave(original(), [300.0])
        found = claim(before, self.wave(rewritten(), [3.0, 100.01]))
        assert not found
        assert "random inputs 1" in found.reason

    def test_a_tolerance_of_the_user_s_is_kept_to_the_letter(self) -> None:
        before, after = self.wave(original(), [300.0]), self.wave(rewritten(), [3.0, 100.0])
        assert not claim(before, after, tolerance=Tolerance(1e-4))


class TestTolerance:
    @pytest.mark.parametrize(
        ("dtype", "rtol"), [(np.float64, 1e-10), (np.float32, 1e-4), (np.float16, 1e-2)]
    )
    def test_by_type(self, dtype: type, rtol: float) -> None:
        assert Tolerance.for_dtype(np.dtype(dtype)) == Tolerance(rtol)

    def test_integers_must_be_equal(self) -> None:
        assert Tolerance.for_dtype(np.dtype(np.int64)) == Tolerance(0.0)


class TestClaimB:
    def test_error_by_hand(self) -> None:
        """Every output is scaled by 1.001: a relative L2 error of 0.001."""
        found = measure(original(), original(other=1.001), 0.01)
        assert found.passed
        assert found.error == pytest.approx(0.001, rel=1e-3)
        assert found.measure == "relative L2 error"
        assert found.outputs["y"].cosine == pytest.approx(1.0)
        assert not measure(original(), original(other=1.001), 0.0009)

    def test_the_budget_itself_is_inside(self) -> None:
        error = measure(original(), original(other=1.5), 1.0).error
        assert measure(original(), original(other=1.5), error)

    def test_exact_only_allows_rounding_and_no_more(self) -> None:
        assert measure(original(), rewritten(), 0.0)
        assert not measure(original(), original(other=1.0001), 0.0)

    def test_the_worst_output_counts(self) -> None:
        models = [original(), original()]
        for number, one in enumerate(models):
            graph = one.proto.graph
            graph.initializer.append(
                numpy_helper.from_array(np.array(1.0 + number, np.float32), "factor")
            )
            graph.node.append(helper.make_node("Mul", ["h", "factor"], ["z"], "more"))
            graph.output.append(helper.make_tensor_value_info("z", 1, ["n", 4]))
        found = measure(models[0], models[1], 0.5)
        assert found.error == pytest.approx(1.0)
        assert found.outputs["y"].relative_l2 == 0.0
        assert not found

    def test_an_output_that_is_not_a_number_fails(self) -> None:
        found = measure(original(), original(other=float("inf")), 1e6)
        assert not found
        assert found.error == math.inf

    def test_real_data_alone_counts_where_there_is_any(self) -> None:
        """Inputs that never reach the changed entries: no error on them, whatever random ones say."""
        weight = WEIGHT.copy()
        weight[4] = 0
        x = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)
        x[:, 4] = 0
        samples = samples_from_arrays({"x": x}, graph_inputs(original().proto), source="d.npz")
        found = measure(original(), original(weight), 0.01, Inputs(samples, seeds=1))
        assert found.error == 0.0
        assert found.data == "d.npz (6 samples)"
        assert measure(original(), original(weight), 0.01).error > 0.1

    def test_large_and_tiny_inputs_are_not_typical(self) -> None:
        cases = list(Inputs(seeds=2).cases(original()))
        labels = [case.label for case in cases if not case.typical]
        assert labels == [
            "zeros inputs",
            "large inputs",
            "tiny inputs",
            "denormal inputs",
            "negative inputs",
            "random inputs with NaN in the first sample",
            "random inputs with infinity in the first sample",
        ]
        assert sum(case.typical for case in cases) == 6  # 2 draws at 3 batch sizes

    def test_the_seed_decides_the_inputs(self) -> None:
        def first(seed: int) -> Any:
            return next(Inputs(seeds=1, seed=seed).cases(original())).feeds["x"]

        np.testing.assert_array_equal(first(1), first(1))
        assert not np.array_equal(first(1), first(2))


class TestMetric:
    @pytest.fixture
    def inputs(self) -> Inputs:
        rng = np.random.default_rng(0)
        x = rng.normal(size=(300, 5)).astype(np.float32)
        arrays = {"x": x, "target": x @ WEIGHT}
        samples = samples_from_arrays(arrays, graph_inputs(original().proto))

        def negative_error(inputs: Any, outputs: Any) -> float:
            assert inputs["target"].shape == outputs["y"].shape == (300, 4)
            return -float(np.abs(outputs["y"] - inputs["target"]).max())

        return Inputs(samples, seeds=1, metric=Metric("m:negative_error", negative_error))

    def test_the_drop_is_measured_over_all_samples_at_once(self, inputs: Inputs) -> None:
        found = measure(original(), original(other=2.0), 0.5, inputs)
        assert inputs.samples is not None
        largest = float(np.abs(inputs.samples.extras["target"]).max())
        assert found.error == pytest.approx(largest, rel=1e-4)
        assert found.measure == "drop of the metric"
        assert not found

    def test_a_gain_is_no_error(self, inputs: Inputs) -> None:
        found = measure(original(other=2.0), original(), 0.0, inputs)
        assert found.error < 0
        assert found

    def test_a_metric_that_fails(self, inputs: Inputs) -> None:
        def fails(*_: Any) -> float:
            raise ZeroDivisionError("no rows")

        broken = dataclasses.replace(inputs, metric=Metric("m:fails", fails))
        with pytest.raises(DataError, match=r"m:fails.*ZeroDivisionError: no rows"):
            measure(original(), original(), 0.5, broken)


class TestValidation:
    HOLDS = StructuralClaim(True, "fine", 1, 9, 0.0)
    FAILS = StructuralClaim(False, "entry (0, 1)", 1, 0, math.nan)
    SMALL = AnnealingClaim(True, 0.001, 0.01, "d.npz", "relative L2 error", {})
    LARGE = AnnealingClaim(False, 0.5, 0.01, "d.npz", "relative L2 error", {})

    def test_both_must_hold(self) -> None:
        assert Validation(self.HOLDS, self.SMALL)
        assert Validation(None, self.SMALL)
        assert not Validation(self.FAILS, self.SMALL)
        assert not Validation(self.HOLDS, self.LARGE)
        assert not Validation(None, self.LARGE)

    def test_the_failure_names_every_claim_that_does_not_hold(self) -> None:
        assert Validation(self.HOLDS, self.SMALL).failure == ""
        told = Validation(self.FAILS, self.LARGE).failure
        assert told == (
            "claim A does not hold: entry (0, 1); claim B does not hold: relative L2 error 0.5 "
            "against a budget of 0.01 on d.npz"
        )

    def test_the_budget_is_the_one_it_was_accepted_with(self) -> None:
        found = validate_models(
            original(), rewritten(), inputs=Inputs(seeds=1), provider=Provider.CPU
        )
        assert found
        assert found.annealing.budget == 0.01
        stricter = validate_models(
            original(),
            rewritten(),
            inputs=Inputs(seeds=1),
            provider=Provider.CPU,
            budget=1e-5,
        )
        assert stricter.annealing.budget == 1e-5

    def test_without_metadata_claim_a_is_not_judged(self) -> None:
        found = validate_models(
            original(), original(other=1.001), inputs=Inputs(seeds=1), provider=Provider.CPU
        )
        assert found.structural is None
        assert found

    @pytest.mark.parametrize("what", ["input", "output"])
    def test_models_with_another_interface_are_refused(self, what: str) -> None:
        other = rewritten()
        value = getattr(other.proto.graph, what)[0]
        for node in other.proto.graph.node:
            node.input[:] = ["renamed" if n == value.name else n for n in node.input]
            node.output[:] = ["renamed" if n == value.name else n for n in node.output]
        value.name = "renamed"
        with pytest.raises(ModelError, match=f"its {what}s are not those of"):
            validate_models(original(), other, inputs=Inputs(seeds=1), provider=Provider.CPU)


class TestReordered:
    """A constant whose units are in another order holds the original's entries."""

    def prove(self, values: list[float], **changes: Any) -> str | None:
        before = model(
            [helper.make_node("Mul", ["x", "scale"], ["y"], "scaled")],
            {"scale": np.arange(5, dtype=np.float32)},
        )
        after = model(
            [helper.make_node("Mul", ["x", "scale.new"], ["y"], "scaled")],
            {"scale.new": np.array(values, np.float32)},
        )
        fields = {"source": "scale", "axes": {-1: np.array([2, 0, 1, 4, 3])}, **changes}
        decomposition = Decomposition(0.01, {}, {"scale.new": Reordered(**fields)})
        write_decomposition(after.proto, decomposition, "0")
        return prove(before, after)

    def test_the_same_entries(self) -> None:
        assert self.prove([2, 0, 1, 4, 3]) is None

    @pytest.mark.parametrize("values", [[0, 1, 2, 3, 4], [2, 0, 1, 4, 3.0001], [2, 0, 1, 4]])
    def test_other_entries(self, values: list[float]) -> None:
        assert self.prove(values) == (
            "constant 'scale': its reordered form 'scale.new' is not the original's"
        )

    def test_a_constant_that_is_not_there(self) -> None:
        assert "constant 'scales' or" in str(self.prove([2, 0, 1, 4, 3], source="scales"))

    def test_an_axis_that_is_not_there(self) -> None:
        axes = {-2: np.arange(5)}
        assert "has no axis -2 of size 5" in str(self.prove([2, 0, 1, 4, 3], axes=axes))

    def test_an_order_that_leaves_units_out_is_refused(self) -> None:
        with pytest.raises(ModelError, match="leaves some out"):
            self.prove([2, 0], axes={-1: np.array([2, 0])})


class TestSliced:
    """What rewritten operators read of a per-unit constant are the original's entries."""

    BLOCKS = (
        Block(np.array([0]), np.array([2, 0]), "scale.0", False),
        Block(
            np.array([0]), np.array([1, 3, 4]), "scale.1", False, 0, None, np.array([1, 2, 3])
        ),
    )

    def prove(
        self,
        first: list[float],
        second: list[float],
        shape: tuple[int, int] = (1, 5),
        name: str = "scale",
        scale: list[float] = [0, 1, 2, 3, 4],  # noqa: B006 (read only)
    ) -> str | None:
        before = model(
            [helper.make_node("Mul", ["x", "scale"], ["y"], "scaled")],
            {"scale": np.array(scale, np.float32)},
        )
        after = model(
            [helper.make_node("Mul", ["x", "scale.0"], ["y"], "scaled")],
            {"scale.0": np.array(first, np.float32), "scale.1": np.array([second], np.float32)},
        )
        constants = {name: SlicedConstant(shape, self.BLOCKS)}
        write_decomposition(after.proto, Decomposition(0.01, {}, constants=constants), "0")
        return prove(before, after)

    def test_the_same_entries(self) -> None:
        assert self.prove([2, 0], [7, 1, 3, 4]) is None

    def test_one_number_for_all_units(self) -> None:
        assert self.prove([9, 9], [7, 9, 9, 9], scale=[9]) is None
        assert "is not the original's" in str(self.prove([9, 9], [7, 9, 8, 9], scale=[9]))

    @pytest.mark.parametrize(
        ("first", "second", "part"),
        [
            ([2, 0.001], [7, 1, 3, 4], 0),
            ([2, 0], [7, 1, 4, 3], 1),
            ([2, -0.0], [7, 1, 3, 4], 0),
        ],
    )
    def test_other_entries(self, first: list[float], second: list[float], part: int) -> None:
        reason = f"constant 'scale': its part 'scale.{part}' is not the original's"
        assert self.prove(first, second) == reason

    def test_a_part_of_another_size(self) -> None:
        assert "constant 'scale': part " in str(self.prove([2, 0, 1], [7, 1, 3, 4]))

    def test_a_constant_of_another_shape(self) -> None:
        assert self.prove([2, 0], [7, 1, 3, 4], (1, 6)) == "constant 'scale' has another shape"

    def test_a_constant_that_is_not_there(self) -> None:
        assert "'other' is missing" in str(self.prove([2, 0], [7, 1, 3, 4], name="other"))


class TestNodes:
    """What was not rewritten, and copies of what was, have the original's operators and attributes."""

    def prove(self, node: onnx.NodeProto, origin: str | None = None) -> str | None:
        before = model([helper.make_node("LeakyRelu", ["x"], ["y"], "leaky", alpha=0.1)], {})
        after = model([node], {})
        if origin is not None:
            after.proto.graph.node[0].metadata_props.add(key=ORIGIN_KEY, value=origin)
        write_decomposition(after.proto, Decomposition(0.01, {}), "0")
        return prove(before, after)

    @pytest.mark.parametrize("origin", [None, "leaky"])
    def test_the_same(self, origin: str | None) -> None:
        node = helper.make_node("LeakyRelu", ["x"], ["y"], "copy", alpha=0.1)
        assert self.prove(node, origin) is None

    @pytest.mark.parametrize("origin", [None, "leaky"])
    def test_another_attribute(self, origin: str | None) -> None:
        node = helper.make_node("LeakyRelu", ["x"], ["y"], "copy", alpha=0.1001)
        assert "other attributes" in str(self.prove(node, origin))

    @pytest.mark.parametrize("origin", [None, "leaky"])
    def test_another_operator(self, origin: str | None) -> None:
        node = helper.make_node("Relu", ["x"], ["y"], "copy")
        expected = "node 'copy' is Relu, and 'leaky' of the original LeakyRelu"
        assert self.prove(node, origin) == expected


class TestCancelling:
    """Where terms cancel, what is left is the rounding of the terms."""

    def claim(self, less: float) -> StructuralClaim:
        tenth = np.float32(0.1)

        def shifted(minus: np.float32) -> Model:
            nodes = [
                helper.make_node("Add", ["x", "plus"], ["s"]),
                helper.make_node("Sub", ["s", "minus"], ["y"]),
            ]
            found = model(nodes, {"plus": np.array(tenth), "minus": np.array(minus)})
            found.proto.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 5
            return found

        before, after = shifted(tenth), shifted(np.float32(tenth - less))
        after.proto.graph.initializer[1].name = "other"
        after.proto.graph.node[1].input[1] = "other"
        write_decomposition(after.proto, Decomposition(0.01, {}), "0")
        return claim(before, after)

    def test_the_last_bit_of_an_output_s_usual_size_is_allowed_where_it_is_zero(self) -> None:
        found = self.claim(1e-8)
        assert found.error > 0
        assert found

    def test_more_is_not(self) -> None:
        found = self.claim(1e-5)
        assert not found
        assert "output 'y' deviates" in found.reason


class TestOnCuda:
    """The gate's logic for CUDA, with sessions that run on the CPU."""

    @pytest.fixture
    def opened(self, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Provider, SessionSettings]]:
        asked: list[tuple[Provider, SessionSettings]] = []
        on_cpu = open_model_as_usual

        def open_model(
            source: Model,
            provider: Provider,
            *,
            large: bool | None = None,
            settings: SessionSettings,
        ) -> Session:
            asked.append((provider, settings))
            return on_cpu(source, Provider.CPU, large=large, settings=settings)

        monkeypatch.setattr(equivalence, "open_model", open_model)
        return asked

    def test_tf32_is_off_in_the_gate_and_reported_beside_it(
        self, opened: list[tuple[Provider, SessionSettings]]
    ) -> None:
        found = structural_claim(
            original(), rewritten(), inputs=Inputs(seeds=1), provider=Provider.CUDA
        )
        assert found
        assert found.tf32_error is not None
        assert {provider for provider, _ in opened} == {Provider.CUDA}
        assert [settings.tf32 for _, settings in opened] == [False, False, True]
        assert [settings.deterministic for _, settings in opened] == [True, True, False]

    def test_tf32_decides_nothing(
        self,
        opened: list[tuple[Provider, SessionSettings]],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        del opened
        monkeypatch.setattr(equivalence, "_relative", lambda *_: 1e-3)
        found = structural_claim(
            original(), rewritten(), inputs=Inputs(seeds=1), provider=Provider.CUDA
        )
        assert found
        assert found.tf32_error == 1e-3

    def test_the_cpu_has_no_tf32(self, opened: list[tuple[Provider, SessionSettings]]) -> None:
        assert claim(original(), rewritten()).tf32_error is None
        assert [settings.tf32 for _, settings in opened] == [False, False]

    def test_runs_that_differ_are_told(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(equivalence, "_same_bytes", lambda *_: False)
        assert claim(original(), rewritten()).repeatable is False
