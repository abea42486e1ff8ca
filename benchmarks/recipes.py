"""Recipes of training, compared at equal network evaluations and at equal training time.

    python benchmarks/recipes.py --config=configs/digits_vp.py:uniform --recipes=noise,centre

A recipe changes fields of the config (``experiments.grid``). Each recipe is added to the recipe
``--base``, so that one factor at a time can be compared with the best recipe so far. A part of the
training images is held out (``data.validation``): all runs train on the others and are evaluated on
these, with the same random draws. The test images are not used. With ``--start``, all runs of a
seed begin with that many steps of the base's training, and a recipe changes only the steps that
follow. There are two
budgets:

    evaluations   as many steps as the base
    time          as much training time as the base: the base's number of steps is divided by the
                  ratio of the times of a step. The compiled steps of both are timed in turns

A network is evaluated with the dequantizers that fit its training data. The table shows bits/dim
and the differences from the base (``recipe_table``).

Every run and every timing becomes a line of the file ``--out`` and is not repeated. After a kill,
the same command continues, even in the middle of a training run. The same command in two processes
shares the runs between them.
"""

import argparse
import functools
import pathlib
import re
import shutil
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict
from recipe_table import CELLS, table

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))  # experiments/ is not installed.

from experiments.grid import (
    claimed,
    compute_once,
    folder_of,
    identity,
    of_images,
    shared,
    with_recipe,
)
from sbml import data
from sbml.program.config import build, compatibility, objective
from sbml.program.config.config import load
from sbml.program.config.trained import Trained
from sbml.program.evaluation.cells import Evaluation
from sbml.program.modes import train
from sbml.program.runtime import cpu, sharding
from sbml.program.runtime.workdir import Workdir

BUDGETS = ("evaluations", "time")


class Plan(NamedTuple):
    """The settings that all runs of one command share."""

    config: Callable[[int], ConfigDict]  # makes the config of the base for a number of steps
    steps: int  # training steps of the base, after ``start``
    out: pathlib.Path  # the file of results, one JSON object a line
    start: int = 0  # steps of the base's training, from which every run continues


