from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnx_decompose.errors import DataError
from onnx_decompose.model.tensors import BFLOAT16, TensorSpec
from onnx_decompose.runtime.samples import load_inputs, samples_from_arrays

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

FLOAT = np.dtype(np.float32)
X = TensorSpec("x", FLOAT, ("N", 3))
FIXED = TensorSpec("x", FLOAT, (1, 3))
STATE = TensorSpec("h", FLOAT, (2, "N", 4))


def rows(count: int) -> NDArray[Any]:
    return np.arange(count * 3, dtype=np.float32).reshape(count, 3)


class TestLayouts:
    def test_dynamic_first_axis_is_cut_into_batches_with_its_extras(self) -> None:
        samples = samples_from_arrays({"x": rows(5), "label": np.arange(5)}, [X])
        assert len(samples) == 5
        assert samples.batchable
        batches = list(samples.batches(2))
        assert [feeds["x"].shape[0] for feeds, _ in batches] == [2, 2, 1]
        np.testing.assert_array_equal(np.concatenate([f["x"] for f, _ in batches]), rows(5))
        np.testing.assert_array_equal(
            np.concatenate([extras["label"] for _, extras in batches]), np.arange(5)
        )
        assert set(batches[0][0]) == {"x"}

    def test_fixed_batch_of_one_takes_a_row_at_a_time(self) -> None:
        samples = samples_from_arrays({"x": rows(3), "label": np.arange(3)}, [FIXED])
        assert not samples.batchable
        batches = list(samples.batches(16))
        assert [feeds["x"].tolist() for feeds, _ in batches] == [[r] for r in rows(3).tolist()]
        assert [extras["label"].tolist() for _, extras in batches] == [[0], [1], [2]]

    def test_an_input_without_axes_stays_an_array(self) -> None:
        flag = TensorSpec("flag", np.dtype(np.bool_), ())
        samples = samples_from_arrays({"flag": np.array([True, False])}, [flag])
        found = [feeds["flag"] for feeds, _ in samples.batches(4)]
        assert {type(one) for one in found} == {np.ndarray}
        assert [bool(one) for one in found] == [True, False]

    def test_fixed_batch_of_four_takes_four_rows_and_their_labels(self) -> None:
        spec = TensorSpec("x", FLOAT, (4, 3))
        samples = samples_from_arrays({"x": rows(8), "label": np.arange(8)}, [spec])
        assert [e["label"].tolist() for _, e in samples.batches(1)] == [
            [0, 1, 2, 3],
            [4, 5, 6, 7],
        ]

    def test_one_array_of_the_fixed_shape_goes_with_every_batch(self) -> None:
        table = TensorSpec("table", FLOAT, (2, 3))
        samples = samples_from_arrays({"x": rows(4), "table": rows(2)}, [X, table])
        assert len(samples) == 4
        for feeds, _ in samples.batches(2):
            np.testing.assert_array_equal(feeds["table"], rows(2))

    def test_one_more_axis_stacks_whole_inputs(self) -> None:
        state = np.arange(5 * 2 * 4, dtype=np.float32).reshape(5, 2, 1, 4)
        samples = samples_from_arrays({"x": rows(5), "h": state}, [X, STATE])
        feeds = [feeds for feeds, _ in samples.batches(3)]
        assert len(feeds) == 5
        np.testing.assert_array_equal(feeds[3]["h"], state[3])
        np.testing.assert_array_equal(feeds[3]["x"], rows(5)[3:4])

    def test_scalars_and_unknown_ranks(self) -> None:
        rate = TensorSpec("rate", np.dtype(np.int64), ())
        loose = TensorSpec("loose", FLOAT, None)
        arrays = {"rate": np.array(16000), "loose": np.ones((4, 2, 2), np.float32)}
        samples = samples_from_arrays(arrays, [rate, loose])
        feeds, _ = next(iter(samples.batches(3)))
        assert feeds["rate"] == 16000
        assert feeds["loose"].shape == (3, 2, 2)

    def test_scalar_extras_are_not_cut(self) -> None:
        samples = samples_from_arrays({"x": rows(4), "threshold": np.array(0.5)}, [X])
        assert [extras["threshold"] for _, extras in samples.batches(2)] == [0.5, 0.5]


