"""``report.html`` of ``--mode=table``: log-likelihoods of a table's rows, and marginals of samples.

The difference of a baseline is the mean over test rows of log p of the model minus log p of the
baseline, with the 95% interval of paired values: a positive difference means a better model.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from sbml.program.report import page, plots, result

UNIT = "nats per row"
MARGINALS, PAIRS = 24, 4  # the largest numbers of figures


def verdict(best: Mapping[str, Any]) -> str:
    """Whether the model beats the ``best`` baseline, in words."""
    (low, high), name = best["difference_interval"], best["name"]
    if not math.isfinite(best["difference"]):
        return (
            f"The model cannot be compared with the best baseline, {name}: log p of some rows is "
            "not finite."
        )
    gap = f"{abs(best['difference']):.3f} {UNIT}"
    said = f"95% interval of the difference {low:+z.3f} to {high:+z.3f}"
    if low > 0:
        return f"The model beats the best baseline, {name}, by {gap} ({said})."
    if high < 0:
        return f"The model does not beat the baseline {name}: it is {gap} worse ({said})."
    side = "better" if best["difference"] > 0 else "worse"
    return (
        f"The model does not clearly beat the best baseline, {name}: it is {gap} {side}, within "
        f"the error ({said})."
    )


def line(row: Mapping[str, Any]) -> str:
    """A result in one line, with its difference from the model. The prior's error is below."""
    after = ""
    if "difference" in row:
        low, high = row["difference_interval"]
        after = f", model minus {row['name']} {row['difference']:+z.4f} [{low:+z.4f}, {high:+z.4f}]"
    words = result.said({**row}, UNIT, "rows", after=f"{after}, {row['chosen']}")
    return f"{row['name']}: log p {words}"


def render(
    content: Mapping[str, Any],
    values: np.ndarray,
    samples: np.ndarray,
    curves: Sequence[Mapping[str, Any]],
) -> str:
    """The page, which is that of the report with other parts.

    Args:
      content: the content of ``table.json``.
      values: test rows in the units of the file, ``(n, d)``.
      samples: samples of the model, ``(m, d)``.
      curves: the metrics of the training.
    """
    names, model = [column["name"] for column in content["columns"]], content["results"][0]
    marginals = [
        plots.figure(
            f"Marginal of {name}",
            partial(plots.marginal, data=values[:, i], samples=samples[:, i], label=name),
            width=2.5,
            height=1.7,
        )
        for i, name in enumerate(names[:MARGINALS])
    ]
    # As many samples as rows, so that both look equally dense, in the range of the rows.
    ends = np.stack([values.min(axis=0), values.max(axis=0)])
    limits = ends + 0.04 * np.ptp(ends, axis=0) * np.array([[-1], [1]])
    shown_rows = (
        ("held-out rows", values, plots.INK),
        ("samples", samples[: len(values)], plots.ACCENT),
    )
    pairs = []
    for (i, j), (what, rows, colour) in itertools.product(_dependent(values), shown_rows):
        each, own = rows[:, [i, j]], limits[:, [i, j]]
        drawn = {"rows": each, "limits": own, "labels": (names[i], names[j]), "colour": colour}
        outside = int(np.any((each < own[0]) | (each > own[1]), axis=1).sum())
        said = f"{len(rows):,} {what}" + (f", {outside:,} of them outside" if outside else "")
        title = f"{names[i]} and {names[j]}, {what}"
        pairs.append(plots.figure(title, partial(plots.pair, **drawn), f"{said}."))
    rows = [page.row(r["name"], r, ours=r is model, key="log_p") for r in content["results"]]
    caption = "Bars: 95% intervals of each mean. The paired differences below are more precise."
    step, scores = np.array([[p["step"], p["log_p_z"]] for p in content["validation"]], float).T
    unit = "log p, whitened, nats per row"
    draw = partial(plots.validation, step=step, values=scores, half_width=0 * step, label=unit)
    choice = "Validation rows: the step with the largest log p is evaluated."
    loss = page.training([{**point, "images_per_s": None} for point in curves])
    return page.render(
        "table.html",
        report=content,
        title=content["title"],
        warnings=content["warnings"],
        results=content["results"],
        verdict=page.verdict(model, "rows"),
        comparison=page.rows_figure("Comparison", rows, f"{UNIT}, higher is better", caption),
        losses=[plots.figure("Validation", draw, choice), loss],
        marginals=marginals,
        pairs=pairs,
        hidden=len(names) - len(marginals),
        details={"Configuration": page.flat(content["config"])},
    )


def _dependent(values: np.ndarray) -> list[tuple[int, int]]:
    """The pairs of columns, among the first ``MARGINALS``, whose rank correlations have the largest
    absolute values."""
    ranks = values[:, :MARGINALS].argsort(axis=0).argsort(axis=0)
    pairs = list(itertools.combinations(range(ranks.shape[1]), 2))
    strength = np.abs(np.atleast_2d(np.corrcoef(ranks.T)))
    return sorted(pairs, key=lambda pair: -strength[pair])[:PAIRS]
