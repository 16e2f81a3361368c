from __future__ import annotations

import pytest

from onnx_decompose.cost import CPU, CUDA, CostModel

UNIT = CostModel(kernel=1.0, flop_rate=2.0, byte_rate=4.0, copy_rate=8.0, gather_rate=16.0)


def test_a_product_is_bound_by_flops_or_by_bytes() -> None:
    # 100 rows of (10, 10): 20,000 flops against 4 * (100 + 2000) bytes.
    assert UNIT.matmul(100, 10, 10, 4) == 1 + 20_000 / 2
    # One row: 200 flops against 4 * (100 + 20) bytes, which take longer.
    assert UNIT.matmul(1, 10, 10, 4) == 1 + 480 / 4


def test_copies_read_and_write_and_a_gather_counts_its_elements() -> None:
    assert UNIT.copy(2, 10, 4) == 1 + 160 / 8
    assert UNIT.gather(2, 10, 4) == 1 + 80 / 16


@pytest.mark.parametrize("provider", [CPU, CUDA])
def test_eight_blocks_of_a_large_product_pay_and_of_a_tiny_one_do_not(
    provider: CostModel,
) -> None:
    def gain(units: int) -> float:
        blocks = 8 * provider.matmul(256, units // 8, units // 8, 4)
        return provider.matmul(256, units, units, 4) / blocks

    assert gain(8192) > 4
    assert gain(64) < 1
