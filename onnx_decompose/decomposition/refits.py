"""What stands in the place of a site's weight after compensation."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from numpy.typing import NDArray

    from onnx_decompose.graph.recurrent import RecurrentWeight
    from onnx_decompose.graph.sites import Site
    from onnx_decompose.graph.study import Study

__all__ = ["Refit", "weight_of"]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Refit:
    """A site's new entries, and what makes up for the rest.

    Attributes:
        stored: (K, N) what is stored for the weight, of the stored type; where the entry was removed, what stands for
            nothing: zero, or the zero point of integers.
        added: (N,) float64, what is added to the product x W; it goes into the bias.
    """

    stored: NDArray[Any]
    added: NDArray[np.float64]


def weight_of(
    study: Study, site: Site | RecurrentWeight, refits: Mapping[str, Refit]
) -> NDArray[Any]:
    """The stored entries of ``site``, (K, N): refitted, or the original's."""
    refit = refits.get(site.name)
    return study.stored(site) if refit is None else refit.stored