class TestSplit:
    def test_parts_are_disjoint_complete_and_keep_rows_together(self) -> None:
        samples = samples_from_arrays({"x": rows(10), "label": np.arange(10)}, [X])
        first, second = samples.split(np.random.default_rng(0), 0.7)
        assert (len(first), len(second)) == (7, 3)
        labels = np.concatenate([first.extras["label"], second.extras["label"]])
        assert sorted(labels) == list(range(10))
        for part in (first, second):
            np.testing.assert_array_equal(part.rows["x"], rows(10)[part.extras["label"]])

    @given(count=st.integers(2, 9), share=st.floats(0, 1), seed=st.integers(0, 99))
    def test_both_parts_hold_something(self, count: int, share: float, seed: int) -> None:
        samples = samples_from_arrays({"x": rows(count)}, [X])
        first, second = samples.split(np.random.default_rng(seed), share)
        assert len(first) + len(second) == count
        assert min(len(first), len(second)) >= 1

    def test_fixed_batches_stay_whole(self) -> None:
        spec = TensorSpec("x", FLOAT, (2, 3))
        samples = samples_from_arrays({"x": rows(8)}, [spec])
        first, _ = samples.split(np.random.default_rng(0), 0.5)
        for feeds, _ in first.batches(1):
            assert feeds["x"][1, 0] == feeds["x"][0, 0] + 3

    def test_one_sample_cannot_be_split(self) -> None:
        samples = samples_from_arrays({"x": rows(1)}, [X])
        with pytest.raises(DataError, match="holds one sample; at least 2"):
            samples.split(np.random.default_rng(0), 0.5)


def test_conversions_are_done_and_told(caplog: pytest.LogCaptureFixture) -> None:
    specs = [
        X,
        TensorSpec("i", np.dtype(np.int32), ("N",)),
        TensorSpec("image", FLOAT, ("N", 2)),
        TensorSpec("h", BFLOAT16, ("N",)),
        TensorSpec("s", np.dtype(object), ("N",)),
    ]
    arrays = {
        "x": rows(2).astype(">f8"),
        "i": np.array([1, 2], np.int64),
        "image": np.array([[0, 255], [1, 2]], np.uint8),
        "h": np.array([1.5, 2.0], BFLOAT16).view("V2"),
        "s": np.array(["a", "bc"]),
    }
    with caplog.at_level(logging.INFO, "onnx_decompose.runtime.samples"):
        samples = samples_from_arrays(arrays, specs, source="f.npz")
    assert [samples.rows[spec.name].dtype for spec in specs] == [spec.dtype for spec in specs]
    assert samples.rows["h"].tolist() == [1.5, 2.0]
    assert samples.rows["image"].tolist() == [[0, 255], [1, 2]]
    assert "f.npz: array 'i': converted from int64 to int32" in caplog.text


