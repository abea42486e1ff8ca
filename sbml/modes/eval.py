"""Evaluates a checkpoint on the images of a split, and writes a report: ``--mode=eval``.

The results are a table of cells. A cell is one estimator with one dequantizer and K draws of it
(``sbml.estimators``).
"""

import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging

from sbml import dequantizers
from sbml.dequantizers import DEQUANTIZERS
from sbml.estimate import Columns
from sbml.evaluation import baselines
from sbml.evaluation.cells import CellRun
from sbml.evaluation.inputs import Dequantization, Inputs, check_first_batch
from sbml.experiment import trained
from sbml.experiment.build import Experiment
from sbml.intervals import mean_interval
from sbml.report import summary
from sbml.report.result import strict
from sbml.runtime.trees import table_crc32, tree_crc32
from sbml.runtime.versions import versions
from sbml.runtime.workdir import EVALUATION, PER_IMAGE, Workdir


def check(experiment: Experiment, workdir: Workdir, before: Sequence[str]) -> None:
    """Check that the dequantizers with parameters are trained, or will be."""
    config = experiment.config
    missing = [
        name for name in config.eval.dequantizers if dequantizers.is_trained(DEQUANTIZERS[name])
    ]
    made = {"train_dequantizer", "convert"}.intersection(before)
    if missing and not made and not config.dequantizer.training.checkpoints(workdir).steps():
        raise ValueError(
            f"eval.dequantizers={missing[0]}: no dequantizer in {workdir}: train it first "
            "(--mode=train_dequantizer,eval)"
        )


def run(experiment: Experiment, workdir: Workdir) -> None:
    """Evaluate the newest undamaged checkpoint of ``workdir`` on ``eval.split``, with averaged
    parameters.

    Writes ``evaluation.json``, ``report.json``, ``report.html`` and ``per_image.npz``, which has
    the columns of all cells with as many images. A cell with fewer images than others, such as one
    with K > 1, has a file of its own. A killed evaluation resumes where it stopped.
    """
    config = experiment.config.eval
    with workdir.lock("eval"), jax.default_matmul_precision(config.precision):
        inputs, start = Inputs.of(experiment, workdir, config.split), time.perf_counter()
        undefined = {c.name: c.reason_undefined for c in config.cells() if c.reason_undefined}
        cells = [cell for cell in config.cells() if not cell.reason_undefined]
        names = dict.fromkeys(cell.dequantizer for cell in cells)
        dequantizations = {name: inputs.dequantization(name) for name in names}
        for dequantization in dequantizations.values():
            check_first_batch(inputs, dequantization)
        warnings = cautions(inputs, dequantizations)
        for warning in warnings:  # These come before the work, so that the user can stop it.
            logging.warning(warning)
        results = []
        with inputs.preemption:
            # All cells are set up before the first is computed, so that errors appear at once.
            runs = [CellRun(inputs, cell, dequantizations[cell.dequantizer]) for cell in cells]
            ids = max((run.ids for run in runs), key=len)
            shown: Columns = {"id": ids}
            tables = {PER_IMAGE: shown}
            for run in runs:
                number = run.finish()
                results.append(run.result(number))
                print(results[-1].line)
                columns = {**number.terms, "bits_per_dim": number.values, "nfe": number.nfe}
                named = {f"{run.cell.name}_{name}": column for name, column in columns.items()}
                if np.array_equal(run.ids, ids):
                    shown.update(named)
                else:
                    tables[f"per_image_{run.cell.name}.npz"] = {"id": run.ids, **named}
            if inputs.images.ids:
                shown["name"] = np.asarray(inputs.images.ids)[ids]
            found = [each for result in results for each in result.warnings(inputs.images.ids)]
            found += [warning for run in runs for warning in run.warnings()]
            for warning in found:
                logging.warning(warning)
        restored, train = inputs.restored, inputs.train
        pixels = inputs.images.images[ids]
        simple, left_out = baselines.all_of(train.images, pixels, train.levels)
        intervals = {name: mean_interval(values) for name, values in simple.items()}
        # An evaluation does not use the settings of the training, so those that it was given can be
        # wrong: the config has those of the checkpoint.
        given, asked = restored.metadata["config"], inputs.experiment.config.plain()
        data = {name: given["data"][name] for name in ("dequantization", "flip")}
        sections = {name: given[name] for name in ("seed", "training", "optim")}
        evaluation: dict[str, Any] = {
            "title": workdir.name,
            "results": [result.plain() for result in results],
            **({"undefined": undefined} if undefined else {}),
            "baselines": [
                {"name": name, "bits_per_dim": i.mean, "ci95": i.ci95, "interval": list(i.bounds)}
                for name, i in intervals.items()
            ],
            **({"baselines_left_out": left_out} if left_out else {}),
            "warnings": [*warnings, *found],
            "model": {
                "name": inputs.experiment.config.model.name,
                "parameters": inputs.experiment.parameter_count(),
            },
            "checkpoint": {
                "step": restored.step,
                "parameters_crc32": tree_crc32(restored.state.ema_params),
            },
            "data": {"train": train.fingerprint, config.split: inputs.images.fingerprint},
            "config": {**asked, **sections, "data": {**asked["data"], **data}},
            "tables": {name: table_crc32(columns) for name, columns in tables.items()},
            "command": shlex.join(["python", "-m", "sbml.main", *sys.argv[1:]]),
            "versions": versions(),
        }
        if jax.process_index() == 0:
            # First the columns, and then the evaluation that names them.
            for name, columns in tables.items():
                workdir.write(name, columns)
            workdir.write(EVALUATION, strict(evaluation))
            for path in workdir.path.glob("per_image*.npz"):  # of an earlier evaluation
                if path.name not in tables:
                    path.unlink()
            summary.write(workdir, lambda _: inputs.images)
        # The time is only printed, so that a resumed evaluation writes the same files as one
        # without interruption.
        print(f"report: {workdir / 'report.html'}, in {time.perf_counter() - start:.0f} s")
        # A signal during the last batch also ends the process, before its next mode begins.
        inputs.preemption.leave_if_requested("the evaluation is written")


