"""Does likelihood training improve the likelihood? The paper's claim, on data that a CPU trains.

    python -m experiments.claims [--quick] [--out=runs/claims]

The paper says that maximum likelihood training "consistently improves the likelihood of score-based
models across multiple datasets, stochastic processes, and model architectures". Here five trainings
are compared, each of which adds one change to the one before it:

    original     the original weighting, times uniform in t
    weighted     likelihood weighting
    importance   times by importance sampling: the paper's method
    draws        times on a lattice with a learned density, antithetic noises
    levels       an integer denoiser instead of noise prediction

on one axis at a time from the digits, the SDE VP and the network DDPM++ of
``configs/digits_vp.py:uniform``: other budgets of steps, processes, data and networks. A *run* is
one training with one seed; it is evaluated on the test images after each number of steps in
``STEPS``.

What is equal for all trainings of a comparison: the images, the network, the labels (log-SNR), the
rows in a batch, the steps, the average of the parameters, and the draws of the evaluation. The
optimizer is that of the main job, Muon (``--optimizer``), because the question is what the loss
changes when the optimizer is good; the paper used Adam. The learning rate is constant after the
warm-up, so that the first steps do not depend on the number of all steps, and one run gives the
numbers of all budgets; a cosine would give better numbers to all. Learning rate and clipping are
chosen for each training among ``SETTINGS`` by the number of the ODE on held-out training images.
They are chosen on the digits with VP and DDPM++, also for the other processes and networks, and
again for other data. The test images choose nothing.

The smallest time is each SDE's own. As times of different SDEs have different noise (at t = .01 it
is .045 for VP, .002 for sub-VP, .011 for VE and .5 for linear VE), the last budget is also
evaluated from the time at which sigma / alpha is ``SAME_NOISE``, where all models are densities of
the same noisy images; compare processes by these numbers (``ode_same_noise``,
``bound_same_noise``).

A number is a line of ``--out``/claims.jsonl, with the values of all images, and is computed once
(``experiments.grid``). After a kill the same command continues, also in the middle of a training.
The same command in a second process shares the work. At the end, and with ``--table`` at once, the
lines there become claims.md, claims.tex, claims.png and claims.json in ``--out``. Besides the
paper's table and the differences at equal steps, there are differences at equal CPU-time, and, if
``experiments.autoregressive`` has added its lines, those to the autoregressive models.
claims_noise.png has the noise of the loss under each weighting (``experiments.loss_noise``).
"""

import argparse
import dataclasses
import functools
import json
import math
import pathlib
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from experiments import autoregressive, figures, grid, loss_noise, table2
from sbml import data
from sbml.core.files import strict, write_whole
from sbml.density.estimators import Cell
from sbml.program.config.build import Experiment
from sbml.program.config.config import load
from sbml.program.config.trained import Trained
from sbml.program.evaluation import samples
from sbml.program.evaluation.cells import Evaluation
from sbml.program.modes import quality, train, train_dequantizer
from sbml.program.runtime import cpu, refusals
from sbml.program.runtime.workdir import Workdir
from sbml.statistics import intervals

