"""Trains a density of the rows of a table and compares it with baselines: ``--mode=table``.

The network is trained on a part of the training rows; the others are the validation rows. The
checkpoint with the largest log p of the validation rows is evaluated on the test rows, once. At
step 0 the network's output is 0 and the model is the Gaussian of the training rows
(``sbml.data.table``). Step 0 is a candidate too, so if training does not help, the Gaussian is
evaluated. It is fitted to all training rows, including the validation rows, so their log p is a
little too large at step 0.

    log p(y) = log p_eps(z) + log |det dz/dy|       nats, in the units of the file

log p_eps(z) is computed by the probability-flow ODE. The baselines
(``program.evaluation.densities``) are functions of the same z, so log |det dz/dy| cancels in the
differences between models.
"""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import logging

from sbml import data
from sbml.core.progress import over
from sbml.core.streams import stream
from sbml.data.table import Rows
from sbml.density import Density
from sbml.program.config import compatibility, objective
from sbml.program.config.build import Experiment
from sbml.program.config.trained import Trained
from sbml.program.evaluation import densities
from sbml.program.modes.train import Learner, fit
from sbml.program.report import table as page
from sbml.program.report.result import next_steps
from sbml.program.runtime import metrics
from sbml.program.runtime.checkpoint import OtherModelError
from sbml.program.runtime.workdir import TABLE, WHITENING, Workdir
from sbml.score import LEVELS
from sbml.statistics.intervals import mean_interval

CHOICE = 500  # the largest number of validation rows on which a checkpoint is chosen


def check(experiment: Experiment, workdir: Workdir, before: Sequence[str]) -> None:
    """Check that there is a table, and that a model of its columns can be trained."""
    section = experiment.config.data
    if "table" not in data.source_of(section.source)[0].modes:
        raise ValueError(
            f"--mode=table with data.source={section.source}: give --config=configs/table.py "
            "--config.data.path=FILE"
        )
    if jax.process_count() > 1:
        raise ValueError(f"--mode=table in {jax.process_count()} processes: start one")
    if not section.validation:
        raise ValueError(
            "data.validation=0: --mode=table chooses a checkpoint on validation rows; set "
            "--config.data.validation=0.2"
        )
    for name, wrong in (
        ("sde.learned", experiment.config.sde.learned),
        ("score.parameterization", experiment.config.score.parameterization == LEVELS),
        ("data.dequantization", section.dequantization != "uniform"),
        ("model.classes", experiment.adapter.classes),
        ("training.validate_every", experiment.config.training.validate_every),
    ):
        if wrong:
            raise ValueError(f"{name} with --mode=table: it is for images; leave it out")
    section.load(data.VALIDATION)


