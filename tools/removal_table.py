"""What ``tools.removal_curve --rows`` measured, over models and draws: means, standard errors, and pairs of methods.

    python -m tools.removal_table FILE.jsonl [--measure error|cosine|nats] [--against obs] [--by share|samples]

Means over all models and draws, with the standard error of the mean over *models* (draws of one model share its
weights, so that they are averaged first); of one model alone, over its draws. Then, of every method, its ratio to
another one on the same model, draw and share: the geometric mean, its 95 % interval (Student's t, over the same units
as the standard error), and in how many of the pairs it is smaller.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
from scipy import stats

Key = tuple[str, int]
"""Model and draw."""


def mean_and_error(values: dict[Key, float]) -> tuple[float, float]:
    """The mean, and its standard error: over models, or over the draws of one; NaN of one value."""
    models: dict[str, list[float]] = defaultdict(list)
    for (model, _), value in values.items():
        models[model].append(value)
    units = (
        np.array([np.mean(draws) for draws in models.values()])
        if len(models) > 1
        else np.array(list(values.values()))
    )
    error = float(units.std(ddof=1) / np.sqrt(units.size)) if units.size > 1 else float("nan")
    return float(units.mean()), error


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--measure", default="error", choices=("error", "cosine", "nats"))
    parser.add_argument("--against", default="obs")
    parser.add_argument("--by", default="share", choices=("share", "samples"))
    options = parser.parse_args()
    cells: dict[str, dict[float, dict[Key, float]]] = {}
    for line in options.rows.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        cell = cells.setdefault(row["method"], {}).setdefault(row[options.by], {})
        cell[row["model"], row["draw"]] = row[options.measure]
    columns = sorted({column for by in cells.values() for column in by})
    told = [f"{column:.0%}" if options.by == "share" else str(column) for column in columns]
    print(f"| {options.measure} | " + " | ".join(told) + " |")
    print("|---|" + "---|" * len(columns))
    for method, by in cells.items():
        print(
            f"| {method} | "
            + " | ".join(_mean(by.get(column, {})) for column in columns)
            + " |"
        )
    base = cells.get(options.against, {})
    print(f"\n| over {options.against} | " + " | ".join(told) + " |")
    print("|---|" + "---|" * len(columns))
    for method, by in cells.items():
        if method != options.against:
            pairs = [_ratio(by.get(column, {}), base.get(column, {})) for column in columns]
            print(f"| {method} | " + " | ".join(pairs) + " |")


def _mean(values: dict[Key, float]) -> str:
    if not values:
        return ""
    mean, error = mean_and_error(values)
    return f"{mean:.3g} ± {error:.1g} ({len(values)})"


def _ratio(values: dict[Key, float], base: dict[Key, float]) -> str:
    shared = sorted(values.keys() & base.keys())
    if not shared:
        return ""
    ratios = {key: values[key] / base[key] for key in shared}
    better = sum(ratio < 1 for ratio in ratios.values())
    if min(ratios.values()) <= 0:  # a loss in nats may be a gain
        return f"less in {better} of {len(shared)}"
    mean, error = mean_and_error({key: float(np.log(ratio)) for key, ratio in ratios.items()})
    units = len({model for model, _ in shared})
    wide = error * float(stats.t.ppf(0.975, (units if units > 1 else len(shared)) - 1))
    low, high = np.exp([mean - wide, mean + wide])
    return f"{np.exp(mean):.3f} ({low:.3f} to {high:.3f}), less in {better} of {len(shared)}"


if __name__ == "__main__":
    _main()
