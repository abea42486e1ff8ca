"""``comparison.html``: evaluated runs side by side, with paired differences to the first.

For a cell (estimator, dequantizer, K) that two runs share, with b_i the bits/dim of image i,

    difference = mean_i (b_i - b_i of the first run)  +-  t_{n-1, 0.975} S / sqrt(n)

where n is the number of images that both runs evaluated, and S the standard deviation of the n
differences. An image that is hard for one model is usually hard for another too, so this interval
is much narrower than the intervals of the two means. It contains the noise of the choice of images
and of the random draws, but not the differences between trainings with different seeds.
"""

import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import numpy as np

from sbml.intervals import mean_interval
from sbml.report import page, plots, summary
from sbml.report.result import Result
from sbml.runtime import metrics
from sbml.runtime.workdir import EVALUATION, Workdir

COLUMNS, ROWS = 8, 4  # of a grid of samples


@dataclasses.dataclass(frozen=True)
class Run:
    """An evaluated work directory.

    Attributes:
      name: the name of the run on the page.
      evaluation: the content of ``evaluation.json``.
      results: the results by their names.
      bits: for each result, the ids ``(n,)`` and the bits/dim ``(n,)`` of the images.
      seconds: the duration of the training in seconds; None if it is not known.
      samples: uint8 ``(m, h, w, c)``; None if there are none of the checkpoint that was evaluated.
      quality: measures of the quality of the samples, by name.
    """

    name: str
    evaluation: Mapping[str, Any]
    results: Mapping[str, Result]
    bits: Mapping[str, tuple[np.ndarray, np.ndarray]]
    seconds: float | None
    samples: np.ndarray | None
    quality: Mapping[str, float]

    @classmethod
    def read(cls, workdir: Workdir, name: str = "") -> "Run":
        """The run of ``workdir``, with the name of its folder if ``name`` is empty."""
        evaluation = workdir.read(EVALUATION)
        results = {r.name: r for r in map(Result.read, evaluation["results"])}
        shared = summary.table_of(workdir, evaluation)
        bits = {}
        for number, result in results.items():
            column = f"{result.column}_bits_per_dim"
            own = f"per_image_{result.column}.npz"
            table = shared if column in shared else summary.table_of(workdir, evaluation, own)
            bits[number] = table["id"], table[column]
        step = evaluation["checkpoint"]["step"]
        curves = [point for point in metrics.read(workdir) if point["step"] <= step]
        drawn = summary.samples_of(workdir, evaluation["checkpoint"])
        found = None if drawn is None else summary.quality_of(workdir, drawn)
        return cls(
            name or workdir.name,
            evaluation,
            results,
            bits,
            curves[-1]["seconds"] if curves else None,
            None if drawn is None else drawn["images"],
            {} if found is None else found["values"],
        )

    @property
    def images(self) -> Mapping[str, Any]:
        """The fingerprint of the images that were evaluated."""
        split = self.evaluation["results"][0]["split"]
        return self.evaluation["data"][split]


def short_names(workdirs: Sequence[Workdir]) -> list[str]:
    """The last folders of each absolute path, as many as are needed to tell all apart."""
    parts = [workdir.absolute.split("/") for workdir in workdirs]
    for count in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(folders[-count:]) for folders in parts]
        if len({*names}) == len(names):
            break
    return names


def compare(runs: Sequence[Run]) -> dict[str, Any]:
    """The numbers of the page as plain values: ``runs``, ``cells`` with a row for each run, and the
    names of the numbers that are ``not_compared``, by run.
    """
    named = [run.name for run in runs]
    if len(runs) < 2:
        raise ValueError(f"a comparison needs two evaluated runs at least, got {named}")
    if len({*named}) < len(named):
        raise ValueError(f"two of the runs are the same or have the same name: {named}")
    first, *others = runs
    for run in others:
        if run.images["id"] != first.images["id"]:
            raise ValueError(
                f"{run.name} was evaluated on other images than {first.name}: {run.images} and "
                f"{first.images}. Evaluate both on the same data and split"
            )
    names = [n for n in first.results if any(n in run.results for run in others)]
    if not names:
        raise ValueError(
            f"the runs have no number in common: {first.name} has {', '.join(first.results)}; "
            + "; ".join(f"{run.name} has {', '.join(run.results)}" for run in others)
            + ". Evaluate them with the same eval.estimators and eval.dequantizers"
        )
    left = {run.name: [n for n in run.results if n not in names] for run in runs}
    return {
        "runs": [
            {
                "name": run.name,
                "network": run.evaluation["model"]["name"],
                "parameters": run.evaluation["model"]["parameters"],
                "step": run.evaluation["checkpoint"]["step"],
                "training_seconds": run.seconds,
                "warnings": run.evaluation["warnings"],
                "quality": run.quality,
            }
            for run in runs
        ],
        "data": dict(first.images),
        "cells": [
            {"name": n, "rows": [_row(run, first, n) for run in runs if n in run.results]}
            for n in names
        ],
        "not_compared": {name: numbers for name, numbers in left.items() if numbers},
    }