# The recipes (``experiments.grid``) of the four axes.
SMALL = "model.num_res_blocks=1+training.log_every=50"
DATA = {
    "digits": ("digits_vp:uniform", ""),
    "fashion": ("fashion_mnist_vp", SMALL + "+eval.max_images=64"),
    "photos": ("photos_vp", SMALL + "+model.nf=8+eval.max_images=64"),
}
PROCESSES = {name: f"sde.name={name}" for name in ("vp", "subvp", "ve", "linear_ve")}
NETWORKS = {"DDPM++": "", "DDPM++ deep": "model.num_res_blocks=4", "VDM": "vdm"}
UNIFORM = "training.importance_sampling=False"
TRAININGS = {
    "original": f"noise+iid+{UNIFORM}+training.likelihood_weighting=False",
    "weighted": f"noise+iid+{UNIFORM}",
    "importance": "noise+iid",
    "draws": "noise+ours",
    "levels": "levels+ours",
}
PAPER = ("original", "weighted", "importance")
# Learning rate and clipping. The clipping of the configs is below the usual norm of the gradient.
SETTINGS = ((3e-3, 1 / 12), (1e-2, 1 / 12), (3e-2, 1 / 12), (1e-2, 1.0))
STEPS = {"digits": (600, 1_200, 2_500), "fashion": (300, 600, 1_200), "photos": (300, 600, 1_200)}
SAME_NOISE = 0.011  # VE's smallest noise is .01.
CELLS = {
    "ode": Cell("ode", "uniform"),
    "bound": Cell("bound", "uniform"),
    "ode_same_noise": Cell("ode", "uniform"),
    "bound_same_noise": Cell("bound", "uniform"),
    "ode_variational": Cell("ode", "variational"),
}
FEATURES = "features"  # the feature distance of samples, a number without images
SAMPLES = 500
HELD_OUT = 0.15  # the part of the training images on which a setting is chosen


