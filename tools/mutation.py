"""How many corruptions of correct rewritten models the gate catches: by its static proof, and by outputs, each alone.

    python -m tools.mutation [--each 3] [--draws 2] [--json OUT.json]

Every kind of rewrite, every kind of corruption, several draws. A mutant that neither part catches must be shown to be
no other model: the exit code is 1 if one is not.
"""

from __future__ import annotations

import argparse
import collections
import json
import pathlib
import sys
from typing import Any

import numpy as np

from tests.e2e.mutants import KINDS, MUTATIONS, judge, mutated, subjects


def main() -> int:
    """Corrupt, judge, print two tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--each", type=int, default=3, help="rewrites of each kind")
    parser.add_argument("--draws", type=int, default=2, help="of each corruption of a rewrite")
    parser.add_argument("--json", type=pathlib.Path)
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    each: int = arguments.each
    wanted: dict[str, int] = dict.fromkeys(KINDS, each)
    for number, subject in enumerate(subjects(wanted)):
        for position, mutation in enumerate(MUTATIONS):
            for draw in range(arguments.draws):
                rng = np.random.default_rng([number, position, draw])
                mutant = mutated(subject, mutation, rng)
                if mutant is None:
                    continue
                found = judge(subject, mutant)
                rows.append(
                    {
                        "kind": subject.kind,
                        "mutation": mutation.__name__,
                        "proof": found.proof == "caught",
                        "outputs": found.outputs == "caught",
                        "caught": found.caught,
                        "equivalent": found.equivalent,
                    }
                )
    for key in ("kind", "mutation"):
        _print_table(rows, key)
    lost = [row for row in rows if not row["caught"] and row["equivalent"] is None]
    for row in lost:
        print(f"NOT CAUGHT: {row['mutation']} of {row['kind']}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n", "utf-8")
    return 1 if lost or not rows else 0


def _print_table(rows: list[dict[str, Any]], key: str) -> None:
    groups: dict[str, list[dict[str, Any]]] = collections.defaultdict(list)
    for row in rows:
        groups[row[key]].append(row)
    print(f"\n| {key} | mutants | equivalent | caught | by the proof | by outputs |")
    print("|---|---|---|---|---|---|")
    for name, found in (*sorted(groups.items()), ("all", rows)):
        real = [row for row in found if row["equivalent"] is None]
        shares = [
            f"{sum(row[part] for row in real)} of {len(real)}"
            for part in ("caught", "proof", "outputs")
        ]
        print(f"| {name} | {len(found)} | {len(found) - len(real)} | {' | '.join(shares)} |")


if __name__ == "__main__":
    sys.exit(main())
