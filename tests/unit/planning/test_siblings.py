from __future__ import annotations

import dataclasses

import pytest

from onnx_decompose.planning.cost import CPU, CUDA, CostModel
from onnx_decompose.planning.siblings import (
    Siblings,
    apart_seconds,
    joined_cost,
    joined_seconds,
    pays,
)

HEADS = Siblings(245, (3,) * 6, 4)
QKV = Siblings(288, (288,) * 3, 4)
WIDE = Siblings(4096, (4096,) * 2, 4)


def at(rows: int, cost: CostModel = CPU) -> CostModel:
    return dataclasses.replace(cost, batches=(rows,))


@pytest.mark.parametrize("rows", [1, 16, 64, 256, 4096])
def test_narrow_products_are_joined_at_any_number_of_rows(rows: int) -> None:
    assert pays(HEADS, at(rows))


def test_wide_ones_only_where_there_are_few_rows() -> None:
    assert pays(QKV, at(1))
    assert not pays(QKV, at(4096))
    costs = [joined_cost(QKV, at(rows)) for rows in (16, 64, 256, 4096)]
    assert costs == sorted(costs)


def test_reading_large_weights_takes_as_long_whatever_they_lie_in() -> None:
    assert not pays(WIDE, at(1))
    assert joined_cost(WIDE, at(1)) == pytest.approx(1.0, abs=0.02)


def test_one_product_is_left() -> None:
    assert not pays(Siblings(8, (8,), 4), at(1))


def test_every_number_of_rows_counts_the_same() -> None:
    one, many = (joined_cost(QKV, at(rows)) for rows in (1, 4096))
    both = dataclasses.replace(CPU, batches=(1, 4096))
    assert joined_cost(QKV, both) == pytest.approx((one * many) ** 0.5)


def test_what_is_saved_is_started_and_shared_out_once() -> None:
    cost = at(1)
    saved = apart_seconds(QKV, 1, cost) - joined_seconds(QKV, 1, cost)
    work = cost.matmul(1, 288, 288, 4) - cost.kernel
    lost = [t / (1 + t / cost.waking) for t in (work, 3 * work)]
    started = 2 * cost.kernel + 3 * lost[0] - lost[1]
    assert saved == pytest.approx(started - cost.copy(1, 864, 4), rel=0.05)


def test_a_narrow_product_takes_as_long_as_a_full_one() -> None:
    narrow, full = (apart_seconds(Siblings(245, (n,), 4), 256, CPU) for n in (3, CPU.lanes))
    assert narrow == full


def test_on_a_gpu_kernels_are_saved() -> None:
    assert pays(HEADS, at(1, CUDA))
    assert not pays(Siblings(4096, (4096, 4096), 4), at(256, CUDA))


def test_rows_are_those_of_every_sample() -> None:
    long = dataclasses.replace(QKV, positions=64)
    assert joined_cost(long, at(4)) == joined_cost(QKV, at(256))
    fixed = dataclasses.replace(long, has_batch=False)
    assert joined_cost(fixed, at(4)) == joined_cost(QKV, at(64))