def cautions(inputs: Inputs, dequantizations: Mapping[str, Dequantization]) -> list[str]:
    """Warnings before the evaluation: a damaged checkpoint; a model that was trained on other data,
    other times, or without dequantization; dequantizers that do not fit it; files that are not
    used and images that are not evaluated; cautions of the image sets."""
    restored, images, train = inputs.restored, inputs.images, inputs.train
    metadata = restored.metadata
    trained_on = metadata["config"]["data"]["dequantization"]
    found = [f"damaged, so an older checkpoint was taken: {r}" for r in restored.damaged]
    found += trained.other_data(metadata, train)
    found += trained.unseen_times(metadata, inputs.experiment.eval_eps)
    if trained_on == "none":
        found.append(
            "the model was trained on k / (levels - 1) without dequantization, and is evaluated "
            "on (k + u) / levels: this mismatch increases bits/dim "
            "(data.dequantization=uniform trains on the data that are evaluated)"
        )
    loose = "The number is a valid but loose bound"
    for name, dequantizer in dequantizations.items():
        if dequantizer.model.at_noise and trained_on == "uniform":
            found.append(
                f"{name}: the model was trained on uniformly dequantized images, but this "
                f"dequantizer puts noise around bin centres. {loose}: evaluate with "
                "--config.eval.dequantizers=uniform, or train with "
                "--config.data.dequantization=centre"
            )
        if not dequantizer.model.at_noise and trained_on == "centre":
            found.append(
                f"{name}: the model was trained on bin centres, but this dequantizer needs its "
                f"density in the whole bins. {loose}: evaluate with "
                "--config.eval.dequantizers=truncated_normal, or train with "
                "--config.data.dequantization=uniform"
            )
        if dequantizer.restored is not None:
            score = dequantizer.restored.metadata["score"]
            if score["crc32"] != tree_crc32(restored.state.ema_params):
                found.append(
                    f"{name}: trained for another score (step {score['step']}). {loose}: train "
                    "the dequantizer again with --mode=train_dequantizer"
                )
    for split in {images.split: images, train.split: train}.values():
        if split.skipped:
            paths, count = "; ".join(split.skipped), len(split.skipped)
            files = "file is" if count == 1 else "files are"
            found.append(f"{count} {split.split} {files} not used: {paths}")
    if (count := len(inputs.ids())) < len(images):
        sample = "the first" if inputs.experiment.config.eval.in_order else "a random sample of"
        found.append(f"{sample} {count} of {len(images)} images (eval.max_images)")
    # If the images have scenes, the caution is about the interval, which is not of these images.
    of_sets = dict.fromkeys([images.caution, train.caution if train.scenes is None else ""])
    return [*found, *filter(None, of_sets)]
