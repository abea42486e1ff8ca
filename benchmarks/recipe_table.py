"""The table of ``recipes.py``: bits/dim of each recipe, and its difference to the base.

A number is the mean over images and seeds. The number in brackets is the difference from the base,
paired by seed: the mean over seeds of the difference of the two means over images, with its 95%
interval over seeds (Student's t). The column "best" has the estimator with the lowest mean. If the
base has no number in a column, the difference is from the base's best.
"""

import itertools
from typing import Any

import numpy as np

from sbml.density.estimators import Cell
from sbml.statistics.intervals import mean_interval

# The columns of the table, by ``data.dequantization``, because a network knows the density of the
# data that it was trained on. Only ``levels`` learns a decoder, which the last column needs.
CELLS = {
    "uniform": (Cell("ode", "uniform"), Cell("bound", "uniform")),
    "centre": tuple(
        Cell(*pair)
        for pair in (("ode", "truncated_normal"), ("bound", "categorical"), ("bound", "learned"))
    ),
}


def difference(values: np.ndarray, base: np.ndarray) -> str:
    """The mean of ``values (seeds, images)``, and its difference to ``base``, paired by seed."""
    gap = mean_interval(np.mean(values, axis=1) - np.mean(base, axis=1))
    return f"{np.mean(values):.4f} ({gap.mean:+.4f} ± {gap.ci95:.4f})"


def table(rows: dict[str, list[dict[str, Any]]]) -> str:
    """A markdown table of ``rows``, which has the lines of all seeds by recipe, the base first."""
    computed = {
        n for lines in rows.values() for line in lines for n in line.get("bits_per_dim", ())
    }
    names = [cell.name for cell in itertools.chain(*CELLS.values()) if cell.name in computed]
    text = [f"| recipe | steps | {' | '.join(names)} | best |", "|---" * (3 + len(names)) + "|"]
    base: dict[str, np.ndarray] = {}
    for recipe, lines in rows.items():
        start = f"| {recipe or 'base'} | {lines[0]['steps']} | "
        if failed := [line["failed"] for line in lines if "failed" in line]:
            if not base:
                raise ValueError(f"the base failed, choose another one: {failed[0]}")
            text.append(start + f"{len(failed)} failed" + " |" * (1 + len(names)))
            continue
        values = {n: [line["bits_per_dim"].get(n) for line in lines] for n in names}
        columns = {n: np.array(v) for n, v in values.items() if None not in v}
        columns["best"] = min(columns.values(), key=np.mean)
        base = base or columns
        entries = (
            difference(columns[n], base.get(n, base["best"])) if n in columns else ""
            for n in [*names, "best"]
        )
        text.append(start + " | ".join(entries) + " |")
    return "\n".join(text)
