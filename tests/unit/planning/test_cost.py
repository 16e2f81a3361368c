from __future__ import annotations

import pytest

from onnx_decompose.planning.cost import CPU, CUDA, CostModel
from onnx_decompose.timing.cost_cache import COEFFICIENTS

UNIT = CostModel(
    kernel=1.0,
    flop_rate=2.0,
    half_flop_rate=6.0,
    integer_flop_rate=16.0,
    byte_rate=4.0,
    block=0.5,
    batched_flop_rate=5.0,
    grouped_flop_rate=4.0,
    copy_rate=8.0,
    elementwise_rate=32.0,
    gather_rate=16.0,
    row_gather_rate=64.0,
    transpose_rate=128.0,
)


def test_a_product_is_bound_by_flops_or_by_bytes() -> None:
    # 100 rows of (10, 10): 20,000 flops against 4 * (100 + 2000) bytes.
    assert UNIT.matmul(100, 10, 10, 4) == 1 + 20_000 / 2
    # One row: 200 flops against 4 * (100 + 20) bytes, which take longer.
    assert UNIT.matmul(1, 10, 10, 4) == 1 + 480 / 4


def test_half_precision_has_a_rate_of_its_own() -> None:
    assert UNIT.matmul(100, 10, 10, 2) == pytest.approx(1 + 20_000 / 6)
    assert UNIT.batched_matmul(100, 3, 10, 10, 2) == pytest.approx(2.5 + 60_000 / 15)


def test_a_gather_copies_narrow_elements_one_by_one_too() -> None:
    assert UNIT.gather(10, 4, 1) == UNIT.gather(10, 4, 2) == UNIT.gather(10, 4, 4)
    assert UNIT.gather(10, 4, 8) > UNIT.gather(10, 4, 4)


def test_integers_have_a_rate_of_their_own() -> None:
    assert UNIT.matmul(100, 10, 10, 1) == pytest.approx(1 + 20_000 / 16)


def test_products_of_blocks_start_once_and_pay_for_every_block() -> None:
    assert UNIT.batched_matmul(100, 3, 10, 10, 4) == 1 + 3 * 0.5 + 3 * 20_000 / 5
    assert UNIT.grouped_conv(100, 3, 10, 10, 4) == 1 + 3 * 0.5 + 3 * 20_000 / 4
    assert UNIT.grouped_conv(1, 3, 10, 10, 4) == 1 + 3 * 0.5 + 3 * 480 / 4


def test_what_moves_values_counts_their_bytes() -> None:
    assert UNIT.copy(2, 10, 4) == 1 + 160 / 8
    assert UNIT.elementwise(2, 10, 4) == 1 + 160 / 32
    assert UNIT.gather(2, 10, 4) == 1 + 80 / 16
    assert UNIT.transpose(2, 10, 4) == 1 + 80 / 128


def test_a_row_gather_takes_an_elements_time_per_row_and_is_fast_from_there() -> None:
    assert UNIT.row_gather(2, 10, 4) == 1 + 40 / 16 + 80 / 64
    # One row: as slow as along the last axis. Many: hardly slower than a copy.
    assert CPU.row_gather(1, 1024, 4) == pytest.approx(CPU.gather(1, 1024, 4), rel=0.05)
    assert CPU.row_gather(256, 1024, 4) < CPU.gather(256, 1024, 4) / 20


@pytest.mark.parametrize("provider", [CPU, CUDA])
def test_every_coefficient_is_positive(provider: CostModel) -> None:
    assert all(getattr(provider, name) > 0 for name in COEFFICIENTS)
    assert provider.pick_ratio >= 0


@pytest.mark.parametrize("provider", [CPU, CUDA])
def test_eight_blocks_of_a_large_product_pay_and_of_a_tiny_one_do_not(
    provider: CostModel,
) -> None:
    def gain(units: int) -> float:
        blocks = 8 * provider.matmul(256, units // 8, units // 8, 4)
        return provider.matmul(256, units, units, 4) / blocks

    assert gain(8192) > 4
    assert gain(64) < 1
