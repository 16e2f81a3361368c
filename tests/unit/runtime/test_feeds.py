from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import pytest

from onnx_decompose.errors import DataError, OptionError
from onnx_decompose.model.tensors import BFLOAT16, TensorSpec
from onnx_decompose.runtime.feeds import (
    Feeds,
    batch_dims,
    check_axes,
    dim_symbols,
    index_limits,
    other_dims,
    random_feeds,
    resized,
    size_settings,
    special_feeds,
)

FLOAT = np.dtype(np.float32)


def spec(
    name: str, *shape: int | str | None, dtype: np.dtype[np.generic] | type[np.generic] = FLOAT
) -> TensorSpec:
    return TensorSpec(name, np.dtype(dtype), shape)


class TestRandomFeeds:
    def test_shapes_and_dtypes_by_symbol(self, rng: np.random.Generator) -> None:
        specs = [
            spec("x", "N", 3),
            spec("h", "N", None, dtype=BFLOAT16),
            spec("ids", "N", "T", dtype=np.int64),
            spec("mask", "T", dtype=np.bool_),
            spec("s", dtype=np.float16),
        ]
        feeds = random_feeds(specs, rng=rng, dims={"N": 2, "T": 50, "h.1": 4})
        shapes = {name: array.shape for name, array in feeds.items()}
        assert shapes == {"x": (2, 3), "h": (2, 4), "ids": (2, 50), "mask": (50,), "s": ()}
        assert all(feeds[one.name].dtype == one.dtype for one in specs)
        assert set(feeds["ids"].ravel()) == {0, 1}
        assert set(feeds["mask"]) == {False, True}

    def test_floats_have_the_scale_asked(self, rng: np.random.Generator) -> None:
        drawn = random_feeds([spec("x", 40000)], rng=rng, dims={}, scale=3.0)["x"]
        assert abs(drawn.std() - 3.0) < 0.05
        assert abs(drawn.mean()) < 0.06

    def test_integer_limits_are_half_open(self, rng: np.random.Generator) -> None:
        ids = [spec("ids", 500, dtype=np.int32)]
        drawn = random_feeds(ids, rng=rng, dims={}, limits={"ids": (5, 8)})["ids"]
        assert set(drawn) == {5, 6, 7}

    def test_the_generator_decides(self) -> None:
        first, second, third = (
            random_feeds([spec("x", 4)], rng=np.random.default_rng(seed), dims={})["x"]
            for seed in (1, 1, 2)
        )
        assert (first == second).all()
        assert (first != third).any()

    @pytest.mark.parametrize(
        ("one", "message"),
        [
            (spec("x", "N"), "input 'x': no size is given for its axis 'N'"),
            (TensorSpec("x", FLOAT, None), "input 'x' has no known rank; give real inputs"),
            (TensorSpec("x", np.dtype(object), (2,)), "input 'x': values of type object"),
        ],
    )
    def test_what_cannot_be_made_up(
        self, rng: np.random.Generator, one: TensorSpec, message: str
    ) -> None:
        with pytest.raises(DataError, match=message):
            random_feeds([one], rng=rng, dims={})


class TestSpecialFeeds:
    def test_extremes(self, rng: np.random.Generator) -> None:
        specs = [
            spec("x", 1000),
            spec("i", 50, dtype=np.int64),
            spec("b", 50, dtype=np.bool_),
        ]
        made = special_feeds(specs, rng=rng, dims={}, limits={"i": (3, 9)})
        assert list(made) == ["zeros", "large", "tiny", "denormal", "negative"]
        assert 0 < np.abs(made["denormal"]["x"]).max() < np.finfo(np.float32).tiny
        assert made["negative"]["x"].max() <= 0 < np.abs(made["negative"]["x"]).max()
        assert not made["zeros"]["x"].any()
        assert not made["zeros"]["b"].any()
        assert set(made["zeros"]["i"]) == {3}
        assert made["large"]["x"].std() > 900
        assert 0 < made["tiny"]["x"].std() < 2e-5
        assert made["large"]["i"].max() > 3

    @pytest.mark.parametrize("dtype", [np.dtype(np.float16), BFLOAT16, np.dtype(np.float64)])
    def test_products_neither_overflow_nor_vanish(
        self, rng: np.random.Generator, dtype: np.dtype[np.generic]
    ) -> None:
        made = special_feeds([spec("x", 200, dtype=dtype)], rng=rng, dims={})
        assert np.isfinite(made["large"]["x"] ** 2).all()
        tiny = made["tiny"]["x"]
        typical = np.sort(np.abs(tiny))[100:]
        assert (typical**2 > 0).all()


