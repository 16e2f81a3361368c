"""Emission ``triangular`` of whole regions: groups of units that read each other's."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.passes.harness import FREE, Rewritten, check_parity, parse, rewrite

if TYPE_CHECKING:
    from collections.abc import Sequence

    import onnx

    from tests.passes.harness import Array

LATENCY = dataclasses.replace(FREE, batches=(1,))
"""One row at a time: the weights are what costs."""


def weight(rng: np.random.Generator, rows: Array, columns: Array) -> Array:
    """Entries from each block of units to itself and the later ones, away from zero."""
    values = rng.uniform(0.2, 0.5, (rows.size, columns.size))
    values *= rng.choice([-1, 1], values.shape)
    return np.where(rows[:, None] <= columns, values, 0).astype(np.float32)


def stack(
    rng: np.random.Generator,
    *,
    shuffle: bool = True,
    batch: str = "B",
    opset: int = 17,
    ends: bool = False,
) -> onnx.ModelProto:
    """s + relu(s W_up + b) W_down, twice; with ``ends`` the state is made and read by other sites."""

    def labels(size: int) -> Array:
        found = np.arange(size) // (size // 3)
        return rng.permutation(found) if shuffle else found

    state = labels(12)
    tensors: dict[str, Array] = {}
    body = ""
    for number in range(2):
        hidden = labels(18)
        tensors[f"u{number}"] = weight(rng, state, hidden)
        tensors[f"b{number}"] = rng.normal(0, 0.1, hidden.size).astype(np.float32)
        tensors[f"d{number}"] = weight(rng, hidden, state)
        body += f"""
            p{number} = MatMul(s{number}, u{number})
            q{number} = Add(p{number}, b{number})
            h{number} = Relu(q{number})
            c{number} = MatMul(h{number}, d{number})
            s{number + 1} = Add(s{number}, c{number})"""
    if ends:
        first, last = labels(6), labels(9)
        tensors |= {"first": weight(rng, first, state), "last": weight(rng, state, last)}
        body = f"s0 = MatMul(x, first) {body} y = MatMul(s2, last)"
        head = f"g (float[{batch}, 6] x) => (float[{batch}, 9] y)"
    else:
        body = body.replace("s0", "x").replace("s2", "y")
        head = f"g (float[{batch}, 12] x) => (float[{batch}, 12] y)"
    return parse(f"{head} {{ {body} }}", tensors, opsets=f'"": {opset}')


def products(result: Rewritten) -> int:
    return result.ops.count("MatMul")


@pytest.mark.parametrize(("batch", "opset"), [("B", 17), ("B", 9), ("B, T", 13)])
def test_a_residual_stack_exchanges_what_its_groups_read(
    batch: str, opset: int, rng: np.random.Generator
) -> None:
    result = rewrite(stack(rng, batch=batch, opset=opset), "triangular", cost=LATENCY)
    assert result.decisions == [("triangular", 3)]
    assert "3 strongly connected components" in result.plans[0][1].reason
    assert products(result) == 3 * 4
    # The state is brought into order once where it comes in, and each value that goes out once.
    assert result.ops.count("Gather") == 3
    # One Slice for the first group of the second, none of what all read.
    blocks = {name: [b.rows.size for b in parts] for name, parts in result.record.items()}
    assert list(blocks.values()) == [[4, 8, 12], [6, 12, 18]] * 2
    check_parity(result, rng)


def test_a_state_made_and_read_inside_costs_no_gather_inside(
    rng: np.random.Generator,
) -> None:
    result = rewrite(stack(rng, ends=True), "triangular", cost=LATENCY)
    assert result.decisions == [("triangular", 3)]
    assert products(result) == 3 * 6
    assert result.ops.count("Gather") == 2  # x and y
    check_parity(result, rng)


def test_groups_in_order_are_only_cut_and_joined(rng: np.random.Generator) -> None:
    result = rewrite(stack(rng, shuffle=False), "triangular", cost=LATENCY)
    assert result.decisions == [("triangular", 3)]
    assert "Gather" not in result.ops
    check_parity(result, rng)


def test_scattered_units_are_picked_where_the_provider_can(rng: np.random.Generator) -> None:
    cost = dataclasses.replace(LATENCY, pick_ratio=5.0)
    result = rewrite(stack(rng), "triangular", cost=cost)
    assert result.ops.count("ArrayFeatureExtractor") == 3
    assert "Gather" not in result.ops
    assert [o.domain for o in result.proto.opset_import] == ["", "ai.onnx.ml"]
    check_parity(result, rng)


def test_a_free_state_is_renumbered(rng: np.random.Generator) -> None:
    """A normalization on either side: the constants around it take the new order, and nothing is gathered."""
    size = 12
    labels = rng.permutation(np.arange(size) // 4)
    tensors = {
        "table": rng.standard_normal((5, size)).astype(np.float32),
        "scale": rng.uniform(0.5, 1.5, size).astype(np.float32),
        "head": rng.standard_normal((size, 3)).astype(np.float32),
        **{name: weight(rng, labels, labels) for name in ("u0", "d0", "u1", "d1")},
    }
    text = """g (int64[B] ids) => (float[B, 3] y) {
        e = Gather(table, ids)
        s0 = LayerNormalization(e, scale)
        p0 = MatMul(s0, u0)
        h0 = Relu(p0)
        c0 = MatMul(h0, d0)
        s1 = Add(s0, c0)
        p1 = MatMul(s1, u1)
        h1 = Relu(p1)
        c1 = MatMul(h1, d1)
        s2 = Add(s1, c1)
        n = LayerNormalization(s2, scale)
        y = MatMul(n, head)
    }"""
    result = rewrite(parse(text, tensors), "triangular", cost=LATENCY)
    assert result.decisions[0] == ("triangular", 3)
    assert result.ops.count("Gather") == 1  # the look-up
    assert set(result.reordered) >= {"table.renumbered", "scale.renumbered"}
    check_parity(result, rng)


@pytest.mark.parametrize("opset", [9, 17])
@pytest.mark.parametrize(
    "live",
    [range(9), range(3, 12), (0, 1, 2, 4, 5, 6, 8, 9, 10)],
    ids=["first", "last", "gaps"],
)
def test_units_that_come_in_and_that_no_group_has(
    live: Sequence[int], opset: int, rng: np.random.Generator
) -> None:
    """What comes in is read by a product and added to its result, of which some units lead nowhere."""
    kept = np.asarray(live)
    labels = np.arange(9) // 3
    given = {"up": np.zeros((12, 12)), "last": np.zeros((12, 9))}
    given["up"][np.ix_(kept, kept)] = weight(rng, labels, labels)
    given["last"][kept] = weight(rng, labels, labels)
    text = """g (float[B, 12] x) => (float[B, 9] y) {
        p = MatMul(x, up)
        s = Add(x, p)
        y = MatMul(s, last)
    }"""
    tensors = {name: values.astype(np.float32) for name, values in given.items()}
    model = parse(text, tensors, opsets=f'"": {opset}')
    result = rewrite(model, "triangular", cost=LATENCY)
    assert result.decisions == [("triangular", 3)]
    check_parity(result, rng)


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    density=st.sampled_from([0.15, 0.3, 0.6]),
    shape=st.sampled_from([("B", 9), ("B", 17), ("B, T", 13)]),
    ends=st.booleans(),
)
def test_the_function_stays_with_any_masks(
    seed: int, density: float, shape: tuple[str, int], ends: bool
) -> None:
    rng = np.random.default_rng(seed)
    batch, opset = shape
    model = stack(rng, batch=batch, opset=opset, ends=ends)
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    found = {}
    for node in model.graph.node:
        if node.op_type == "MatMul":
            dims = weights[node.input[1]].dims
            found[node.name or node.output[0]] = rng.random(tuple(dims)) < density
    result = rewrite(model, "triangular", found, cost=LATENCY)
    check_parity(result, rng, exact=False)
