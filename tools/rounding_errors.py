"""How far rewritten and annealed models are from float64: what the factor and the floor of claim A rest on.

    python -m tools.rounding_errors [--random 150] [MODEL.onnx ...]

Per family: how many units in the last place would have to be allowed on top of a factor times the annealed model's
own error, and how much smaller what claim A allows is than the tolerance of the type.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import functools
import pathlib
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np

from onnx_decompose.model.metadata import read_decomposition
from onnx_decompose.model.model_io import Model, load_model
from onnx_decompose.runtime.cases import open_model, runnable
from onnx_decompose.runtime.sessions import Provider
from onnx_decompose.verification.claims import Inputs, Tolerance
from onnx_decompose.verification.proof import annealed_model, prove_structure
from onnx_decompose.verification.reference import Reference, open_reference
from onnx_decompose.verification.rounding import ERROR_FACTOR, FLOOR, Compared, compare
from tests.e2e.random_models import Recipe, random_model
from tests.e2e.whole_rewrite import rewrite_once
from tools import bench_recurrent, planted_models

if TYPE_CHECKING:
    from collections.abc import Iterator

    import onnx

    from onnx_decompose.planning.state_graph import Emit

FACTORS = (1, 2, 4)
EMITS: tuple[Emit, ...] = ("auto", "split", "grouped", "triangular", "shared", "shrink")


def main() -> None:
    """Measure every family and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--random", type=int, default=150, help="random models")
    parser.add_argument("--steps", default="16,64", help="of the recurrent operators")
    parser.add_argument("models", nargs="*", type=pathlib.Path)
    arguments = parser.parse_args()
    steps = [int(n) for n in arguments.steps.split(",")]
    families: dict[str, Iterator[tuple[onnx.ModelProto, Emit]]] = {
        "random models": (
            (random_model(Recipe.drawn(seed)), EMITS[seed % 6])
            for seed in range(arguments.random)
        ),
        "recurrent operators": _recurrent(steps),
        "planted models": _planted(),
        "given models": ((load_model(path).proto, "auto") for path in arguments.models),
    }
    counts = " | ".join(f"last bits on top of {c}x" for c in FACTORS)
    print(f"| family | comparisons | {counts} | room, of the type's tolerance |")
    print("|---|---|" + "---|" * (len(FACTORS) + 1))
    for family, models in families.items():
        found = [one for proto, emit in models for one in _compared(proto, emit)]
        if found:
            print(f"| {family} | {len(found)} | {_figures(found)} |")


def _recurrent(steps: list[int]) -> Iterator[tuple[onnx.ModelProto, Emit]]:
    for cell in bench_recurrent.GATES:
        for case in bench_recurrent.CASES:
            sizes = tuple((8, hidden // 4) for _, hidden in case.sizes)
            small = dataclasses.replace(case, sizes=sizes)
            for count in steps:
                rng = np.random.default_rng(0)
                yield bench_recurrent.plant(cell, small, count, rng), "split"


def _planted() -> Iterator[tuple[onnx.ModelProto, Emit]]:
    rng = np.random.default_rng(0)
    emits: tuple[Emit, ...] = ("auto", "split", "grouped", "triangular")
    for dtype in (np.float32, np.float16):
        for blocks in (planted_models.Blocks(4), planted_models.Blocks(6, equal=False)):
            for planted in (
                planted_models.matmul((192, 240), blocks, dtype, rng),
                planted_models.ffn((96, 192, 96), blocks, dtype, rng),
                planted_models.gated_ffn((96, 192), blocks, dtype, rng),
                planted_models.residual_stack((96, 192), blocks, dtype, rng),
                planted_models.block_triangular(192, blocks, dtype, rng),
                planted_models.banded(192, 9, dtype, rng),
            ):
                for emit in emits:
                    yield planted.model, emit


def _compared(proto: onnx.ModelProto, emit: Emit) -> Iterator[Compared]:
    """Every float output on every case of a rewrite, if there is one; labelled by the model's identity."""
    outcome = rewrite_once(proto, emit)
    if outcome.model is None:
        return
    original, rewritten = Model(proto), Model(outcome.model)
    decomposition = read_decomposition(rewritten.proto, "rewritten")
    assert decomposition is not None
    fault, weights, biases, *_ = prove_structure(original, rewritten, decomposition)
    assert fault is None
    annealed = annealed_model(original, decomposition, weights, biases)
    reference = open_reference(annealed)
    if not isinstance(reference, Reference):
        return
    dense, candidate = (open_model(m, Provider.CPU) for m in (annealed, rewritten))
    for case, expected in runnable(functools.partial(Inputs().cases, annealed), dense):
        if case.poison:
            continue
        got, exact = candidate.run(case.feeds), reference.run(case.feeds)
        for name, value in expected.items():
            one = Compared(
                f"{id(outcome)}.{name}",
                case.label,
                case.kind,
                value.dtype,
                *compare(value, got[name], exact[name]),
                moves=lambda: 0.0,
            )
            if one.annealed is not None and one.size:
                yield one


def _figures(found: list[Compared]) -> str:
    pools: dict[tuple[str, str], float] = collections.defaultdict(float)
    for one in found:
        key = (one.output, one.kind)
        pools[key] = max(pools[key], (one.annealed or 0.0) / one.size)
    needs = []
    for factor in FACTORS:
        need = max(
            ((one.rewritten or 0.0) / one.size - factor * pools[one.output, one.kind])
            / _last_bit(one)
            for one in found
        )
        needs.append(f"{max(need, 0.0):.1f}")
    rooms = [
        (ERROR_FACTOR * pools[one.output, one.kind] + FLOOR * _last_bit(one))
        / Tolerance.for_dtype(one.dtype).rtol
        for one in found
    ]
    return f"{' | '.join(needs)} | 1/{1 / float(np.median(rooms)):.0f}"


def _last_bit(one: Compared) -> float:
    return float(ml_dtypes.finfo(one.dtype).eps)


if __name__ == "__main__":
    main()