class TestBatchDims:
    def test_the_name_says_so(self) -> None:
        assert batch_dims([spec("x", "time", "batch_size", 8), spec("s", 2, "batch_size")]) == (
            "batch_size",
        )

    def test_first_axis_otherwise(self) -> None:
        assert batch_dims([spec("x", "N", 8)]) == ("N",)

    def test_a_symbol_of_inner_axes_is_no_batch_if_another_is(self) -> None:
        assert batch_dims([spec("x", "B", "T"), spec("positions", "T")]) == ("B",)

    def test_a_symbol_of_inner_axes_is_the_batch_if_no_other_is(self) -> None:
        assert batch_dims([spec("x", "N", 3), spec("h", 2, "N", 4)]) == ("N",)

    def test_unnamed_first_axes_are_all_the_batch(self) -> None:
        assert batch_dims([spec("x", None, 3), spec("y", None, 4)]) == ("x.0", "y.0")

    def test_fixed_batch(self) -> None:
        assert batch_dims([spec("x", 1, "T")]) == ()


class TestSizeSettings:
    def test_every_dynamic_axis_takes_every_size(self) -> None:
        specs = [spec("image", "N", 3, "H", "W"), spec("mask", "N", "H")]
        settings = size_settings(specs, batch=(1, 5, 7), other=(32, 64))
        assert {one["N"] for one in settings} == {1, 5, 7}
        assert {one["H"] for one in settings} == {32, 64}
        assert all(one["H"] != one["W"] for one in settings)
        assert set(settings[0]) == set(dim_symbols(specs))

    def test_two_sizes_by_default(self) -> None:
        for sizes in zip(
            *(s.values() for s in size_settings([spec("x", "N", "T")])), strict=True
        ):
            assert len(set(sizes)) == 2

    def test_given_sizes_win(self) -> None:
        settings = size_settings([spec("x", "N", "T")], given={"T": (8,)})
        assert [one["T"] for one in settings] == [8, 8]

    def test_fixed_model(self) -> None:
        assert size_settings([spec("x", 1, 3)]) == [{}]


class TestIndexLimits:
    def parse(self, text: str) -> onnx.ModelProto:
        return onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 18]> {text}')

    def test_rows_of_the_smallest_table_through_casts(self) -> None:
        model = self.parse(
            "g (int32[N] ids, int64[N] free) => (float[N, 2] y, float[1, N] z, int64[N] u)"
            "<float[3, 2] a = {1, 2, 3, 4, 5, 6}, float[1, 4] b = {1, 2, 3, 4}>"
            "{ i = Cast<to = 7>(ids) y = Gather(a, i) z = Gather<axis = 1>(b, i) "
            "u = Neg(free) }"
        )
        assert index_limits(model) == {"ids": (0, 3)}

    def test_tables_in_integers_are_dequantized(self) -> None:
        model = self.parse(
            "g (int64[N] i) => (float[N, 2] y) <int8[3, 2] t = {1, 2, 3, 4, 5, 6}, float s = {0.5}> "
            "{ d = DequantizeLinear(t, s) y = Gather(d, i) }"
        )
        assert index_limits(model) == {"i": (0, 3)}

    def test_tables_in_constant_nodes(self) -> None:
        model = self.parse(
            "g (int64[N] i) => (float[N] y) "
            "{ t = Constant<value = float[3] {1, 2, 3}>() y = Gather(t, i) }"
        )
        assert index_limits(model) == {"i": (0, 3)}

    def test_lookups_in_a_body(self) -> None:
        model = self.parse(
            "g (int64[N] i, bool b) => (float[N, 2] y) <float[3, 2] t = {1, 2, 3, 4, 5, 6}> { y = If (b) <"
            "then_branch = th () => (float[N, 2] p) { p = Gather(t, i) },"
            "else_branch = el () => (float[N, 2] q) { n = Identity(i) q = Gather(t, n) }> }"
        )
        assert index_limits(model) == {"i": (0, 3)}

    def test_tables_that_are_not_constant_say_nothing(self) -> None:
        model = self.parse(
            "g (int64[N] i, float[M, 2] a) => (float[N, 2] y) { y = Gather(a, i) }"
        )
        assert index_limits(model) == {}


class TestSizesOfAxes:
    SPECS = (spec("x", "N", "T"), spec("y", "N", 2, "T"))

    def feeds(self) -> Feeds:
        return {"x": np.arange(8.0).reshape(2, 4), "y": np.arange(16.0).reshape(2, 2, 4)}

    def test_all_but_the_batch_are_told(self) -> None:
        assert other_dims(self.SPECS, self.feeds()) == {"T": 4}

    def test_axes_are_cut_or_begun_again(self) -> None:
        cut = resized(self.SPECS, self.feeds(), {"T": 1})
        assert cut["x"].tolist() == [[0], [4]]
        assert cut["y"].shape == (2, 2, 1)
        longer = resized(self.SPECS, self.feeds(), {"T": 6})
        assert longer["x"][0].tolist() == [0, 1, 2, 3, 0, 1]

    def test_only_axes_that_are_there(self) -> None:
        check_axes(self.SPECS, ["T"])
        for name in ("N", "time"):
            with pytest.raises(OptionError, match=r"but the batch are 'T'"):
                check_axes(self.SPECS, [name])
        with pytest.raises(OptionError, match=r"but the batch are none"):
            check_axes([spec("x", "N", 3)], ["T"])