@pytest.mark.parametrize(
    ("arrays", "specs", "message"),
    [
        ({"y": rows(2)}, [X], "no array for the model's input 'x'; it holds 'y'"),
        ({}, [X], "it holds nothing"),
        (
            {"x": rows(2)[:, :2]},
            [X],
            r"array 'x' has shape \(2, 2\); the model wants .*N, 3",
        ),
        ({"x": rows(2).ravel()}, [X], r"array 'x' has shape \(6,\)"),
        ({"x": np.ones((2, 3, 1))}, [X], r"array 'x' has shape \(2, 3, 1\)"),
        ({"x": rows(0)}, [X], "array 'x' is empty"),
        ({"x": rows(2) * np.nan}, [X], "array 'x' holds 6 NaN or infinite values"),
        ({"x": np.full((2, 3), 1e300)}, [X], "holds 6 NaN or infinite values in float32"),
        ({"x": np.ones((2, 3), np.int64)}, [X], "array 'x' is int64; the model wants float32"),
        ({"x": rows(2), "label": np.arange(3)}, [X], "array 'label' has 3 rows, not 2"),
        (
            {"x": rows(2), "z": rows(3)},
            [X, TensorSpec("z", FLOAT, ("M", 3))],
            "array 'x' has 2 rows, not 3|array 'z' has 3 rows, not 2",
        ),
        (
            {"x": rows(3)},
            [TensorSpec("x", FLOAT, (2, 3))],
            "array 'x' has 3 rows; the model wants a multiple of 2",
        ),
        (
            {"x": rows(4), "z": np.ones((3, 2, 3))},
            [FIXED, TensorSpec("z", FLOAT, (2, 3))],
            r"different numbers of samples \('x' 4, 'z' 3\)",
        ),
        (
            {"x": rows(4), "h": np.ones((2, 4, 4))},
            [X, STATE],
            "array 'h' has the batch on an inner axis",
        ),
        (
            {"i": np.array([300])},
            [TensorSpec("i", np.dtype(np.uint8), ("N",))],
            "array 'i' holds 300, which does not fit the model's uint8",
        ),
        (
            {"i": np.array([-1])},
            [TensorSpec("i", np.dtype(np.uint8), ("N",))],
            "array 'i' holds -1, which does not fit",
        ),
    ],
)
def test_arrays_that_do_not_fit(
    arrays: dict[str, NDArray[Any]], specs: list[TensorSpec], message: str
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        samples_from_arrays(arrays, specs, source="f.npz")
    assert str(caught.value).startswith("f.npz: ")
    assert "\n" not in str(caught.value)


class TestFiles:
    def test_npz(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "inputs.npz", x=rows(3), label=np.arange(3))
        samples = load_inputs(tmp_path / "inputs.npz", [X])
        assert samples.source == str(tmp_path / "inputs.npz")
        np.testing.assert_array_equal(samples.rows["x"], rows(3))
        assert samples.extras["label"].tolist() == [0, 1, 2]

    def test_bfloat16_survives_the_file(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "inputs.npz", x=rows(2).astype(BFLOAT16))
        samples = load_inputs(tmp_path / "inputs.npz", [TensorSpec("x", BFLOAT16, ("N", 3))])
        assert (samples.rows["x"] == rows(2).astype(BFLOAT16)).all()

    def test_directory_of_npz_joins_rows_by_file_name(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "b.npz", x=rows(5)[3:])
        np.savez(tmp_path / "a.npz", x=rows(5)[:3])
        np.testing.assert_array_equal(load_inputs(tmp_path, [X]).rows["x"], rows(5))

    def test_directory_of_npz_with_scalars(self, tmp_path: Path) -> None:
        for index in range(2):
            np.savez(tmp_path / f"{index}.npz", x=rows(1), rate=np.float32(index))
        samples = load_inputs(tmp_path, [X, TensorSpec("rate", FLOAT, ())])
        assert [feeds["rate"] for feeds, _ in samples.batches(9)] == [0, 1]

    def test_directory_of_npy_names_inputs_by_file(self, tmp_path: Path) -> None:
        np.save(tmp_path / "x.npy", rows(3))
        np.save(tmp_path / "label.npy", np.arange(3))
        samples = load_inputs(tmp_path, [X])
        assert set(samples.rows) == {"x"}
        assert set(samples.extras) == {"label"}

    def test_missing_and_mixed(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"none\.npz: no such file or directory"):
            load_inputs(tmp_path / "none.npz", [X])
        with pytest.raises(DataError, match=r"holds no \.npz or \.npy file"):
            load_inputs(tmp_path, [X])
        np.save(tmp_path / "x.npy", rows(3))
        np.savez(tmp_path / "x.npz", x=rows(3))
        with pytest.raises(DataError, match=r"holds both \.npz and \.npy"):
            load_inputs(tmp_path, [X])

    def test_files_that_disagree(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "a.npz", x=rows(3))
        np.savez(tmp_path / "b.npz", x=rows(3)[:, :2])
        with pytest.raises(DataError, match=r"array 'x' has shapes that cannot be joined"):
            load_inputs(tmp_path, [X])
        np.savez(tmp_path / "b.npz", y=rows(3))
        with pytest.raises(DataError, match=r"b\.npz: holds the arrays \['y'\]"):
            load_inputs(tmp_path, [X])

    @pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04 truncated"])
    def test_unreadable(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "inputs.npz").write_bytes(content)
        with pytest.raises(DataError, match=r"inputs\.npz: is not a readable numpy file"):
            load_inputs(tmp_path / "inputs.npz", [X])

    def test_truncated_archive(self, tmp_path: Path) -> None:
        file = tmp_path / "inputs.npz"
        np.savez_compressed(file, x=rows(3000))
        content = bytearray(file.read_bytes())
        content[200:400] = bytes(200)
        file.write_bytes(content)
        with pytest.raises(DataError, match=r"inputs\.npz: is not a readable numpy file"):
            load_inputs(file, [X])

    def test_pickles_are_refused(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "inputs.npz", x=np.array([{}], object))
        with pytest.raises(DataError, match=r"inputs\.npz: holds an array of Python objects"):
            load_inputs(tmp_path / "inputs.npz", [X])

    def test_single_array_under_the_wrong_name(self, tmp_path: Path) -> None:
        with (tmp_path / "inputs.npz").open("wb") as stream:
            np.save(stream, rows(3))
        with pytest.raises(DataError, match=r"is a single array; save it with numpy\.savez"):
            load_inputs(tmp_path / "inputs.npz", [X])
        with (tmp_path / "x.npy").open("wb") as stream:
            np.savez(stream, x=rows(3))
        (tmp_path / "inputs.npz").unlink()
        with pytest.raises(DataError, match=r"x\.npy: holds several arrays; name it \.npz"):
            load_inputs(tmp_path, [X])
