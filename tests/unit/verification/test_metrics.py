from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, Any, SupportsFloat

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnx_decompose.errors import ClaimError, DataError, OptionError
from onnx_decompose.model.tensors import BFLOAT16
from onnx_decompose.verification.metrics import (
    Deviation,
    DeviationAccumulator,
    Metric,
    MetricDrops,
    load_metric,
)

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import ArrayLike, DTypeLike, NDArray


def deviation(
    reference: ArrayLike, other: ArrayLike, dtype: DTypeLike = np.float32
) -> Deviation:
    accumulator = DeviationAccumulator()
    accumulator.update(np.asarray(reference, dtype), np.asarray(other, dtype))
    return accumulator.result()


class TestFloats:
    def test_every_figure(self) -> None:
        found = deviation([[3.0, 4.0], [0.0, 1.0]], [[3.0, 5.0], [2.0, 1.0]])
        assert found.elements == 4
        assert found.max_abs == 2.0
        assert found.mean_abs == 0.75
        assert found.relative_l2 == pytest.approx(math.sqrt(5 / 26))
        assert found.cosine == pytest.approx(30 / math.sqrt(26 * 39))
        assert found.sqnr_db == pytest.approx(10 * math.log10(26 / 5))
        assert found.top1_agreement == 0.5
        assert found.mismatch_share == 0.5
        assert found.non_finite == 0

    def test_equal_outputs(self) -> None:
        found = deviation([1.0, -2.0], [1.0, -2.0])
        assert (found.max_abs, found.relative_l2, found.mismatch_share) == (0.0, 0.0, 0.0)
        assert found.cosine == pytest.approx(1.0)
        assert found.sqnr_db == math.inf
        assert found.top1_agreement is None

    @given(
        values=st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=20),
        cut=st.integers(0, 20),
        seed=st.integers(0, 9),
    )
    def test_batches_add_up_to_the_whole(
        self, values: list[float], cut: int, seed: int
    ) -> None:
        reference = np.array(values)
        other = reference + np.random.default_rng(seed).standard_normal(len(values))
        streamed = DeviationAccumulator()
        for part in (slice(0, cut), slice(cut, None)):
            streamed.update(reference[part], other[part])
        whole = deviation(reference, other, np.float64)
        found = streamed.result()
        assert found.elements == whole.elements
        assert found.max_abs == whole.max_abs
        assert found.relative_l2 == pytest.approx(whole.relative_l2)
        assert found.cosine == pytest.approx(whole.cosine)

    def test_differences_of_close_large_values_are_not_lost_in_float32(self) -> None:
        reference = np.full(10**6, 1e4, np.float32)
        other = reference.copy()
        other[0] += 1.0
        assert deviation(reference, other).relative_l2 == pytest.approx(1e-7)

    @pytest.mark.parametrize("dtype", [np.float16, BFLOAT16])
    def test_half_types(self, dtype: DTypeLike) -> None:
        found = deviation([[1.0, 2.0]], [[1.0, 3.0]], dtype)
        assert found.max_abs == 1.0
        assert found.top1_agreement == 1.0

    def test_zero_reference(self) -> None:
        assert deviation([0.0, 0.0], [0.0, 0.0]).relative_l2 == 0.0
        assert deviation([0.0, 0.0], [0.0, 0.0]).cosine == 1.0
        assert deviation([0.0, 0.0], [0.0, 1.0]).relative_l2 == math.inf
        assert deviation([0.0, 0.0], [0.0, 1.0]).cosine == 0.0

    def test_nothing_compared(self) -> None:
        assert DeviationAccumulator().result().relative_l2 == 0.0
        assert deviation(np.zeros((0, 3)), np.zeros((0, 3))).elements == 0


class TestNonFinite:
    def test_the_same_non_finite_values_agree(self) -> None:
        values = [math.nan, math.inf, -math.inf, 2.0]
        found = deviation(values, values)
        assert (found.max_abs, found.relative_l2, found.non_finite) == (0.0, 0.0, 0)

    @pytest.mark.parametrize(
        ("reference", "other"),
        [(1.0, math.nan), (math.nan, 1.0), (math.inf, -math.inf), (math.inf, math.nan)],
    )
    def test_others_are_an_infinite_error(self, reference: float, other: float) -> None:
        found = deviation([reference, 1.0], [other, 1.0])
        assert found.max_abs == found.mean_abs == found.relative_l2 == math.inf
        assert found.sqnr_db == -math.inf
        assert found.non_finite == 1
        assert found.mismatch_share == 0.5

    def test_a_later_good_batch_does_not_hide_it(self) -> None:
        accumulator = DeviationAccumulator()
        accumulator.update(np.array([1.0]), np.array([math.nan]))
        accumulator.update(np.array([1.0]), np.array([1.0]))
        assert accumulator.result().relative_l2 == math.inf