def with_steps(config: ConfigDict, steps: int) -> ConfigDict:
    """``config`` for ``steps`` steps, with a warm-up and an average that suit them.

    In the average of a short run, the initial parameters would have a large weight. Here their
    weight is at most about exp(-6.5). A recipe may still set other values.
    """
    config.training.update(num_steps=steps, checkpoint_every=max(1, min(200, steps)))
    config.optim.warmup = min(config.optim.warmup, steps // 10)
    config.optim.ema = min(config.optim.ema, max(0.0, 1 - 6.5 / steps))
    return config


class Steps:
    """Compiled training steps of a config, to be timed. Every step has the same batch."""

    def __init__(self, config: ConfigDict) -> None:
        experiment, mesh = build.Experiment(config), sharding.data_mesh()
        training = experiment.config.training
        count = training.batch_size // training.rows_per_image
        pixels = experiment.images("train").images[:count]
        self.batch = sharding.split(np.asarray(pixels))
        self.state = sharding.initial_state(experiment.init_state, mesh)
        self.step = sharding.compiled_step(objective.update(experiment), mesh, self.state)
        self.seconds(1)

    def seconds(self, steps: int) -> float:
        """The wall time of a step in seconds, the mean over ``steps`` steps."""
        start = time.perf_counter()
        for _ in range(steps):
            self.state, _ = self.step(self.state, self.batch, jax.random.key(0), ())
        jax.block_until_ready(self.state)
        return (time.perf_counter() - start) / steps


def time_steps(plan: Plan, recipe: str, rounds: int = 9, steps: int = 3) -> dict[str, Any]:
    """Time the steps of the base and of ``recipe`` in turns.

    Returns:
      The line of the file: ``seconds``, the median wall times of a step of the base and of
      ``recipe``, and ``ratio``, the median over rounds of the second divided by the first.
    """
    base = plan.config(plan.steps)
    other = with_recipe(base, recipe)

    def compute() -> dict[str, Any]:
        pair = Steps(base), Steps(other)
        values = np.array([[one.seconds(steps) for one in pair] for _ in range(rounds)])
        ratio = float(np.median(values[:, 1] / values[:, 0]))
        return {"recipe": recipe, "seconds": np.median(values, axis=0).tolist(), "ratio": ratio}

    return compute_once(plan.out, f"time {identity(base)} {identity(other)}", compute)


def evaluate_run(config: ConfigDict, workdir: Workdir) -> dict[str, list[float]]:
    """bits/dim of every held-out image, by the name of the cell (the column)."""
    trained = Trained.of(build.Experiment(config), workdir)
    evaluation = Evaluation.of_split(trained, data.VALIDATION)
    return {
        cell.name: of_images(evaluation, cell).tolist()
        for cell in CELLS[config.data.dequantization]
        if cell.dequantizer != "learned" or config.score.parameterization == "levels"
    }


def copy_start(plan: Plan, seed: int, workdir: pathlib.Path) -> None:
    """Put the first ``plan.start`` steps of the base's training with ``seed`` into ``workdir``."""
    config = plan.config(plan.start + plan.steps)
    config.seed = seed
    config.training.update(checkpoint_every=plan.start, keep_every=plan.start)
    base, part = workdir.with_name(f"base_{identity(config)}"), workdir.with_suffix(".part")
    with claimed(plan.out, base.name):
        train.run(build.Experiment(config), Workdir(base))
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(base, part)
    for checkpoint in (part / "checkpoints").iterdir():
        if checkpoint.name != str(plan.start):
            shutil.rmtree(checkpoint)
    part.rename(workdir)


def train_and_evaluate(plan: Plan, recipe: str, seed: int, steps: int) -> dict[str, Any]:
    """Train and evaluate ``recipe`` with ``seed`` for ``steps`` steps, after ``plan.start``.

    Returns:
      The line of the file. It has ``bits_per_dim`` by cell, or ``failed``, the reason why training
      stopped.
    """
    config = with_recipe(plan.config(plan.start + steps), recipe)
    config.seed = seed
    key = identity(config)
    if plan.start:  # The schedules of the first steps depend on the number of all steps.
        key += f"_{plan.start}_{identity(plan.config(plan.start + plan.steps))}"

    def compute() -> dict[str, Any]:
        workdir = folder_of(plan.out) / key
        row = {"recipe": recipe, "seed": seed, "steps": steps, "start": plan.start}
        try:
            if plan.start and not workdir.exists():
                copy_start(plan, seed, workdir)
            train.run(build.Experiment(config), Workdir(workdir))
            row["bits_per_dim"] = evaluate_run(config, Workdir(workdir))
        except train.NonFiniteLoss as error:
            row["failed"] = str(error)
        shutil.rmtree(workdir, ignore_errors=True)
        return row

    return compute_once(plan.out, key, compute)


def names_in(text: str) -> list[str]:
    """The parts of ``text`` between commas; the commas in a tuple of numbers do not count."""
    return [part.strip() for part in re.split(r",(?![^(]*\))", text)]


def budgets(text: str) -> list[str]:
    """The budgets in ``text``.

    Raises:
      ValueError: one of them is no budget.
    """
    names = names_in(text)
    if unknown := set(names).difference(BUDGETS):
        raise ValueError(f"--budgets={text}: no budget {unknown}; give {' or '.join(BUDGETS)}")
    return names


def seeds(text: str) -> list[int]:
    """The seeds in ``text``.

    Raises:
      ValueError: one of them is no integer of at least 0.
    """
    if wrong := [seed for seed in names_in(text) if not seed.isdecimal()]:
        raise ValueError(f"--seeds={text}: {wrong[0]!r} is no integer of at least 0")
    return [int(seed) for seed in names_in(text)]


def make_plan(args: argparse.Namespace) -> Plan:
    """The plan from the command line.

    Raises:
      ValueError: there is no step, or ``--nf`` does not fit the network of the config.
    """
    if args.steps < 1 or args.start < 0:
        raise ValueError(f"--steps={args.steps} --start={args.start}: give at least 1 and 0 steps")

    def base(steps: int) -> ConfigDict:
        config = load(args.config)
        config.data.update(validation=args.validation, manual_dir=args.manual_dir)
        config.training.update(sample_every=0, keep_last=1, keep_every=0)
        config.eval.update(split=data.VALIDATION, max_images=args.images)
        config.eval.bound.sweeps = args.sweeps
        if args.nf and "nf" not in config.model:
            raise ValueError(f"--nf={args.nf}: {args.config} has the network {config.model.name}")
        config.model.update({"nf": args.nf, "num_res_blocks": 1} if args.nf else {})
        return with_recipe(with_steps(config, steps), args.base)

    out = pathlib.Path(args.out or f"runs/recipes/{pathlib.Path(args.config).stem}.jsonl")
    return Plan(base, args.steps, out.absolute(), args.start)


def check_recipes(plan: Plan, recipes: list[str]) -> None:
    """Check, before the first training, that every recipe of ``recipes`` can be run.

    Raises:
      ValueError: a recipe gives an invalid config, has no column of the table, or cannot continue
        from a checkpoint of the base.
    """
    base = plan.config(plan.start + plan.steps)
    begun = build.Experiment(base)
    metadata = {"config": begun.config.plain(), "smallest_time": begun.adapter.eps}
    for recipe in recipes:
        config = build.Experiment(with_recipe(base, recipe)).config
        if (trained_on := config.data.dequantization) not in CELLS:
            raise ValueError(
                f"{recipe or 'the base'}: data.dequantization={trained_on} has no column; give "
                f"{' or '.join(CELLS)}"
            )
        if plan.start:
            compatibility.check_training(config, metadata)


def main() -> None:
    """Train, evaluate and compare; print a table for each budget."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options: dict[str, tuple[Any, str]] = {
        "config": ("configs/digits_vp.py:uniform", "a config"),
        "recipes": ("noise,centre", "recipes that are compared with the base"),
        "base": ("", "the recipe to which all others are added"),
        "budgets": (",".join(BUDGETS), "evaluations, time, or both"),
        "seeds": ("0,1,2", "seeds of training"),
        "steps": (700, "training steps of the base"),
        "start": (0, "steps of the base's training with which all runs begin"),
        "validation": (0.2, "the field data.validation: the part of images that is held out"),
        "images": (0, "number of held-out images to evaluate; 0: all"),
        "sweeps": (4, "sweeps of the bounds"),
        "nf": (0, "channels of a smaller network with one block a level; 0: the config's network"),
        "manual_dir": ("", "the field data.manual_dir"),
        "out": ("", "the file of results; if empty, runs/recipes/CONFIG.jsonl"),
    }
    for name, (value, text) in options.items():
        parser.add_argument(f"--{name}", type=type(value), default=value, help=text)
    args = parser.parse_args()
    chosen, chosen_seeds = budgets(args.budgets), seeds(args.seeds)
    plan, recipes = make_plan(args), list(dict.fromkeys(["", *names_in(args.recipes)]))
    check_recipes(plan, recipes)

    def task(budget: str, seed: int, recipe: str) -> dict[str, Any]:
        ratio = time_steps(plan, recipe)["ratio"] if budget == "time" and recipe else 1.0
        # A ratio of 1, up to the noise of the measurement, leaves the number of steps as it is, so
        # the run of the other budget is used again.
        steps = plan.steps if abs(ratio - 1) < 0.02 else max(1, round(plan.steps / ratio))
        return train_and_evaluate(plan, recipe, seed, steps)

    for budget in chosen:
        pairs = [(seed, recipe) for seed in chosen_seeds for recipe in recipes]
        lines = shared([functools.partial(task, budget, *pair) for pair in pairs])
        rows: dict[str, list[dict[str, Any]]] = {recipe: [] for recipe in recipes}
        for (_, recipe), line in zip(pairs, lines, strict=True):
            rows[recipe].append(line)
        print(f"\nEqual {budget}, {args.config}, base {args.base or 'as is'}\n\n{table(rows)}")


if __name__ == "__main__":
    cpu.settle()
    main()