class Run(NamedTuple):
    """One training with one seed."""

    data: str = "digits"
    process: str = "vp"
    network: str = "DDPM++"
    training: str = "original"
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one command computes.

    Attributes:
      out: the file of lines.
      groups: the runs, the most valuable first, with what is measured after the last step besides
        the numbers ``ode`` and ``bound``.
      steps: the budgets by data; settings are chosen after the first one.
      settings: learning rates and clippings; data other than the digits have the first two.
      recipe: changes of all configs.
      optimizer: ``config.optim.name``.
      manual_dir: the folder of Fashion-MNIST's files, ``config.data.manual_dir``.
    """

    out: pathlib.Path
    groups: tuple[tuple[tuple[Run, ...], tuple[str, ...]], ...]
    steps: Mapping[str, tuple[int, ...]]
    settings: tuple[tuple[float, float], ...] = SETTINGS
    recipe: str = ""
    optimizer: str = "muon"
    manual_dir: str = ""

    def config(self, run: Run, steps: int, setting: tuple[float, float]) -> ConfigDict:
        """The config of ``run`` for ``steps`` steps with a learning rate and a clipping."""
        file, changes = DATA[run.data]
        of_run = PROCESSES[run.process], NETWORKS[run.network], TRAININGS[run.training]
        recipe = "+".join(filter(None, (changes, self.recipe, *of_run)))
        config, first = grid.with_recipe(load(file), recipe), self.steps[run.data][0]
        config.seed = run.seed
        config.training.update(num_steps=steps, checkpoint_every=200, keep_last=1, keep_every=0)
        config.training.sample_every = 0
        config.optim.update(name=self.optimizer, lr=setting[0], grad_clip=setting[1])
        config.optim.update(schedule="constant", warmup=first // 6)
        config.optim.ema = min(0.99, max(0.0, 1 - 6.5 / first))
        return config

    def experiment(self, config: ConfigDict) -> Experiment:
        """The objects of ``config``, which reads files in ``manual_dir``."""
        config = config.copy_and_resolve_references()
        if config.data.source.startswith("tfds:"):
            config.data.manual_dir = self.manual_dir
        return Experiment(config)

    def choices(self, run: Run) -> dict[tuple[float, float], ConfigDict]:
        """The settings for ``run``, with the configs of the runs by which one is chosen."""
        like, found = Run(data=run.data, training=run.training), {}
        for setting in self.settings if run.data == "digits" else self.settings[:2]:
            config = found[setting] = self.config(like, self.steps[run.data][0], setting)
            config.data.validation = HELD_OUT
            config.eval.split = data.VALIDATION
        return found


def groups(trainings: Sequence[str], seeds: int) -> Iterator[tuple[tuple[Run, ...], Any]]:
    """The groups of runs of the whole grid, in their order."""
    same, pair = ("ode_same_noise", "bound_same_noise"), ("original", "importance")

    def group(names: Sequence[str], seed: int, **place: str) -> tuple[Run, ...]:
        return tuple(Run(training=name, seed=seed, **place) for name in names)

    for seed in range(seeds):
        yield group(trainings, seed), (FEATURES,)
    for seed in range(seeds):
        yield group(pair, seed), same
        for name in ("subvp", "linear_ve"):
            yield group(pair, seed, process=name), same
        yield group(PAPER, seed, process="ve"), same
    for seed in range(seeds):
        for name in ("fashion", "photos"):
            yield group(pair, seed, data=name), ()
        for name in ("DDPM++ deep", "VDM"):
            yield group(pair, seed, network=name), ()
    for seed in range(seeds):
        yield group((*pair, "levels"), seed), ("ode_variational",)
    for seed in range(seeds):
        for name in ("subvp", "linear_ve"):
            yield group(("weighted",), seed, process=name), same


def key(config: ConfigDict, measure: str) -> str:
    """The ``id`` of the line of a number."""
    return f"{measure} {grid.identity(config)}"


def with_measure(plan: Plan, config: ConfigDict, measure: str) -> ConfigDict:
    """``config`` with the settings of the evaluation that ``measure`` needs."""
    config = config.copy_and_resolve_references()
    if measure.endswith("same_noise"):
        sde = plan.experiment(config).sde
        config.eval.smallest_time = float(sde.time(jnp.asarray(-2 * math.log(SAME_NOISE))))
    if measure == FEATURES:
        config.sampling.update(num_images=SAMPLES, batch_size=100)
    return config


def measured(plan: Plan, config: ConfigDict, workdir: Workdir, measure: str) -> grid.Line:
    """The number called ``measure`` of the newest checkpoint in ``workdir``: ``values`` of all
    images in bits/dim, or one ``value``."""
    experiment = plan.experiment(config)
    if measure == "ode_variational":
        train_dequantizer.run(experiment, workdir)
    trained = Trained.of(experiment, workdir)
    if measure == FEATURES:
        extract = quality.extractor(experiment.config)
        drawn = samples.preview(experiment, trained.params, SAMPLES)
        training = quality.reference(experiment, extract, experiment.images("train"))
        found = quality.distances_of_features(extract, drawn.images, training)
        name, value = next(iter(found.items()))
        return {"value": value, "name": name, "failed_samples": int(drawn.failed.sum())}
    evaluation = Evaluation.of_split(trained, config.eval.split)
    return {"values": grid.of_images(evaluation, CELLS[measure]).tolist()}


def fit(plan: Plan, config: ConfigDict, workdir: Workdir) -> float | None:
    """Train until the number of steps of ``config``, from the newest checkpoint on.

    Returns:
      CPU-seconds per step, None if there was no step.
    """
    experiment = plan.experiment(config)
    steps, done = config.training.num_steps, experiment.config.training.checkpoints(workdir).steps()
    newest = max(done, default=0)
    if newest > steps:
        shutil.rmtree(workdir)
        newest = 0
    if newest == steps:
        return None
    start = time.process_time()
    train.run(experiment, workdir)
    return (time.process_time() - start) / (steps - newest)


def compute(plan: Plan, run: Run, config: ConfigDict, folder: str, measures: Sequence[str]) -> bool:
    """Train ``run`` until the number of steps of ``config`` in the work directory ``folder``, and
    add the lines of ``measures`` that are missing; whether training did not fail."""
    configs = {name: with_measure(plan, config, name) for name in measures}
    about = {**run._asdict(), "steps": config.training.num_steps, "split": config.eval.split}
    about |= {"lr": config.optim.lr, "grad_clip": config.optim.grad_clip}
    about |= {"optimizer": config.optim.name}
    workdir, lines = Workdir(grid.folder_of(plan.out) / folder), grid.read(plan.out)
    if "failed" in lines.get(key(config, "training"), {}):
        return False
    if all(key(configs[name], name) in lines for name in measures):
        return True

    def trained() -> grid.Line:
        try:
            return {"measure": "training", **about, "cpu_per_step": fit(plan, config, workdir)}
        except train.NonFiniteLoss as error:
            return {"measure": "training", **about, "failed": str(error)}

    if "failed" in grid.compute_once(plan.out, key(config, "training"), trained):
        return False
    fit(plan, config, workdir)  # It does nothing, unless the line is older than the work directory.
    for name in measures:

        def number(name: str = name) -> grid.Line:
            start = time.process_time()
            found = measured(plan, configs[name], workdir, name)
            return {"measure": name, **about, **found, "cpu": time.process_time() - start}

        line = grid.compute_once(plan.out, key(configs[name], name), number)
        mean = np.mean(line["values"] if "values" in line else line["value"])
        place = " ".join(map(str, run))
        print(f"{place}: {about['steps']} steps, lr {about['lr']:g}, {name} {mean:.4f}", flush=True)
    return True


def choose(plan: Plan, run: Run) -> tuple[float, float]:
    """The setting of ``run``, that with the lowest number of the ODE on held-out training images.

    Raises:
      BusyError: some of these numbers are missing.
      ValueError: no setting trains.
    """
    lines, means = grid.read(plan.out), {}
    for setting, config in plan.choices(run).items():
        if "failed" in lines.get(key(config, "training"), {}):
            continue
        if (line := lines.get(key(config, "ode"))) is None:
            raise grid.BusyError(key(config, "ode"))
        means[setting] = float(np.mean(line["values"]))
    finite = {setting: mean for setting, mean in means.items() if math.isfinite(mean)}
    if not finite:
        raise ValueError(f"{run.training} on {run.data}: no learning rate of {plan.settings} works")
    return min(finite, key=lambda setting: finite[setting])


def try_setting(plan: Plan, run: Run, config: ConfigDict) -> None:
    """Add the number by which the setting of ``config`` may be chosen for ``run``."""
    name = grid.identity(config)
    with grid.claimed(plan.out, name):
        compute(plan, run, config, name, ("ode",))
    shutil.rmtree(grid.folder_of(plan.out) / name, ignore_errors=True)


def complete(plan: Plan, run: Run, last: Sequence[str]) -> None:
    """Add all lines of ``run``; ``last`` is what is measured after the last step only."""
    setting, steps = choose(plan, run), plan.steps[run.data]
    folder = grid.identity(plan.config(run, steps[-1], setting))
    with grid.claimed(plan.out, folder):
        for count in steps:
            config = plan.config(run, count, setting)
            measures = ("ode", "bound", *(last if count == steps[-1] else ()))
            if not compute(plan, run, config, folder, measures):
                break


def tasks(plan: Plan) -> list[Callable[[], None]]:
    """What is to be done, in its order: the choice of a setting stands before its first use."""
    found: dict[Any, Callable[[], None]] = {}
    for runs, last in plan.groups:
        for run in runs:
            for config in plan.choices(run).values():
                like = Run(data=run.data, training=run.training)
                found[grid.identity(config)] = functools.partial(try_setting, plan, like, config)
        for run in runs:
            found[run, last] = functools.partial(complete, plan, run, last)
    return list(found.values())


def interval(values: np.ndarray) -> intervals.Interval:
    """The 95% interval of the mean of ``values (seeds, images)`` over other seeds and other images.

    Seeds and images are crossed: a value is mean + seed + image + rest, and the variance of the
    mean is at most the sum of those of the means by seed and by image. With one seed, the interval
    is over the images only.
    """
    by_image = intervals.mean_interval(values.mean(axis=0))
    if len(values) == 1:
        return by_image
    by_seed = intervals.mean_interval(values.mean(axis=1))
    a, b = by_seed.stderr**2, by_image.stderr**2
    parts = a**2 / (by_seed.n - 1) + b**2 / (by_image.n - 1)
    stderr, freedom = math.sqrt(a + b), (a + b) ** 2 / parts if parts else 1.0
    half = intervals.half_width(stderr, freedom)
    return by_image._replace(stderr=stderr, ci95=half, n=values.size)


Values = dict[str, dict[int, Any]]


def gathered(plan: Plan) -> dict[tuple[Any, ...], Values]:
    """The numbers by (data, process, network, training, steps), then by measure and seed."""
    found: dict[tuple[Any, ...], Values] = {}
    lines: dict[Run, list[grid.Line]] = {}
    for line in grid.read(plan.out).values():
        ours = line["split"] == "test" and line["optimizer"] == plan.optimizer
        if ours and line["measure"] != "training":
            lines.setdefault(Run(*(line[name] for name in Run._fields)), []).append(line)
    for run in dict.fromkeys(run for group, _ in plan.groups for run in group):
        for line in lines.get(run, ()):
            place, number = (*run[:-1], line["steps"]), line.get("values", line.get("value"))
            found.setdefault(place, {}).setdefault(line["measure"], {})[run.seed] = number
    return found


def rows(found: dict[tuple[Any, ...], Values]) -> list[dict[str, Any]]:
    """For each place and measure: the mean, and the difference to the original weighting with the
    same seeds, with 95% intervals."""
    result = []
    for place, numbers in found.items():
        base = found.get((*place[:3], "original", place[4]), {})
        for measure, by_seed in numbers.items():
            row = dict(zip(("data", "process", "network", "training", "steps"), place, strict=True))
            values = np.array([np.atleast_1d(by_seed[seed]) for seed in sorted(by_seed)])
            mean = interval(values if measure != FEATURES else values.T)
            row |= {"measure": measure, "seeds": sorted(by_seed), "images": values.shape[1]}
            row |= {"mean": mean.mean, "ci95": mean.ci95, "by_seed": values.mean(1).tolist()}
            both = sorted(set(by_seed) & set(base.get(measure, {})))
            if both and place[3] != "original":
                gap = np.array([np.subtract(by_seed[s], base[measure][s]) for s in both], float)
                gap = gap.reshape(len(both), -1)
                less = interval(gap if measure != FEATURES else gap.T)
                row |= {"difference": less.mean, "difference_ci95": less.ci95}
                row |= {"difference_by_seed": gap.mean(1).tolist()}
            result.append(row)
    return result


COLUMNS = {"ode": "NLL uniform", "ode_variational": "NLL variational", "bound": "bound uniform"}


def text(mean: float, half: float, sign: str = "") -> str:
    """A number with half of its interval."""
    shown = f"{mean:{sign}.3f}"
    return f"{shown} ± {half:.3f}" if math.isfinite(half) else shown


def tables(found: Sequence[dict[str, Any]]) -> dict[str, list[list[str]]]:
    """The paper's table for each data set, and a table of differences to the original weighting."""
    by_place: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for row in found:
        place = tuple(row[name] for name in ("data", "process", "network", "training", "steps"))
        by_place.setdefault(place, {})[row["measure"]] = row
    of_table2 = []
    for (source, process, network, training, steps), measures in by_place.items():
        name = f"{network}, {training}, {steps} steps"
        shown: table2.Row = {"data": source, "model": name, "sde": process}
        for measure, row in measures.items():
            column = table2.FID if measure == FEATURES else COLUMNS.get(measure)
            if column:
                shown[column] = text(row["mean"], row["ci95"])
            if measure in COLUMNS:  # Those at equal noise have fewer seeds, and no column.
                seeds = len(row["seeds"])
                shown["n"] = f"{seeds} seed{'s' * (seeds > 1)} x {row['images']}"
        of_table2.append(shown)
    result = table2.tables(of_table2, [])
    names = (*CELLS, FEATURES)
    header = ["minus the original weighting", "SDE", "network", "steps", *names, "seeds"]
    for source in dict.fromkeys(place[0] for place in by_place):
        lines = [header]
        for place, measures in by_place.items():
            gaps = {m: row for m, row in measures.items() if "difference" in row}
            if place[0] == source and gaps:
                shown_gaps = [
                    text(gaps[m]["difference"], gaps[m]["difference_ci95"], "+")
                    if m in gaps
                    else "—"
                    for m in names
                ]
                count = str(max(len(row["seeds"]) for row in gaps.values()))
                lines.append([place[3], place[1], place[2], str(place[4]), *shown_gaps, count])
        result[f"{source}, differences to the original weighting"] = lines
    return result


