"""``comparison.html``: evaluated runs side by side, with paired differences to the first.

For a cell (estimator, dequantizer, K) that two runs share, with b_i the bits/dim of image i,

    difference = mean_i (b_i - b_i of the first run)  +-  t_{n-1, 0.975} S / sqrt(n)

where n is the number of images that both runs evaluated, and S the standard deviation of the n
differences. An image that is hard for one model is usually hard for another too, so this interval
is much narrower than the intervals of the two means. It accounts for the choice of images and for
the random draws, but not for the differences between trainings with different seeds.
"""

import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence

import numpy as np

from sbml.core.types import Json
from sbml.program.report import page, plots, result
from sbml.program.report.pictures import few
from sbml.program.report.stored import Stored
from sbml.program.runtime import metrics
from sbml.program.runtime.workdir import EVALUATION, Workdir
from sbml.statistics.intervals import Interval, mean_interval

Table = tuple[np.ndarray, np.ndarray]  # the ids (n,) and the bits/dim (n,) of images


@dataclasses.dataclass(frozen=True)
class Run:
    """An evaluated work directory.

    Attributes:
      name: the name of the run on the page.
      evaluation: the content of ``evaluation.json``.
      images: the fingerprint of the images that were evaluated.
      results: the results by their names.
      bits: for each result, those of the images.
      seconds: the duration of the training in seconds; None if it is not known.
      samples: uint8 ``(m, h, w, c)``; None if there are none of the checkpoint that was evaluated.
      quality: measures of the quality of the samples, by name.
    """

    name: str
    evaluation: Json
    images: Json
    results: Mapping[str, Json]
    bits: Mapping[str, Table]
    seconds: float | None
    samples: np.ndarray | None
    quality: Mapping[str, float]

    @classmethod
    def read(cls, workdir: Workdir, name: str = "") -> "Run":
        """The run of ``workdir``, with the name of its folder if ``name`` is empty."""
        stored, evaluation = Stored(workdir), workdir.read(EVALUATION)
        results = {result.cell(r).title: r for r in result.read(evaluation["results"])}
        shared = stored.table()
        bits = {}
        for number, row in results.items():
            cell = result.cell(row).name
            column, own = f"{cell}_bits_per_dim", f"per_image_{cell}.npz"
            table = shared if column in shared else stored.table(own)
            bits[number] = table["id"], table[column]
        step = evaluation["checkpoint"]["step"]
        curves = [point for point in metrics.read(workdir) if point["step"] <= step]
        drawn, quality = stored.samples(evaluation["checkpoint"])
        return cls(
            name or workdir.name,
            evaluation,
            evaluation["data"][evaluation["results"][0]["split"]],
            results,
            bits,
            curves[-1]["seconds"] if curves else None,
            None if drawn is None else drawn["images"],
            {} if quality is None else quality["values"],
        )


def short_names(workdirs: Sequence[Workdir]) -> list[str]:
    """The last folders of each absolute path, as many as are needed to tell all apart."""
    parts = [workdir.absolute.split("/") for workdir in workdirs]
    for count in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(folders[-count:]) for folders in parts]
        if len({*names}) == len(names):
            break
    return names


def paired(of: Table, first: Table) -> Interval | None:
    """The mean difference of two tables over the images that both have; None if there are none."""
    _, here, there = np.intersect1d(of[0], first[0], return_indices=True)
    return mean_interval(of[1][here] - first[1][there]) if len(here) else None


def compare(runs: Sequence[Run]) -> Json:
    """The numbers of the page as plain values: ``runs``, the fingerprint ``data`` of the images,
    ``cells`` with a row for each run, and ``lacking``: for each run, what it does not have but
    another run has.
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
    parts = {
        run.name: [
            *run.results,
            *(["training time"] if run.seconds is not None else []),
            *(["samples"] if run.samples is not None else []),
            *(["quality of the samples"] if run.quality else []),
        ]
        for run in runs
    }
    every = dict.fromkeys(itertools.chain(*parts.values()))
    lacking = {name: [part for part in every if part not in own] for name, own in parts.items()}

    def row(run: Run, name: str) -> Json:
        shown = ("bits_per_dim", "interval", "n", "smallest_time", "nfe_mean", "converged")
        found = {"run": run.name, **{key: run.results[name].get(key) for key in shown}}
        if run is not first and (gap := paired(run.bits[name], first.bits[name])):
            low, high = gap.bounds
            found |= {"difference": gap.mean, "difference_interval": [low, high], "pairs": gap.n}
            found["verdict"] = "better" if high < 0 else "worse" if low > 0 else "unclear"
        return found

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
            {"name": n, "rows": [row(run, n) for run in runs if n in run.results]} for n in names
        ],
        "lacking": {name: missing for name, missing in lacking.items() if missing},
    }


def difference_row(row: Json) -> plots.Row:
    """The difference of a run. The verdict is shown by the colour and also as a word."""
    (low, high), colours = row["difference_interval"], {"better": plots.ACCENT, "worse": plots.WARN}
    value = f"{row['difference']:+z.4f}"  # The interval is the bar.
    colour = colours.get(row["verdict"], plots.MUTED)
    return plots.Row(f"{row['run']}: {row['verdict']}", row["difference"], low, high, value, colour)


def differing(runs: Sequence[Run]) -> dict[str, list[str]]:
    """The fields of the configs that are not equal in all runs: the value of each run, as text."""
    configs = [page.flat(run.evaluation["config"]) for run in runs]
    names = list(dict.fromkeys(name for config in configs for name in config))

    def shown(value: object) -> str:
        return value if isinstance(value, str) and value else json.dumps(value)

    texts = {name: [shown(config.get(name, "–")) for config in configs] for name in names}
    return {name: row for name, row in texts.items() if len({*row}) > 1}


def render(runs: Sequence[Run], numbers: Json) -> str:
    """The page, one HTML file that opens offline; ``numbers`` are from :func:`compare`."""
    titles = {n: page.label(r) for run in runs for n, r in run.results.items()}
    cells = []
    for cell in numbers["cells"]:
        rows = [difference_row(row) for row in cell["rows"] if "difference" in row]
        unit = f"bits/dim minus {runs[0].name}"
        caption = (
            "Bars: 95% intervals of the paired differences. Below 0 is better. If the interval "
            "contains 0, it is unclear which run is better."
        )
        figure = page.rows_figure(cell["name"], rows, unit, caption, origin=0.0) if rows else None
        cells.append({**cell, "title": titles[cell["name"]], "figure": figure})
    samples = []
    for run in runs:
        if run.samples is not None:
            png = few(run.samples, run.images["levels"])
            samples.append((run.name, png))
    return page.render(
        "comparison.html",
        title="Comparison of " + ", ".join(run.name for run in runs),
        content=numbers,
        titles=titles,
        cells=cells,
        warnings=[f"{run.name}: {each}" for run in runs for each in run.evaluation["warnings"]],
        differing=differing(runs),
        samples=samples,
        quality=list(dict.fromkeys(itertools.chain(*(run.quality for run in runs)))),
        details={},
    )
