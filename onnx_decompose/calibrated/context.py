"""What generators of proposals may look at: the model, the samples, and what its sites read on them."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import TYPE_CHECKING

import numpy as np
import onnx

from onnx_decompose.analysis.gram import MomentAccumulator
from onnx_decompose.analysis.refit import Compensation, degrees_of_freedom
from onnx_decompose.calibrated.cells import Cell, find_cells, with_states
from onnx_decompose.calibrated.neighbours import with_neighbours
from onnx_decompose.calibrated.parts import FIT
from onnx_decompose.calibrated.site_statistics import (
    HELD_BYTES,
    MOMENT_BYTES,
    Held,
    InputMoments,
    moment_bytes,
    observe,
)
from onnx_decompose.calibrated.views import View, view_of
from onnx_decompose.graph.biases import find_biases
from onnx_decompose.graph.exposing import Inside, Shown
from onnx_decompose.model.shapes import opset_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from typing import Any

    from numpy.typing import NDArray

    from onnx_decompose.analysis.gram import Moments
    from onnx_decompose.calibrated.parts import Parts
    from onnx_decompose.graph.biases import Bias
    from onnx_decompose.graph.flat import Flat
    from onnx_decompose.graph.sites import Site
    from onnx_decompose.graph.study import Study
    from onnx_decompose.runtime.samples import Samples
    from onnx_decompose.runtime.sessions import Provider
    from onnx_decompose.verification.metrics import Metric

__all__ = ["FEWEST_ROWS", "CalibrationContext"]

_SURE = 1e-3
"""Ridge that tells the directions that vary from those that hardly do."""

_ROWS_PER_DIRECTION = 2.0
FEWEST_ROWS = 32
"""Of what a site reads, on the part to fit on."""
_ADD_BROADCASTS_FROM = 7


@dataclasses.dataclass(frozen=True, eq=False)
class CalibrationContext:
    """What generators may look at.

    Attributes:
        study: the model.
        parts: the samples.
        provider: where models run.
        seed: of everything random.
        compensation: what makes up for what goes.
        neighbours: whether a few samples to fit on are joined by others made up around them.
        sequential: whether the refit of a site sees what was annealed before it.
        metric: the user's measure of quality, if there is one.
        held_bytes: of a model's values on one set of samples.
        moment_bytes: of second moments on one set of samples; a site with more of its own is left as it is.
        turn: whose turn it is to choose on, where samples take turns; the model of turn 0 is what is kept.
        unseen: sites inside bodies that the samples show nothing of, by name, and why.
    """

    study: Study
    parts: Parts
    provider: Provider
    seed: int = 0
    compensation: Compensation = "ridge"
    neighbours: bool = True
    sequential: bool = True
    metric: Metric | None = None
    held_bytes: int = HELD_BYTES
    moment_bytes: int = MOMENT_BYTES
    turn: int = 0
    unseen: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def rng(self) -> np.random.Generator:
        """A fresh source of randomness, the same every time."""
        return np.random.default_rng(self.seed)

    @functools.cached_property
    def sites(self) -> tuple[Site, ...]:
        """The sites whose weight and bias can be refitted: products whose rows can be seen from outside."""
        return tuple(site for site in self._products if site.name not in self.left)

    @functools.cached_property
    def left(self) -> Mapping[str, str]:
        """Sites inside bodies that are left as they are, by name, and why."""
        found = dict(self.unseen)
        for site in self._products:
            reason = self.inside.refusal(site.input)
            if self.inside.path(site.input) and self.view(site).codes is not None:
                reason = "it multiplies integers inside a body"
            if reason is not None:
                found[site.name] = reason
        for cell in self.study.recurrent:
            if any(self.inside.path(name) for name in cell.outputs):
                reason = "it is a recurrent operator inside a body"
                found |= {weight.name: reason for weight in cell.all_weights}
        return found

    @functools.cached_property
    def _products(self) -> tuple[Site, ...]:
        study = self.study
        broadcasts = opset_of(study.model.proto) >= _ADD_BROADCASTS_FROM
        return tuple(
            site
            for site in study.sites
            if site.name in self._views
            and moment_bytes(site.shape[0]) <= self.moment_bytes
            and (
                broadcasts
                or site.quantized is not None  # nothing is added that is not there
                or self.biases[site.name].inside
                or self.biases[site.name].nodes
            )
        )

    @functools.cached_property
    def cells(self) -> tuple[Cell, ...]:
        """The recurrent operators whose entries can be refitted."""
        found = find_cells(self.study, {site.name for site in self.sites})
        return tuple(
            cell
            for cell in found
            if moment_bytes(sum(weight.shape[0] for weight in cell.weights))
            <= self.moment_bytes
        )

    @functools.cached_property
    def states(self) -> Mapping[str, Moments]:
        """Moments of what recurrent operators read, inputs and states, by name, on the part to fit on."""
        found: dict[str, Moments] = {}
        for cell in self.cells:
            adding = MomentAccumulator()
            for values in self.observe_cell(cell, self.parts.fit):
                adding.update(cell.rows(values))
            found[cell.site.name] = adding.result()
        return found

    def observe_cell(
        self, cell: Cell, samples: Samples, model: Flat | None = None
    ) -> Iterator[dict[str, NDArray[Any]]]:
        """The values that tell what a recurrent operator reads and makes, batch by batch.

        What a changed ``model`` makes is never held: it changes with the operator's own entries.
        """
        flat = with_states(self.study.flat if model is None else model, cell)
        held = self.held.get(samples) if model is None else None
        return self.observe(cell.values, samples, held, flat)

    @functools.cached_property
    def biases(self) -> Mapping[str, Bias]:
        """Where the constants of sites are, by name of the site."""
        study = self.study
        return find_biases(study.model.proto.graph, study.sites, study.constants)

    @functools.cached_property
    def _views(self) -> Mapping[str, View]:
        """How sites read their inputs, by name of the site."""
        graph, constants = self.study.model.proto.graph, self.study.constants
        makers = {name: node for node in graph.node for name in node.output}
        views = {
            site.name: view_of(site, graph.node[site.node], makers.get(site.input), constants)
            for site in self.study.sites
        }
        return {name: view for name, view in views.items() if view is not None}

    def view(self, site: Site) -> View:
        """How ``site`` reads its input."""
        return self._views[site.name]

    def view_of_value(self, name: str) -> View:
        """A value as a site reads it; as it is where none does."""
        views = (self.view(site) for site in self.sites if site.input == name)
        return next((view for view in views if view.window is None), View(name))

    @functools.cached_property
    def inside(self) -> Inside:
        """Which values are in bodies."""
        return Inside(self.study.flat)

    @functools.cached_property
    def shown(self) -> Mapping[str, Shown]:
        """What values inside bodies come out as."""
        study, found = self.study, dict[str, Shown]()
        for region in study.regions:
            first = region.sites[0]
            kind: int = onnx.TensorProto.FLOAT
            if first.quantized is None:
                kind = study.constants[first.weight].data_type
            for name, axis in region.axis_of.items():
                if self.inside.path(name):
                    positions = (0,) * (-1 - region.unit_axis)
                    found[name] = Shown((0, region.axis_sizes[axis], *positions), kind)
        choices = {choice for name in found for choice in self.inside.choices(name)}
        inner = {choice for choice in choices if self.inside.path(choice)}
        return found | dict.fromkeys(inner, Shown((0,), onnx.TensorProto.BOOL))

    def observe(
        self,
        values: Sequence[str],
        samples: Samples,
        held: Held | None = None,
        flat: Flat | None = None,
    ) -> Iterator[dict[str, NDArray[Any]]]:
        """Values of the flat graph batch by batch, of another version of the model where one is given.

        Raises:
            ModelError: it does not run.
        """
        model = self.study.flat if flat is None else flat
        return observe(model, values, samples, self.provider, held, self.shown)

    @functools.cached_property
    def fit(self) -> Mapping[View, Moments]:
        """Moments of what the original's sites read, by view, on the part to fit on."""
        return self._moments(self.parts.fit)

    @functools.cached_property
    def choose(self) -> Mapping[View, Moments]:
        """The same on the part to choose on."""
        return self._moments(self.parts.choose)

    @functools.cached_property
    def fitting(self) -> Samples:
        """What refits are fitted on: the part to fit on, and neighbours where it is small.

        Not where there are convolutions or recurrent operators: a signal with noise on every entry is no neighbour.
        """
        fit, patches = self.parts.fit, any(site.kernel for site in self.sites)
        few = self.neighbours and not patches and not self.cells
        return with_neighbours(fit, self.rng) if few else fit

    @functools.cached_property
    def fitted(self) -> Mapping[View, Moments]:
        """Moments of what the original's sites read, by view, on what refits are fitted on."""
        return self.fit if self.fitting is self.parts.fit else self._moments(self.fitting)

    @functools.cached_property
    def held(self) -> Mapping[Samples, Held]:
        """The original's own values, as far as they are held, on what refits are fitted and chosen on."""
        return {part: Held(self.held_bytes) for part in (self.fitting, self.parts.choose)}

    def _moments(self, samples: Samples) -> Mapping[View, Moments]:
        sizes = {self.view(site): site.shape[0] for site in self.sites}
        return InputMoments(self.observe, sizes, samples, self.seed, self.moment_bytes)

    def read(self, site: Site) -> Moments:
        """Moments of what the original's site reads, on the part to fit on."""
        return self.fit[self.view(site)]

    def power(self, site: Site) -> NDArray[np.float64]:
        """(N,) variance of what the original's site makes, on the part to fit on."""
        return self.read(site).through(self.study.weight(site)).yy

    def too_few(self) -> str | None:
        """Why there are too few samples to refit on, with the number that would do; None if there are enough.

        Twice as many rows as there are directions in which the model's inputs vary: of fewer, a covariance shows some
        as constant that are not. How many more the refit can use, the part to choose on tells.

        The patches of a sample overlap: of a convolution as many rows count as windows fit in side by side. However
        many these are, it needs as many samples as a product needs rows.
        """
        for part in (self.fit, self.choose):
            for view, moments in part.items():
                if not np.isfinite(moments.xx).all():
                    return f"nothing is fitted to '{view.value}', which is not finite on some samples"
        if any(not np.isfinite(moments.xx).all() for moments in self.states.values()):
            return "nothing is fitted to states that are not finite on some samples"
        entries = {value.name for value in self.study.source.proto.graph.input}
        worst = 0
        for view, moments in self.fit.items():
            rows = max(moments.count, 1.0) / self.parts.fit.count  # of each sample
            fewest = FEWEST_ROWS / (rows if view.window is None else 1.0)
            seen = wanted = 0.0
            if view.value in entries:  # what is computed from them varies no more than they do
                seen = degrees_of_freedom(moments.xx, _SURE)
                wanted = float(np.count_nonzero(moments.spread > 0))
            if self.parts.fit.count < max(fewest, _ROWS_PER_DIRECTION * seen / rows):
                needed = max(fewest, _ROWS_PER_DIRECTION * wanted / rows)
                worst = max(worst, math.ceil(needed / FIT))
        if not worst:
            return None
        total = sum(
            part.count for part in (self.parts.fit, self.parts.choose, self.parts.judge)
        )
        return f"calibrated annealing needs {worst} samples, and there are {total}"