def equal_time(plan: Plan, found: dict[tuple[Any, ...], Values]) -> dict[str, list[list[str]]]:
    """A table for each data set, at the CPU-time of training that the cheapest training needs for
    its last budget.

    The numbers there are interpolated between budgets, linearly in the logarithm of the steps, for
    each image and seed. The cost of a step is the least that was measured, because the others have
    more of the compilation and of what else the machine did.
    """
    costs: dict[tuple[Any, ...], float] = {}
    for line in grid.read(plan.out).values():
        ours = line["split"] == "test" and line["optimizer"] == plan.optimizer
        if ours and line["measure"] == "training" and line.get("cpu_per_step"):
            place = tuple(line[name] for name in ("data", "process", "network", "training"))
            costs[place] = min(costs.get(place, math.inf), line["cpu_per_step"])
    budgets: dict[tuple[Any, ...], list[int]] = {}
    for each in found:
        if each[:4] in costs:
            budgets.setdefault(each[:4], []).append(each[4])
    both = ("ode", "bound")
    header = ["at equal time", "SDE", "network", "CPU-s a step", "CPU-s", "steps"]
    header += ["ode", "minus the original", "bound", "minus the original", "seeds"]
    result: dict[str, list[list[str]]] = {}
    for place in dict.fromkeys(each[:3] for each in budgets):
        same = {each[3]: sorted(counts) for each, counts in budgets.items() if each[:3] == place}
        if "original" not in same or len(same) < 2:
            continue
        seconds = min(costs[*place, name] * counts[-1] for name, counts in same.items())
        at = {
            name: {
                m: _at(found, (*place, name), counts, seconds / costs[*place, name], m)
                for m in both
            }
            for name, counts in same.items()
        }
        for name, measures in at.items():
            cost = costs[*place, name]
            row = [name, *place[1:], f"{cost:.3f}", f"{seconds:.0f}", f"{seconds / cost:.0f}"]
            for measure, by_seed in measures.items():
                base = at["original"][measure]
                row += [_text(by_seed.values())]
                paired = sorted(set(by_seed) & set(base)) if name != "original" else []
                row += [_text([by_seed[seed] - base[seed] for seed in paired], "+")]
            row += [str(len(measures["ode"]))]
            result.setdefault(f"{place[0]}, at equal time", [header]).append(row)
    return result