def run(experiment: Experiment, workdir: Workdir) -> None:
    """Train, choose a checkpoint, evaluate, and write ``table.json`` (the numbers), ``table.npz``
    (log p of each test row under each model, and samples) and ``report.html``."""
    section, start = experiment.config.data, time.perf_counter()
    rows: Rows = section.load("train")
    validation: Rows = section.load(data.VALIDATION)
    test: Rows = section.load("test")
    # The network takes a row as an image with one pixel in each line.
    shape = len(test.columns), 1, 1
    experiment = Experiment(
        experiment.config.replace(data=section.replace(shape=shape, flip=False))
    )
    config = experiment.config
    with jax.default_matmul_precision(config.eval.precision):
        fit(experiment, workdir, _learner(experiment, rows))
        some = data.spread(len(validation), CHOICE)  # The first rows may all be alike.
        curve, step, density = _chosen(experiment, workdir, validation.array[some])
        baselines = densities.fit(*(s.array.astype(np.float64) for s in (rows, validation)))
        name = f"log p of {len(test)} standardized rows"
        of_rows = dataclasses.replace(density, transform=test.whitening)
        found = of_rows.logp(test.values, progress=name)
        logp = {"model": found.values, **densities.log_p(baselines, test)}
        steps = config.training.num_steps
        of_model = {**found.row(section="eval.ode."), "chosen": f"step {step} of {steps}"}
        results = [{"name": "model", **of_model}]
        for each in baselines:
            values = logp[each.name]
            number, gap = mean_interval(values), mean_interval(logp["model"] - values)
            row = {"name": each.name, "log_p": number.mean, "interval": [*number.bounds]}
            row |= {"n": number.n, "difference": gap.mean}
            row |= {"difference_interval": [*gap.bounds], "chosen": each.chosen}
            results.append(row)
        best = max(results[1:], key=lambda result: result["log_p"])
        key = stream(jax.random.key(config.sampling.seed), "samples")
        samples = np.asarray(of_rows.sample(key, config.sampling.num_images))
        warnings = [test.caution] if test.caution else []
        about = found.warnings("eval.ode.", test.ids)
        warnings += [f"log p of the model: {each}" for each in about]
        if step == steps:
            warnings.append(
                f"the last step, {step}, fits the validation rows best: train longer, with less "
                f"dropout (--config.training.num_steps={4 * steps} --config.training."
                f"checkpoint_every={4 * config.training.checkpoint_every} "
                "--config.model.dropout=0) and another --workdir"
            )
        for warning in warnings:
            logging.warning(warning)
        content = {
            "title": workdir.name,
            "verdict": page.verdict(best),
            "results": results,
            "unit": "nats per row, in the units of the file",
            "best_baseline": best["name"],
            "rows": {"train": len(rows), "validation": len(validation), "test": len(test)},
            "columns": [
                {"name": name, "transform": link or "none", "rounded_to": h}
                for name, link, h in zip(
                    test.columns, test.whitening.links, test.rounded, strict=True
                )
            ],
            "validation": curve,
            "parameters": experiment.parameter_count(),
            "warnings": warnings,
            **experiment.provenance(test),
        }
        workdir.write("table.npz", {"row": np.array(test.ids), **logp, "samples": samples})
        workdir.write(TABLE, content)
        workdir.write(WHITENING, {"step": step, **vars(test.whitening)})
        html = page.render(content, test.values, samples, metrics.read(workdir))
        workdir.write_bytes("report.html", html.encode())
    for result in results:
        print(page.line(result))
    print(f"{content['verdict']}\nreport: {workdir / 'report.html'}", end=", ")
    print(f"in {time.perf_counter() - start:.0f} s\n{next_steps(workdir)}")


def _learner(experiment: Experiment, rows: Rows) -> Learner:
    config = experiment.config

    def check(metadata: dict[str, Any]) -> None:
        compatibility.check_training(config, metadata)
        if compatibility.earlier_data(metadata, rows):
            # The rows that are test rows now may have been training rows.
            raise OtherModelError(
                "the checkpoint was trained on other rows, or on columns with other "
                "transformations: use another --workdir"
            )

    return Learner(
        section=config.training,
        images=rows,
        init=experiment.init_state,
        update=objective.update(experiment, objective.draws_fn(experiment)),
        provenance=experiment.provenance(rows),
        check=check,
    )


def _chosen(
    experiment: Experiment, workdir: Workdir, validation: np.ndarray
) -> tuple[list[dict[str, float]], int, Density]:
    """The mean log p of the ``validation`` rows z at each checkpoint, the step of the largest one,
    and the density at this step."""
    config = experiment.config
    # NumPy arrays at all steps, so that the program is compiled once. It serves the test rows too,
    # if there are more of them.
    candidates = {
        each.step: dataclasses.replace(
            Trained(experiment, jax.device_get(each), workdir).density_of_rows(validation.shape[1]),
            batch_size=min(config.eval.batch_size, len(validation)),
            subset=config.eval.ode.subset or len(validation),
        )
        for each in experiment.restore_each(workdir)
    }
    scores = {}
    name = f"log p of {len(validation)} validation rows"
    for step, candidate in over(candidates.items(), name, "checkpoint", len(candidates)):
        scores[step] = candidate.logp(validation, check=False).mean
    best = max(scores, key=lambda step: scores[step] if np.isfinite(scores[step]) else -np.inf)
    curve = [{"step": step, "log_p_z": score} for step, score in scores.items()]
    return curve, best, candidates[best]
