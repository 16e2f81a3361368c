"""Sites inside bodies that are left as they are: onnxruntime does not show them, or samples show little of them.

A branch that hardly any sample takes and a loop that hardly ever runs say too little for a refit. All turns of the
samples leave the same sites, so that they have the same proposals.
"""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING

import numpy as np

from onnx_decompose.calibrated.context import FEWEST_ROWS
from onnx_decompose.calibrated.parts import CHOOSE, FIT
from onnx_decompose.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from onnx_decompose.calibrated.context import CalibrationContext
    from onnx_decompose.calibrated.views import View
    from onnx_decompose.graph.sites import Site
    from onnx_decompose.runtime.samples import Samples

logger = logging.getLogger(__name__)

__all__ = ["rare_sites", "unshown_sites"]


def unshown_sites(context: CalibrationContext) -> dict[str, str]:
    """Sites inside bodies whose rows onnxruntime does not give on the first sample, by name, and why."""
    first = context.parts.fit.take(np.arange(1))
    return _named(
        context,
        {
            view: found
            for view, found in _counts(context, _inner_views(context), first).items()
            if isinstance(found, str)
        },
    )


def rare_sites(contexts: Sequence[CalibrationContext]) -> dict[str, str]:
    """Sites inside bodies that have too few rows on some part of the samples, by name, and why.

    Args:
        contexts: one for each turn of the samples.
    """
    views = _inner_views(contexts[0])
    least = dict.fromkeys(views, math.inf)
    reasons: dict[View, str] = {}
    for each in contexts if views else ():
        parts = (
            (each.parts.fit, FEWEST_ROWS),
            (each.parts.choose, FEWEST_ROWS * CHOOSE / FIT),
        )
        for samples, needed in parts:
            for view, found in _counts(each, views, samples).items():
                if isinstance(found, str):
                    reasons[view] = found
                else:
                    least[view] = min(least[view], found / needed)
    for view, share in least.items():
        if share < 1:
            reasons.setdefault(view, f"samples show {share:.0%} of the rows that it needs")
    return _named(contexts[0], reasons)


def _inner(context: CalibrationContext) -> list[Site]:
    return [site for site in context.sites if context.inside.path(site.input)]


def _inner_views(context: CalibrationContext) -> list[View]:
    return list(dict.fromkeys(context.view(site) for site in _inner(context)))


def _named(context: CalibrationContext, reasons: Mapping[View, str]) -> dict[str, str]:
    """By site, what is known by view."""
    found = ((site.name, reasons.get(context.view(site))) for site in _inner(context))
    return {name: reason for name, reason in found if reason is not None}


def _counts(
    context: CalibrationContext, views: Sequence[View], samples: Samples
) -> Mapping[View, int | str]:
    """Rows of each view, of a convolution the inputs that it is run on; or why it cannot be seen."""
    if not views:
        return {}
    totals = dict.fromkeys(views, 0)
    values = list(dict.fromkeys(name for view in views for name in view.values))
    try:
        for found in context.observe(values, samples):
            for view in views:
                shape = found[view.value].shape
                totals[view] += shape[0] if view.window else math.prod(shape[:-1])
    except ModelError as error:
        if len(views) > 1:
            alone = (_counts(context, [view], samples) for view in views)
            return {view: count for one in alone for view, count in one.items()}
        logger.info("%s: cannot be seen: %s", views[0].value, error)
        return {views[0]: f"onnxruntime does not give what it reads ({error})"}
    return totals