def _at(
    found: dict[tuple[Any, ...], Values],
    place: tuple[Any, ...],
    counts: Sequence[int],
    steps: float,
    measure: str,
) -> dict[int, np.ndarray]:
    """By seed, the values of all images after ``steps`` steps, between two budgets ``counts``; {}
    if ``steps`` is less than the first one."""
    if steps < counts[0] * (1 - 1e-9):
        return {}
    last = next((i for i in range(len(counts)) if counts[i] >= steps * (1 - 1e-9)), len(counts) - 1)
    low, high = counts[max(last - 1, 0)], counts[last]
    part = 1.0 if low == high else math.log(steps / low) / math.log(high / low)
    first, second = (found[*place, count].get(measure, {}) for count in (low, high))
    return {
        seed: (1 - part) * np.asarray(first[seed]) + part * np.asarray(second[seed])
        for seed in sorted(set(first) & set(second))
    }


def _text(by_seed: Iterable[np.ndarray], sign: str = "") -> str:
    """The mean over seeds and images with its interval; a dash without seeds."""
    values = np.array(list(by_seed), float)
    if not len(values):
        return "—"
    shown = interval(values)
    return text(shown.mean, shown.ci95, sign)


def draw(found: Sequence[dict[str, Any]], path: pathlib.Path) -> None:
    """Plot bits/dim against the number of steps for digits, VP and DDPM++.

    A bar is half of the range of the seeds.
    """
    figure, both = figures.axes(2, width=3.6)
    for axis, measure, title in zip(both, ("ode", "bound"), ("ODE", "bound"), strict=True):
        for i, training in enumerate(TRAININGS):
            place = {"data": "digits", "process": "vp", "network": "DDPM++", "training": training}
            place["measure"] = measure
            line = sorted(
                (row["steps"], row["mean"], np.ptp(row["by_seed"]) / 2)
                for row in found
                if place.items() <= row.items()
            )
            if line:
                colour = (figures.MUTED, *figures.COLOURS)[i]
                steps, mean, spread = zip(*line, strict=True)
                axis.errorbar(steps, mean, spread, marker="o", ms=3, color=colour, label=training)
        axis.set(xscale="log", xlabel="steps", title=title, ylabel="bits/dim")
        budgets = sorted({row["steps"] for row in found if row["data"] == "digits"})
        axis.set_xticks(budgets, [f"{steps:,}" for steps in budgets])
        axis.minorticks_off()
    lines = both[0].get_legend_handles_labels()
    figure.legend(*lines, loc="outside lower center", ncols=5, fontsize=7, frameon=False)
    figures.save(figure, path)