def _row(run: Run, first: Run, name: str) -> dict[str, Any]:
    result = run.results[name]
    row: dict[str, Any] = {
        "run": run.name,
        "bits_per_dim": result.bits_per_dim,
        "interval": result.interval,
        "n": result.n,
        "smallest_time": result.smallest_time,
        "nfe_mean": result.nfe_mean,
        "converged": result.converged,
    }
    if run is first:
        return row
    (ids, bits), (first_ids, first_bits) = run.bits[name], first.bits[name]
    common, here, there = np.intersect1d(ids, first_ids, return_indices=True)
    if not len(common):
        return row
    gap = mean_interval(bits[here] - first_bits[there])
    return row | {"difference": gap.mean, "difference_interval": list(gap.bounds), "pairs": gap.n}


def differing(runs: Sequence[Run]) -> dict[str, list[str]]:
    """The fields of the configs that are not equal in all runs: the value of each run, as text."""
    configs = [page.flat(run.evaluation["config"]) for run in runs]
    names = list(dict.fromkeys(name for config in configs for name in config))

    def shown(value: Any) -> str:
        return value if isinstance(value, str) and value else json.dumps(value)

    texts = {name: [shown(config.get(name, "–")) for config in configs] for name in names}
    return {name: row for name, row in texts.items() if len({*row}) > 1}


def render(runs: Sequence[Run], numbers: Mapping[str, Any]) -> str:
    """The page, one HTML file that opens offline; ``numbers`` are from :func:`compare`."""
    levels = runs[0].images["levels"]
    models = [_texts(about) for about in numbers["runs"]]
    return page.environment().get_template("comparison.html").render(
        title="Comparison of " + ", ".join(run.name for run in runs),
        first=runs[0].name,
        images=numbers["data"],
        cells=[{**cell, "figure": _figure(cell)} for cell in numbers["cells"]],
        runs=models,
        warnings={run.name: run.evaluation["warnings"] for run in runs},
        not_compared=numbers["not_compared"],
        rows=[name for name in dict.fromkeys(itertools.chain(*models)) if name != "name"],
        differing=differing(runs),
        samples=[
            {"name": run.name, "png": _grid(run.samples, levels)}
            for run in runs
            if run.samples is not None
        ],
        text=page.text,
    )  # fmt: skip


def _texts(about: Mapping[str, Any]) -> dict[str, str]:
    seconds = about["training_seconds"]
    left_out = ("quality", "warnings", "training_seconds")
    texts = {name: page.text(value) for name, value in about.items() if name not in left_out}
    time = "–" if seconds is None else str(timedelta(seconds=round(seconds)))
    texts |= {"training time (h:mm:ss)": time, "warnings": page.text(len(about["warnings"]))}
    return texts | {name: page.text(value, ".4g") for name, value in about["quality"].items()}


def _figure(cell: Mapping[str, Any]) -> dict[str, Any]:
    dots = [plots.Dot.of(row["run"], row, ours=i > 0) for i, row in enumerate(cell["rows"])]
    draw = partial(plots.comparison, dots=dots)
    caption = "Bars: 95% intervals of each mean."
    return page.figure(f"{cell['name']}, bits/dim", draw, 10.6, 0.6 + 0.36 * len(dots), caption)


def _grid(samples: np.ndarray, levels: int) -> str:
    scale = max(1, 48 // samples.shape[1])
    shown = samples[: COLUMNS * ROWS]
    grid = plots.image_grid(shown, levels, min(COLUMNS, len(shown)), scale)
    return page.data_url(plots.png(grid))
