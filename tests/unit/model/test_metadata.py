from __future__ import annotations

import dataclasses
import json
from typing import Any, get_args

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from onnx_decompose.errors import ModelError
from onnx_decompose.model.metadata import (
    DECOMPOSITION_KEY,
    FORMAT,
    VERSION_KEY,
    Annealing,
    Block,
    Decomposition,
    FoldedBias,
    SiteBlocks,
    digest,
    parse_units,
    read_decomposition,
    units_text,
    write_decomposition,
)


def units(size: int) -> st.SearchStrategy[Any]:
    return hnp.arrays(np.bool_, size).map(np.flatnonzero)


@st.composite
def decompositions(draw: st.DrawFn) -> Decomposition:
    sites = {}
    for name in draw(st.sets(st.text(min_size=1), max_size=3)):
        shape = draw(st.tuples(st.integers(1, 20), st.integers(1, 20)))
        blocks = tuple(
            Block(
                draw(units(shape[0])),
                draw(units(shape[1])),
                draw(st.text()),
                draw(st.booleans()),
            )
            for _ in range(draw(st.integers(0, 3)))
        )
        annealing = draw(st.sampled_from(get_args(Annealing)))
        sites[name] = SiteBlocks(name, shape, annealing, "0" * 64, blocks)
    return Decomposition(draw(st.floats(0, 1)), sites)


def plain(decomposition: Decomposition) -> Any:
    return decomposition.budget, {
        name: (
            site.site,
            site.shape,
            site.annealing,
            site.sha256,
            [
                (b.rows.tolist(), b.columns.tolist(), b.initializer, b.transposed)
                for b in site.blocks
            ],
        )
        for name, site in decomposition.sites.items()
    }


@settings(max_examples=30)
@given(decompositions())
def test_round_trip_through_a_serialized_model(decomposition: Decomposition) -> None:
    proto = onnx.ModelProto()
    write_decomposition(proto, decomposition, "1.2.3")
    stored = onnx.ModelProto.FromString(proto.SerializeToString())
    found = read_decomposition(stored, "m")
    assert found is not None
    assert plain(found) == plain(decomposition)


@given(units(300))
def test_units_round_trip(numbers: Any) -> None:
    np.testing.assert_array_equal(parse_units(units_text(numbers), 300), numbers, strict=True)


def test_runs_are_written_as_runs() -> None:
    assert units_text(np.array([0, 1, 2, 7, 9, 10])) == "0:3,7,9:11"
    assert units_text(np.array([], np.intp)) == ""


@pytest.mark.parametrize(
    "text",
    ["2,2", "0:3,2", "-1", "3:3", "4:2", "x", "1:", ":2", ",", "0:5", "4", "0:9e9"],
)
def test_other_texts_are_no_units(text: str) -> None:
    with pytest.raises(ValueError, match=r"unit numbers under 4|invalid literal|comes twice"):
        parse_units(text, 4)


def test_units_keep_their_order_and_come_twice_where_asked() -> None:
    assert parse_units("3,0:2", 4).tolist() == [3, 0, 1]
    assert parse_units("2,0:3,2", 4, repeated=True).tolist() == [2, 0, 1, 2, 2]
    assert units_text(np.array([2, 0, 1, 2, 2])) == "2,0:3,2"


def part_of(**fields: Any) -> Block:
    units = np.arange(2)
    return dataclasses.replace(Block(units, units, "w", False), **fields)