class TestDiscrete:
    @pytest.mark.parametrize("dtype", [np.int64, np.bool_, object])
    def test_the_error_is_the_share_of_unequal_elements(self, dtype: DTypeLike) -> None:
        found = deviation([0, 1, 1, 0], [0, 1, 0, 0], dtype)
        assert found.relative_l2 == found.mismatch_share == found.mean_abs == 0.25
        assert found.max_abs == 1.0
        assert found.top1_agreement is None
        assert deviation([1, 2], [1, 2], dtype).relative_l2 == 0.0


@pytest.mark.parametrize(
    "other", [np.zeros((2, 3), np.float32), np.zeros((3,), np.float32), np.zeros(2, np.float64)]
)
def test_other_shapes_and_types_are_no_versions_of_one_output(other: NDArray[Any]) -> None:
    with pytest.raises(ClaimError, match=r"where the reference is float32\[2\]"):
        DeviationAccumulator().update(np.zeros(2, np.float32), other)


class TestMetric:
    def test_gets_inputs_and_outputs(self) -> None:
        metric = Metric("m:f", lambda inputs, outputs: (inputs["y"] == outputs["z"]).mean())
        assert metric({"y": np.array([1, 2])}, {"z": np.array([1, 3])}) == 0.5

    @pytest.mark.parametrize("value", [math.nan, math.inf, None, "0.5", np.ones(2), [1.0]])
    def test_what_is_no_finite_number_is_refused(self, value: object) -> None:
        with pytest.raises(DataError, match=r"metric m:f: gave .*; return one finite number"):
            Metric("m:f", lambda _inputs, _outputs: value)({}, {})

    @pytest.mark.parametrize("value", [1, True, np.float32(0.5), np.array(2.0)])
    def test_scalars_of_any_kind_are_numbers(self, value: SupportsFloat) -> None:
        assert Metric("m:f", lambda _inputs, _outputs: value)({}, {}) == float(value)

    def test_its_errors_name_it_and_what_it_got(self) -> None:
        metric = Metric("m:f", lambda inputs, _outputs: inputs["label"].mean())
        expected = r"^metric m:f: failed with KeyError: 'label'; .*inputs \['x'\].*\['y'\]$"
        with pytest.raises(DataError, match=expected):
            metric({"x": np.ones(1)}, {"y": np.ones(1)})


class TestLoadMetric:
    @pytest.fixture(autouse=True)
    def folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.chdir(tmp_path)
        monkeypatch.syspath_prepend(tmp_path)  # also forgets the folder afterwards
        return tmp_path

    def test_from_the_current_folder(self, folder: Path) -> None:
        (folder / "metric_found.py").write_text("def one(inputs, outputs):\n    return 1\n")
        metric = load_metric("metric_found:one")
        assert metric.name == "metric_found:one"
        assert metric({}, {}) == 1.0

    @pytest.mark.parametrize("name", ["metric", "metric:", ":function", ""])
    def test_not_of_the_form(self, name: str) -> None:
        with pytest.raises(OptionError, match="give module:function"):
            load_metric(name)

    def test_no_such_module(self) -> None:
        with pytest.raises(OptionError, match=r"cannot import metric_absent .*No module named"):
            load_metric("metric_absent:one")

    def test_a_module_that_fails(self, folder: Path) -> None:
        (folder / "metric_failing.py").write_text("raise ValueError('no\\nway')\n")
        with pytest.raises(OptionError, match=r"cannot import metric_failing \(no\)$"):
            load_metric("metric_failing:one")

    def test_no_such_function_and_not_a_function(self) -> None:
        with pytest.raises(OptionError, match="module math has no nothing"):
            load_metric("math:nothing")
        with pytest.raises(OptionError, match="pi is a float; name a function"):
            load_metric("math:pi")


def test_a_metric_of_several_numbers_has_names() -> None:
    metric = Metric("m:f", lambda _inputs, _outputs: {"first": np.float32(0.5), "second": 1})
    assert metric.values({}, {}) == {"first": 0.5, "second": 1.0}
    assert metric({}, {}) == 0.75


