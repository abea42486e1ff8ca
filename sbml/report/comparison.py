"""``comparison.html``: evaluated runs side by side, with paired differences to the first.

For a cell (estimator, dequantizer, K) that two runs share, with b_i the bits/dim of image i,

    difference = mean_i (b_i - b_i of the first run)  +-  t_{n-1, 0.975} S / sqrt(n)

over the n images that both evaluated, S the standard deviation of the n differences. An image that
is hard for one model is hard for another too, so this interval is much narrower than those of the
two means. It holds the noise of images and draws, but not that of a training with another seed.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import numpy as np

from sbml.intervals import mean_interval
from sbml.report import images, page, plots
from sbml.report.result import Result
from sbml.runtime import metrics
from sbml.runtime.workdir import EVALUATION, PER_IMAGE, SAMPLES, Workdir

COLUMNS, ROWS = 8, 4  # of a grid of samples
PLAIN = {"title", "command", "versions"}


@dataclasses.dataclass(frozen=True)
class Run:
    """What an evaluated work directory holds.

    Attributes:
      name: how the page calls it.
      evaluation: ``evaluation.json``.
      results: the results, by the name of their cell.
      bits: for each cell, ids ``(n,)`` and bits/dim ``(n,)`` of the images.
      seconds: of training; None where it is not known.
      samples: uint8 ``(m, h, w, c)``, or None.
    """

    name: str
    evaluation: Mapping[str, Any]
    results: Mapping[str, Result]
    bits: Mapping[str, tuple[np.ndarray, np.ndarray]]
    seconds: float | None
    samples: np.ndarray | None

    @classmethod
    def read(cls, workdir: Workdir) -> "Run":
        """The run of ``workdir``.

        Raises:
          ValueError: it was not evaluated, or a file of it is damaged.
        """
        evaluation = workdir.read(EVALUATION)
        results = {r.name: r for r in map(Result.read, evaluation["results"])}
        shared = workdir.read(PER_IMAGE)
        bits = {}
        for name, result in results.items():
            column = f"{result.column}_bits_per_dim"
            table = shared if column in shared else workdir.read(f"per_image_{result.column}.npz")
            bits[name] = table["id"], table[column]
        rows = metrics.read(workdir)
        drawn = workdir.read(SAMPLES) if workdir.has(SAMPLES) else None
        return cls(
            workdir.name,
            evaluation,
            results,
            bits,
            rows[-1]["seconds"] if rows else None,
            None if drawn is None else drawn["images"],
        )

    @property
    def images(self) -> Mapping[str, Any]:
        """The fingerprint of the images that were evaluated."""
        split = self.evaluation["results"][0]["split"]
        return self.evaluation["data"][split]


def compare(runs: Sequence[Run]) -> dict[str, Any]:
    """The numbers of the page as plain values: ``runs``, and ``cells`` with a row for each run.

    Raises:
      ValueError: fewer than two runs, two of one name, runs of different images, or no common cell.
    """
    _check(runs)
    first, *others = runs
    names = [n for n in first.results if any(n in run.results for run in others)]
    if not names:
        raise ValueError(
            f"the runs have no number in common: {first.name} has {', '.join(first.results)}; "
            + "; ".join(f"{run.name} has {', '.join(run.results)}" for run in others)
        )
    cells = []
    for name in names:
        rows = [_row(run, first, name) for run in runs if name in run.results]
        cells.append({"name": name, "rows": rows})
    return {"runs": [_about(run) for run in runs], "data": dict(first.images), "cells": cells}


def _check(runs: Sequence[Run]) -> None:
    names = [run.name for run in runs]
    if len(runs) < 2:
        raise ValueError(f"a comparison needs two evaluated runs at least, got {names}")
    if len({*names}) < len(names):
        raise ValueError(f"two of the runs have one name, {names}: rename a work directory")
    first = runs[0]
    for run in runs[1:]:
        if run.images["id"] != first.images["id"]:
            raise ValueError(
                f"{run.name} was evaluated on other images than {first.name}: {run.images} and "
                f"{first.images}. Evaluate both on the same data and split"
            )


def _row(run: Run, first: Run, name: str) -> dict[str, Any]:
    result = run.results[name]
    row: dict[str, Any] = {
        "run": run.name,
        "bits_per_dim": result.bits_per_dim,
        "interval": result.interval,
        "n": result.n,
        "nfe_mean": result.nfe_mean,
        "converged": result.converged,
    }
    if run is first:
        return row
    both = run.bits[name][0], first.bits[name][0]
    ids, ours, theirs = np.intersect1d(*both, return_indices=True)
    if not len(ids):
        return row
    gap = mean_interval(run.bits[name][1][ours] - first.bits[name][1][theirs])
    return row | {"difference": gap.mean, "difference_interval": list(gap.bounds), "pairs": gap.n}


def _about(run: Run) -> dict[str, Any]:
    """What stands beside the numbers."""
    model, quality = run.evaluation["model"], run.evaluation.get("quality", {})
    about = {"name": run.name, "network": model["name"], "parameters": model["parameters"]}
    about |= {"step": run.evaluation["checkpoint"]["step"], "training_seconds": run.seconds}
    return about | {"warnings": len(run.evaluation["warnings"]), "quality": quality}


def differing(runs: Sequence[Run]) -> dict[str, list[str]]:
    """The fields of the configs that are not equal in all runs, with each run's value."""
    configs = [page.flat(run.evaluation["config"]) for run in runs]
    names = list(dict.fromkeys(name for config in configs for name in config))
    rows = {name: [page.text(config.get(name)) for config in configs] for name in names}
    return {name: row for name, row in rows.items() if len({*row}) > 1}


def render(runs: Sequence[Run], numbers: Mapping[str, Any]) -> str:
    """The page: one HTML file that opens offline."""
    levels = runs[0].images["levels"]
    return page.environment().get_template("comparison.html").render(
        title="Comparison of " + ", ".join(run.name for run in runs),
        first=runs[0].name,
        images=numbers["data"],
        cells=[{**cell, "figure": _figure(cell)} for cell in numbers["cells"]],
        runs=[_shown(about) for about in numbers["runs"]],
        differing=differing(runs),
        samples=[
            {"name": run.name, "png": _grid(run.samples, levels)}
            for run in runs
            if run.samples is not None
        ],
        text=page.text,
    )  # fmt: skip


def _shown(about: Mapping[str, Any]) -> dict[str, str]:
    seconds = about["training_seconds"]
    shown = {name: page.text(value) for name, value in about.items() if name != "quality"}
    shown["training_seconds"] = "–" if seconds is None else str(timedelta(seconds=round(seconds)))
    return shown | {name: page.text(value, ".4g") for name, value in about["quality"].items()}


def _figure(cell: Mapping[str, Any]) -> dict[str, Any]:
    rows = [page.estimate(row["run"], row, ours=i > 0) for i, row in enumerate(cell["rows"])]
    name = f"{cell['name']}, bits/dim"
    draw = partial(plots.comparison, estimates=rows)
    caption = "Bars: 95% intervals of each mean."
    return page.figure(name, draw, 10.6, 0.6 + 0.36 * len(rows), caption)


def _grid(samples: np.ndarray, levels: int) -> str:
    scale = max(1, 48 // samples.shape[1])
    shown = samples[: COLUMNS * ROWS]
    return page.data_url(images.image_grid(shown, levels, min(COLUMNS, len(shown)), scale))
