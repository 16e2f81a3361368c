"""Convolutions in calibrated annealing: moments of their patches, which channels go, what a refit makes up for."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from onnx_decompose.calibrated import site_statistics, views
from onnx_decompose.calibrated.decay_proposals import LEVELS, decayed_units
from onnx_decompose.calibrated.group_proposals import group_networks
from onnx_decompose.calibrated.input_proposals import spare_inputs
from onnx_decompose.calibrated.merge_proposals import merged_outputs
from onnx_decompose.calibrated.partition_proposals import partitioned_regions
from onnx_decompose.calibrated.proposals import Proposal
from onnx_decompose.calibrated.refitting import annealed_by, refitted
from onnx_decompose.calibrated.removal_proposals import LANES, removed_units
from onnx_decompose.calibrated.search import context_for
from onnx_decompose.calibrated.support_proposals import supported_groups
from onnx_decompose.graph.study import study_model
from onnx_decompose.model.model_io import Model
from onnx_decompose.model.tensors import graph_inputs
from onnx_decompose.options import Options
from onnx_decompose.runtime.cases import open_model
from onnx_decompose.runtime.samples import samples_from_arrays
from onnx_decompose.runtime.sessions import Provider
from tests.passes.harness import parse

if TYPE_CHECKING:
    from collections.abc import Sequence

    import onnx
    from numpy.typing import NDArray

    from onnx_decompose.calibrated.context import CalibrationContext

    Array = NDArray[np.float32]

FORMS = {
    "a line": ("g (float[N, 3, 15] x) => (float[N, 4, 7] y)", (5,), 'auto_pad = "SAME_UPPER"'),
    "pictures": (
        "g (float[N, 3, 9, 9] x) => (float[N, 4, 5, 5] y)",
        (3, 3),
        "pads = [1, 1, 1, 1]",
    ),
    "cubes": (
        "g (float[N, 3, 5, 5, 5] x) => (float[N, 4, 3, 3, 3] y)",
        (2, 2, 2),
        "dilations = [2, 2, 2], pads = [1, 1, 1, 1, 1, 1]",
    ),
}
HIDDEN = 24


def network(
    rng: np.random.Generator, form: str = "pictures", faint: Sequence[int] = ()
) -> onnx.ModelProto:
    """Two convolutions, normalization and a nonlinearity between, a bias in the first and one behind the second.

    The last 12 of 24 hidden channels are the first but for 1e-3; those that are ``faint`` are hardly read.
    """
    head, kernel, options = FORMS[form]
    strides = f"strides = [{', '.join(['2'] * len(kernel))}]"
    ones = f"pads = [{', '.join('0' for _ in range(2 * len(kernel)))}]"
    text = f"""{head} {{
        a = Conv <{options}, {strides}> (x, w1, b1) n = BatchNormalization(a, s, t, m, v) r = Tanh(n)
        c = Conv <{ones}> (r, w2) y = Add(c, b2)
    }}"""
    first = rng.normal(size=(HIDDEN, 3, *kernel)) / 4
    vectors = {name: rng.uniform(0.5, 1.5, HIDDEN) for name in ("b1", *"stmv")}
    for array in (first, *vectors.values()):
        array[12:] = array[:12]
    first[12:] += 1e-3 * rng.normal(size=first[12:].shape)
    second = rng.normal(size=(4, HIDDEN, *(1 for _ in kernel)))
    second[:, list(faint)] *= 1e-6
    tensors = {
        "w1": first,
        "w2": second,
        "b2": rng.normal(size=(4, *(1 for _ in kernel))),
        **vectors,
    }
    return parse(text, {name: array.astype(np.float32) for name, array in tensors.items()})


def smooth(rng: np.random.Generator, count: int, *shape: int) -> Array:
    """Neighbouring entries are alike, as in pictures."""
    x = rng.normal(size=(count, *shape))
    for axis in range(2, x.ndim):
        x = x + np.roll(x, 1, axis)
    return x.astype(np.float32)


def context_of(proto: onnx.ModelProto, x: Array) -> CalibrationContext:
    samples = samples_from_arrays({"x": x}, graph_inputs(proto))
    options = Options(calibration=Path("x.npz"))
    return context_for(study_model(Model(proto)), options, samples, Provider.CPU)


def sizes(proto: onnx.ModelProto) -> list[int]:
    return [d.dim_value for d in proto.graph.input[0].type.tensor_type.shape.dim][1:]


def made(model: Model, x: Array) -> Array:
    return open_model(model, Provider.CPU).run({"x": x})["y"]


def error(context: CalibrationContext, proposal: Proposal, x: Array) -> float:
    """Of the refitted model on ``x``, relative."""
    before = made(context.study.source, x)
    after = made(annealed_by(context.study, refitted(context, proposal)), x)
    return float(np.linalg.norm(after - before) / np.linalg.norm(before))


@pytest.mark.parametrize("form", FORMS)
def test_moments_are_those_of_all_patches(form: str, rng: np.random.Generator) -> None:
    proto = network(rng, form)
    x = smooth(rng, 60, *sizes(proto))
    context = context_of(proto, x)
    assert [site.kernel for site in context.sites] == [FORMS[form][1], (1,) * (x.ndim - 2)]
    site = context.sites[0]
    window = context.view(site).window
    assert window is not None
    fit = context.parts.fit.rows["x"]
    patches = window.patches(fit).astype(np.float64)
    moments = context.read(site)
    np.testing.assert_allclose(moments.mean_x, patches.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(moments.xx, np.cov(patches.T, bias=True), atol=1e-6)
    outputs = made_by(context, "a", fit)
    bias = np.var(outputs - outputs.mean(axis=0), axis=0)
    np.testing.assert_allclose(context.power(site), bias, rtol=1e-4)


def made_by(context: CalibrationContext, value: str, x: Array) -> NDArray[Any]:
    """(rows, channels) of a value of the original."""
    proto = context.study.source.proto
    copied = type(proto)()
    copied.CopyFrom(proto)
    copied.graph.output.add(name=value)
    found = open_model(Model(copied), Provider.CPU).run({"x": x})[value]
    return np.moveaxis(found, 1, -1).reshape(-1, found.shape[1]).astype(np.float64)


@pytest.mark.parametrize("form", FORMS)
def test_channels_that_others_nearly_repeat_go_and_are_made_up_for(
    form: str, rng: np.random.Generator
) -> None:
    proto = network(rng, form)
    context = context_of(proto, smooth(rng, 300, *sizes(proto)))
    (family,) = removed_units(context)
    # Twelve could go for next to nothing: of 24, whole lanes are 8, and 16 are kept.
    proposal = next(p for p in family if p.name == "remove(8 of 24 hidden units)")
    first, second = (proposal.masks[site.name] for site in context.sites)
    gone = np.flatnonzero(~first.any(axis=0))
    assert gone.size == HIDDEN - 2 * LANES
    assert len(set(gone % 12)) == gone.size  # one of each pair
    np.testing.assert_array_equal(np.flatnonzero(~second.any(axis=1)), gone)
    fresh = smooth(rng, 100, *sizes(proto))
    assert error(context, proposal, fresh) < 2e-3
    bare = dataclasses.replace(context, compensation="none")
    assert error(bare, proposal, fresh) > 0.1


@pytest.mark.parametrize("sequential", [True, False])
def test_a_known_channel_is_recovered(rng: np.random.Generator, *, sequential: bool) -> None:
    """One input channel is the sum of the others: what it did goes into their taps, entry by entry."""
    proto = parse(
        "g (float[N, 4, 8, 8] x) => (float[N, 5, 4, 4] y)"
        "{ y = Conv <strides = [2, 2], pads = [1, 1, 1, 1]> (x, w) }",
        {"w": rng.normal(size=(5, 4, 3, 3)).astype(np.float32)},
    )
    x = smooth(rng, 200, 4, 8, 8)
    x[:, 3] = x[:, 0] + 2 * x[:, 1]
    context = dataclasses.replace(context_of(proto, x), sequential=sequential)
    (site,) = context.sites
    edges = np.ones((4, 5), dtype=bool)
    edges[3] = False
    found = refitted(context, Proposal("one", {site.name: site.entries(edges)}))[site.name]
    old = context.study.weight(site).T.reshape(5, 4, 3, 3)
    new = found.stored.T.reshape(5, 4, 3, 3)
    assert not new[:, 3].any()
    np.testing.assert_allclose(new[:, 0], old[:, 0] + old[:, 3], atol=1e-3)
    np.testing.assert_allclose(new[:, 1], old[:, 1] + 2 * old[:, 3], atol=1e-3)
    np.testing.assert_allclose(new[:, 2], old[:, 2], atol=1e-3)
    np.testing.assert_allclose(found.added, 0, atol=1e-3)


def test_what_a_constant_channel_adds_goes_into_the_bias(rng: np.random.Generator) -> None:
    proto = network(rng)
    x = smooth(rng, 200, 3, 9, 9)
    x[:, 2] = 0
    context = context_of(proto, x)
    family = next(family for family in spare_inputs(context) if family.name == "fewer inputs")
    proposal = family.at(family.size - 1)
    assert proposal is not None
    assert proposal.name.startswith("remove(1 of 3 inputs")
    assert not proposal.masks[context.sites[0].name][18:].any()
    assert error(context, proposal, x) < 0.01


def test_as_many_positions_as_are_drawn_are_nearly_as_good(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(views, "ROWS", 1)
    monkeypatch.setattr(views, "ROWS_PER_ENTRY", 40)
    proto = network(rng)
    context = context_of(proto, smooth(rng, 300, 3, 9, 9))
    (family,) = removed_units(context)
    proposal = next(p for p in family if p.name == "remove(8 of 24 hidden units)")
    assert error(context, proposal, smooth(rng, 100, 3, 9, 9)) < 4e-3


def test_positions_are_the_same_however_many_samples_run_together(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(views, "ROWS", 60 * 7)
    monkeypatch.setattr(views, "ROWS_PER_ENTRY", 1)
    proto = network(rng)
    x = smooth(rng, 100, 3, 9, 9)
    found = []
    for most in (1 << 29, 1 << 16):
        monkeypatch.setattr(site_statistics, "BATCH_BYTES", most)
        context = context_of(proto, x)
        found.append((context.parts.fit.at_a_time, [context.read(s) for s in context.sites]))
    (together, first), (fewer, second) = found
    # What a sample's sites read: 3 x 9 x 9 and 24 x 5 x 5 floats.
    assert (together, fewer) == (256, (1 << 16) // (4 * (3 * 81 + 24 * 25)))
    for one, other in zip(first, second, strict=True):
        np.testing.assert_allclose(one.xx, other.xx, rtol=1e-9, atol=1e-9)
        assert one.count == other.count


def test_rows_count_as_far_as_windows_fit_in_side_by_side(rng: np.random.Generator) -> None:
    proto = network(rng)
    context = context_of(proto, smooth(rng, 100, 3, 9, 9))
    first, second = (context.read(site) for site in context.sites)
    assert first.count == 60 * 9  # 5 x 5 windows of 3 x 3, every second one
    assert second.count == 60 * 25


def test_positions_are_no_substitute_for_samples(rng: np.random.Generator) -> None:
    proto = network(rng)
    few = context_of(proto, smooth(rng, 50, 3, 9, 9))
    assert few.too_few() == "calibrated annealing needs 54 samples, and there are 50"
    assert context_of(proto, smooth(rng, 54, 3, 9, 9)).too_few() is None


def test_what_hardly_adds_goes_with_its_whole_kernel(rng: np.random.Generator) -> None:
    proto = network(rng, faint=range(5, 9))
    context = context_of(proto, smooth(rng, 200, 3, 9, 9))
    (family,) = decayed_units(context)
    proposal = family.at(LEVELS[::-1].index(1e-5))
    assert proposal is not None
    for site, axis in zip(context.sites, (0, 1), strict=True):
        kept = proposal.masks[site.name].any(axis=axis)
        assert np.flatnonzero(~kept).tolist() == [5, 6, 7, 8]


def test_groups_of_channels_are_cut_where_the_seam_is(rng: np.random.Generator) -> None:
    sides = [rng.permutation(np.arange(16) % 2) for _ in range(3)]
    kernels: dict[str, Array] = {}
    for name, (inputs, outputs) in {"w1": sides[:2], "w2": sides[1:]}.items():
        kernel = rng.normal(size=(16, 16, 3, 3)) / 8
        kernel[outputs[:, None] != inputs] *= 1e-4
        kernels[name] = kernel.astype(np.float32)
    pads = "pads = [1, 1, 1, 1]"
    proto = parse(
        "g (float[N, 16, 6, 6] x) => (float[N, 16, 6, 6] y)"
        f"{{ a = Conv <{pads}> (x, w1) r = Relu(a) y = Conv <{pads}> (r, w2) }}",
        kernels,
    )
    context = context_of(proto, smooth(rng, 150, 16, 6, 6))
    (family,) = partitioned_regions(context)
    proposal = next(p for p in family if p.name == "partition(2 groups)")
    for site, source, target in zip(context.sites, sides[:2], sides[1:], strict=True):
        edges = site.edges(proposal.masks[site.name])
        np.testing.assert_array_equal(edges, source[:, None] == target)
        np.testing.assert_array_equal(site.entries(edges), proposal.masks[site.name])
    assert error(context, proposal, smooth(rng, 50, 16, 6, 6)) < 1e-3
    strictest = family.at(0)
    assert strictest is not None
    gone = sum(int((~mask).sum()) for mask in strictest.masks.values())
    assert gone == family.removes


def test_what_is_no_question_of_channels_says_nothing(rng: np.random.Generator) -> None:
    wide = parse(
        "g (float[N, 2, 6] x) => (float[N, 300, 6] y) { y = Conv(x, w) }",
        {"w": rng.normal(size=(300, 2, 1)).astype(np.float32)},
    )
    x = smooth(rng, 100, 2, 6) * (rng.random((100, 2, 1)) > 0.5)
    context = context_of(wide, x.astype(np.float32))
    for generator in (merged_outputs, supported_groups, group_networks):
        assert not list(generator(context))


def test_patches_inside_a_body_are_those_of_every_run_of_it(rng: np.random.Generator) -> None:
    """Three turns of a Loop for each sample; what a turn reads is another value each time."""
    proto = parse(
        """g (float[1, 3, 6, 6] x, int64 count, bool go) => (float[1, 3, 6, 6] y) {
            y = Loop(count, go, x) <body = turn (int64 i, bool c, float[1, 3, 6, 6] h) =>
                (bool d, float[1, 3, 6, 6] k) {
                    d = Identity(c) a = Conv <pads = [1, 1, 1, 1]> (h, w) k = Tanh(a)
            }>
        }""",
        {"w": (rng.normal(size=(3, 3, 3, 3)) / 4).astype(np.float32)},
    )
    x = smooth(rng, 40, 3, 6, 6)
    arrays = {"x": x, "count": np.array(3), "go": np.array(True)}
    samples = samples_from_arrays(arrays, graph_inputs(proto))
    study = study_model(Model(proto))
    context = context_for(study, Options(calibration=Path("x.npz")), samples, Provider.CPU)
    (site,) = context.sites
    window = context.view(site).window
    assert window is not None
    h, patches = context.parts.fit.rows["x"], []
    for _ in range(3):
        patches.append(window.patches(h))
        made = patches[-1] @ context.study.weight(site)
        h = np.moveaxis(np.tanh(made.reshape(-1, 6, 6, 3)), -1, 1)
    moments = context.read(site)
    seen = np.concatenate(patches).astype(np.float64)
    np.testing.assert_allclose(moments.xx, np.cov(seen.T, bias=True), rtol=1e-4, atol=1e-5)
