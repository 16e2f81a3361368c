from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from onnx_decompose.analysis.cuts import cheapest_cuts, hulls, spans, unions

if TYPE_CHECKING:
    from numpy.typing import NDArray

READS: Any = st.tuples(st.integers(1, 5), st.integers(1, 70)).flatmap(
    lambda shape: hnp.arrays(np.bool_, shape)
)


@given(READS)
def test_what_runs_of_segments_read(reads: NDArray[np.bool_]) -> None:
    low, high = hulls(reads)
    span, union = spans(reads), unions(reads)
    for i, j in itertools.combinations_with_replacement(range(len(reads)), 2):
        places = np.flatnonzero(reads[i : j + 1].any(axis=0))
        assert union[i, j] == max(places.size, 1)
        if places.size:
            assert (low[i, j], high[i, j]) == (places[0], places[-1])
            assert span[i, j] == places[-1] - places[0] + 1
        else:
            assert high[i, j] < low[i, j]
            assert span[i, j] == 1


@given(st.integers(1, 6), st.integers(1, 3), st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_no_other_cut_is_cheaper(segments: int, least: int, most: int, seed: int) -> None:
    price = np.random.default_rng(seed).random((segments, segments))
    found = cheapest_cuts(price, least, most)
    totals = {}
    for runs in range(least, min(most, segments) + 1):
        for inner in itertools.combinations(range(1, segments), runs - 1):
            bounds = (0, *inner, segments)
            totals[bounds] = sum(price[a, b - 1] for a, b in itertools.pairwise(bounds))
    if totals:
        assert tuple(found) == min(totals, key=lambda bounds: totals[bounds])
    else:
        assert found.tolist() == [segments]


def test_where_no_cut_is_possible() -> None:
    assert cheapest_cuts(np.full((3, 3), np.inf), 1, 3).tolist() == [3]