@pytest.mark.parametrize("value", [{}, {"first": float("nan")}, {"first": "much"}])
def test_several_numbers_must_be_numbers(value: object) -> None:
    with pytest.raises(DataError, match="one finite number, or several by name"):
        Metric("m:f", lambda _inputs, _outputs: value).values({}, {})


class TestOneValuePerSample:
    """An array with a value for every sample is their mean, and batches are enough to tell it."""

    METRIC = Metric("m:f", lambda inputs, outputs: -np.abs(inputs["x"] - outputs["y"]))
    ROWS = np.arange(5.0)

    def drops(self, *batches: slice, metric: Metric = METRIC) -> dict[str, float]:
        parts = []
        for batch in batches:
            part = MetricDrops(metric)
            x = self.ROWS[batch]
            part.update({"x": x}, {"y": x}, {"y": x + x**2})
            parts.append(part)
        return MetricDrops.joined(metric, parts).result()

    def test_its_mean_is_the_metric(self) -> None:
        assert self.METRIC({"x": np.array([1.0, 2.0])}, {"y": np.zeros(2)}) == -1.5

    def test_in_any_batches(self) -> None:
        expected = {"": (self.ROWS**2).mean()}
        for batches in ([slice(None)], [slice(0, 3), slice(3, 5)], [slice(0, 4), slice(4, 5)]):
            assert self.drops(*batches) == pytest.approx(expected)

    def test_outputs_are_not_kept(self) -> None:
        drops = MetricDrops(self.METRIC)
        outputs = np.ones(3)
        drops.update({"x": np.ones(3)}, {"y": outputs}, {"y": outputs})
        assert sys.getrefcount(outputs) == 2

    def test_any_other_sees_all_samples_at_once(self) -> None:
        worst = Metric("m:f", lambda inputs, outputs: -(inputs["x"] - outputs["y"]).max())

        def all_five(inputs: Any, outputs: Any) -> float:
            assert len(inputs["x"]) == 5
            return float(worst(inputs, outputs))

        batches = slice(0, 3), slice(3, 5)
        assert self.drops(*batches, metric=worst) == {"": 0.0}
        assert self.drops(*batches, metric=Metric("m:f", all_five)) == {"": 0.0}

    def test_several_by_name(self) -> None:
        metric = Metric("m:f", lambda i, o: {"a": i["x"], "b": 3 * i["x"] - o["y"]})
        assert self.drops(slice(0, 2), slice(2, 5), metric=metric) == {"a": 0.0, "b": 6.0}

    @pytest.mark.parametrize(
        "value", [np.ones(4), np.full(5, np.nan), np.ones((5, 1)), [1.0] * 5]
    )
    def test_other_arrays_are_no_values(self, value: object) -> None:
        with pytest.raises(DataError, match="return one finite number"):
            self.drops(slice(None), metric=Metric("m:f", lambda *_: value))

    def test_sometimes_is_refused(self) -> None:
        def sometimes(inputs: Any, _: Any) -> object:
            return inputs["x"] if inputs["x"][0] == 0 else 1.0

        drops = MetricDrops(Metric("m:f", sometimes))
        for x in (np.zeros(2), np.ones(2)):
            if x[0]:
                with pytest.raises(DataError, match="always do, or never"):
                    drops.update({"x": x}, {}, {})
            else:
                drops.update({"x": x}, {}, {})


def test_joined_accumulators_are_one_over_everything(rng: np.random.Generator) -> None:
    reference = rng.normal(size=(30, 4)).astype(np.float32)
    other = (reference + 0.5 * rng.normal(size=(30, 4))).astype(np.float32)
    other[3, 2] = np.nan
    whole, parts = DeviationAccumulator(), [DeviationAccumulator() for _ in range(3)]
    whole.update(reference, other)
    for number, part in enumerate(parts):
        part.update(reference[number::3], other[number::3])
    joined, expected = DeviationAccumulator.joined(parts).result(), whole.result()
    assert joined.elements == expected.elements
    assert joined.non_finite == expected.non_finite == 1
    assert joined.max_abs == expected.max_abs == np.inf
    assert joined.top1_agreement == expected.top1_agreement
    finite = [DeviationAccumulator() for _ in range(2)]
    for part, rows in zip(finite, (slice(3), slice(4, 30)), strict=True):
        part.update(reference[rows], other[rows])
    both = DeviationAccumulator.joined(finite).result()
    rest = np.delete(np.arange(30), 3)
    error = np.linalg.norm((other - reference)[rest]) / np.linalg.norm(reference[rest])
    assert both.relative_l2 == pytest.approx(float(error), rel=1e-6)