def write(plan: Plan) -> None:
    """Write the tables, the figure and the rows of the lines that are there."""
    found, folder = rows(gathered(plan)), plan.out.parent
    if not found:
        print(f"{plan.out} has no numbers of test images yet")
        return
    optimizers = ("", plan.optimizer)
    lines = [line for line in grid.read(plan.out).values() if line["optimizer"] in optimizers]
    all_tables = tables(found) | equal_time(plan, gathered(plan))
    for source in dict.fromkeys(row["data"] for row in found):
        beside = autoregressive.table(lines, source)
        if len(beside) > 1:
            all_tables[f"{source}, autoregressive"] = beside
    texts = {"md": table2.markdown, "tex": table2.latex}
    for suffix, write_table in texts.items():
        write_whole(folder / f"claims.{suffix}", write_table(all_tables).encode())
    write_whole(folder / "claims.json", json.dumps(strict(found), indent=1).encode())
    draw(found, folder / "claims.png")
    loss_noise.draw(folder / "claims_noise.png")
    print(table2.markdown(all_tables))


def make_plan(args: argparse.Namespace) -> Plan:
    """The plan of the command line.

    Raises:
      ValueError: there is no seed, or no such optimizer.
    """
    if args.seeds < 1:
        raise ValueError(f"--seeds={args.seeds}: give at least 1")
    out = pathlib.Path(args.out or ("runs/claims_quick" if args.quick else "runs/claims"))
    common = {"optimizer": args.optimizer, "manual_dir": args.manual_dir}
    out = out.absolute() / "claims.jsonl"
    if args.quick:
        small = "model.nf=8+model.num_res_blocks=1+eval.max_images=72+eval.bound.sweeps=2"
        first = next(groups(PAPER, 1))
        return Plan(out, (first,), {"digits": (100, 200, 400)}, SETTINGS[:2], small, **common)
    return Plan(out, tuple(groups(tuple(TRAININGS), args.seeds)), STEPS, **common)


def main() -> None:
    """Compute what is missing, then write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small grid, in ten minutes")
    parser.add_argument("--out", default="", help="folder of the lines and tables")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--optimizer", default="muon", choices=("adam", "muon"))
    parser.add_argument("--manual_dir", default="", help="folder of Fashion-MNIST's files")
    parser.add_argument("--table", action="store_true", help="only write the tables")
    args = parser.parse_args()
    try:
        plan = make_plan(args)
    except ValueError as error:
        sys.exit(str(error))
    try:
        if not args.table:
            # Runs that differ in the seed or the number of steps are the same program.
            jax.config.update("jax_compilation_cache_dir", str(grid.folder_of(plan.out) / "xla"))
            grid.shared(tasks(plan))
        write(plan)
    except KeyboardInterrupt:
        sys.exit(f"interrupted: what is in {plan.out} stays there, and the same command continues")
    except Exception as error:
        if (line := refusals.line(error)) is None:
            raise
        sys.exit(f"{line}. What is in {plan.out} stays there, and the same command continues")


if __name__ == "__main__":
    cpu.settle()
    main()