class TestBlock:
    STACK = np.arange(24).reshape(2, 3, 4)

    def test_a_matrix(self) -> None:
        np.testing.assert_array_equal(part_of().read(self.STACK[0, :2, :2]), [[0, 1], [4, 5]])

    def test_a_padded_part_of_a_transposed_stack(self) -> None:
        """Two of four stored rows, two of three stored columns."""
        block = part_of(
            part=1,
            transposed=True,
            stored_rows=np.array([3, 0]),
            stored_columns=np.array([1, 2]),
        )
        np.testing.assert_array_equal(block.read(self.STACK), [[19, 23], [16, 20]])

    def test_a_group_of_a_convolution(self) -> None:
        """The second of two groups of three outputs, two of them units; the second of two inputs is padding."""
        kernel = np.arange(12).reshape(6, 2, 1, 1)
        block = part_of(
            rows=np.array([7]),
            transposed=True,
            stored_rows=np.array([0]),
            stored_columns=np.array([3, 4]),
        )
        np.testing.assert_array_equal(block.read(kernel), [[6, 8]])
        used = np.zeros(kernel.shape, bool)
        block.view(used)[np.ix_(*block.places)] = True
        assert np.flatnonzero(used).tolist() == [6, 8]
        with pytest.raises(ValueError, match="another shape"):
            block.read(np.zeros((4, 2, 1, 1)))
        with pytest.raises(ValueError, match="1 axes"):
            block.read(np.zeros(6))

    def test_rows_of_a_kernel_follow_each_other(self) -> None:
        """Two outputs, two inputs, kernels of three entries: a matrix of six rows."""
        kernel = np.arange(12).reshape(2, 2, 3)
        block = part_of(
            transposed=True, stored_rows=np.array([2, 3]), stored_columns=np.array([1, 0])
        )
        np.testing.assert_array_equal(block.read(kernel), [[8, 2], [9, 3]])

    def test_a_part_of_a_stack_that_is_broadcast(self) -> None:
        block = part_of(part=1, stored_rows=np.array([0, 2]), stored_columns=np.array([3, 1]))
        wide = self.STACK[:, None, None]
        np.testing.assert_array_equal(block.read(wide), block.read(self.STACK))

    def test_a_stored_column_may_stand_for_several_units(self) -> None:
        block = part_of(stored_columns=np.array([1, 1]))
        np.testing.assert_array_equal(block.read(self.STACK[0, :2]), [[1, 1], [5, 5]])

    @pytest.mark.parametrize(
        ("fields", "told"),
        [
            ({}, "3 axes"),
            ({"part": 2, "stored_rows": np.arange(2)}, "no part 2"),
            ({"part": 0}, "another shape"),
            ({"part": 0, "stored_rows": np.array([0, 3])}, "another shape"),
        ],
    )
    def test_parts_that_are_not_there(self, fields: dict[str, Any], told: str) -> None:
        with pytest.raises(ValueError, match=f"'w' has {told}"):
            part_of(**fields).read(self.STACK)

    def test_round_trip(self) -> None:
        block = part_of(part=3, stored_rows=np.array([5, 5]), stored_columns=np.array([7, 2]))
        row = Block(np.zeros(1, np.intp), np.arange(2), "b", False)
        bias = FoldedBias("1", (row,))
        site = SiteBlocks("s", (2, 2), "exact", "0", (block, part_of()), bias, 3, slope=True)
        proto = onnx.ModelProto()
        write_decomposition(proto, Decomposition(0.1, {"s": site}), "1")
        found = read_decomposition(proto, "m")
        assert found is not None
        first, second = found.sites["s"].blocks
        assert (first.part, second.part, second.stored_rows) == (3, None, None)
        np.testing.assert_array_equal(first.places, block.places)
        kept = found.sites["s"].bias
        assert kept is not None
        assert (kept.sha256, found.sites["s"].absorbed) == ("1", 3)
        assert found.sites["s"].slope
        np.testing.assert_array_equal(kept.blocks[0].columns, row.columns)


def test_what_was_there_is_replaced_and_the_rest_kept() -> None:
    proto = onnx.ModelProto()
    proto.metadata_props.add(key="mine", value="kept")
    for budget in (0.5, 0.25):
        write_decomposition(proto, Decomposition(budget, {}), "1")
    assert [entry.key for entry in proto.metadata_props] == [
        "mine",
        VERSION_KEY,
        DECOMPOSITION_KEY,
    ]
    found = read_decomposition(proto, "m")
    assert found is not None
    assert found.budget == 0.25


def test_a_model_without_it() -> None:
    assert read_decomposition(onnx.ModelProto(), "m") is None


def carrying(content: object) -> onnx.ModelProto:
    proto = onnx.ModelProto()
    text = content if isinstance(content, str) else json.dumps(content)
    proto.metadata_props.add(key=DECOMPOSITION_KEY, value=text)
    return proto


SITE = {"shape": [2, 3], "annealing": "exact", "sha256": "0", "blocks": []}
BLOCK = {"rows": "0:2", "columns": "0", "initializer": "b", "transposed": False}


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "7",
        {},
        {"format": "one", "budget": 0, "sites": {}},
        {"format": FORMAT, "budget": None, "sites": {}},
        {"format": FORMAT, "budget": 10**400, "sites": {}},
        "[" * 100_000,
        {"format": FORMAT, "budget": 0, "sites": []},
        {"format": FORMAT, "budget": 0, "sites": {"s": {**SITE, "shape": [2]}}},
        {"format": FORMAT, "budget": 0, "sites": {"s": {**SITE, "shape": [2, 3.5]}}},
        {"format": FORMAT, "budget": 0, "sites": {"s": {**SITE, "annealing": "no"}}},
        {"format": FORMAT, "budget": 0, "sites": {"s": {**SITE, "blocks": 3}}},
        {
            "format": FORMAT,
            "budget": 0,
            "sites": {"s": {**SITE, "blocks": [{**BLOCK, "rows": "0:3"}]}},
        },
        {
            "format": FORMAT,
            "budget": 0,
            "sites": {"s": {**SITE, "blocks": [{**BLOCK, "columns": "3"}]}},
        },
    ],
)
def test_broken_metadata_is_bad_input_in_one_line(content: object) -> None:
    with pytest.raises(ModelError, match="rewrite the model again") as caught:
        read_decomposition(carrying(content), "file.onnx")
    assert str(caught.value).startswith(
        "file.onnx: the metadata 'onnx_decompose.decomposition'"
    )
    assert "\n" not in str(caught.value)


def test_a_newer_format_is_not_guessed_at() -> None:
    newer = {"format": FORMAT + 1, "sites": "in some other way"}
    with pytest.raises(ModelError, match="newer onnx-decompose; update this one"):
        read_decomposition(carrying(newer), "m")


def test_the_digest_is_of_values_not_of_layout() -> None:
    weight = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert digest(weight) == digest(np.asfortranarray(weight))
    negative = weight.copy()
    negative[0, 0] = -0.0
    assert digest(negative) == digest(weight)
    negative[0, 1] = 2
    assert digest(negative) != digest(weight)
