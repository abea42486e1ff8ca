"""The table of an evaluation: the columns of its cells, and the record of how they were made."""

import itertools
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sbml import data
from sbml.density.estimate import Columns, contradiction
from sbml.program.config import compatibility
from sbml.program.evaluation import baselines, classifier
from sbml.program.evaluation.cells import Dequantization, Evaluation, Run
from sbml.program.runtime.trees import table_crc32
from sbml.program.runtime.versions import versions
from sbml.program.runtime.workdir import PER_IMAGE
from sbml.statistics.intervals import mean_interval

CONTRADICTION = 0.1  # bits/dim by which the ODE may exceed the bound without a warning


def columns(of: Evaluation, runs: Sequence[Run]) -> dict[str, Columns]:
    """The columns of all cells by the names of their files.

    ``per_image.npz`` has those of the cells with the most images. A cell with fewer images, such as
    one with K > 1, has a file of its own.
    """
    ids = max((run.measurement.ids for run in runs), key=len)
    shown: Columns = {"id": ids}
    tables = {PER_IMAGE: shown}
    for run in runs:
        own = {**run.number.terms, "bits_per_dim": run.number.values, "nfe": run.number.nfe}
        named = {f"{run.cell.name}_{name}": column for name, column in own.items()}
        if np.array_equal(run.measurement.ids, ids):
            shown.update(named)
        else:
            tables[f"per_image_{run.cell.name}.npz"] = {"id": run.measurement.ids, **named}
    if of.images.ids:
        shown["name"] = np.asarray(of.images.ids)[ids]
    if of.experiment.adapter.classes and of.images.labels is not None:
        shown["class"] = of.images.labels[ids]
    return tables


def evaluation(
    of: Evaluation, runs: Sequence[Run], tables: Mapping[str, Columns], warnings: Sequence[str]
) -> dict[str, Any]:
    """The content of ``evaluation.json``: results, baselines, warnings, and what they depend on."""
    trained, train, experiment = of.trained, of.train, of.experiment
    restored = trained.restored
    pixels = of.images.images[tables[PER_IMAGE]["id"]]
    simple, left_out = baselines.all_of(train.images, pixels, train.levels)
    intervals = {name: mean_interval(values) for name, values in simple.items()}
    # The headline minus each baseline, image by image, unless its mean is that of a control variate
    # or of fewer images.
    bits, gaps = runs[0].number.values, {}
    if len(bits) == len(pixels) and np.mean(bits) == runs[0].number.mean:
        gaps = {name: mean_interval(bits - values) for name, values in simple.items()}
    # An evaluation does not use the settings of the training, so those that it was given can be
    # wrong. The stored config therefore has the settings of the checkpoint.
    given, asked = restored.metadata["config"], experiment.config.plain()
    data = {name: given["data"][name] for name in ("dequantization", "flip")}
    sections = {name: given[name] for name in ("seed", "training", "optim")}
    split, classes = experiment.config.eval.split, restored.metadata.get("classes")
    return {
        "title": trained.workdir.name,
        "results": [run.row for run in runs],
        "baselines": [
            {"name": name, "bits_per_dim": i.mean, "ci95": i.ci95, "interval": list(i.bounds)}
            | ({"difference_interval": list(gaps[name].bounds)} if name in gaps else {})
            for name, i in intervals.items()
        ],
        **({"baselines_left_out": left_out} if left_out else {}),
        "warnings": [*warnings],
        "remark": remark(of),
        "model": {"name": experiment.config.model.name, "parameters": experiment.parameter_count()},
        **({"classes": classes} if classes else {}),
        "checkpoint": {"step": restored.step, "parameters_crc32": trained.parameters_crc32},
        "data": {"train": train.fingerprint, split: of.images.fingerprint},
        "config": {**asked, **sections, "data": {**asked["data"], **data}},
        "tables": {name: table_crc32(each) for name, each in tables.items()},
        "command": shlex.join(["python", "-m", "sbml.main", *sys.argv[1:]]),
        "versions": versions(),
    }


def contradictions(runs: Sequence[Run]) -> list[str]:
    """Warnings about bounds that are far below the number by the ODE of the same images."""
    found = []
    for ode, bound in itertools.product(runs, runs):
        if ode.number.solver is None or not bound.measurement.estimator.is_bound:
            continue
        same, other = ((r.cell.dequantizer, [*r.measurement.ids]) for r in (ode, bound))
        if same != other:
            continue
        if text := contradiction(ode.number, bound.number, CONTRADICTION):
            found.append(f"{ode.cell.title} against {bound.cell.title}: {text}")
    return found


def remark(of: Evaluation) -> str:
    """How many images are evaluated; "" if these are all."""
    count, total = len(of.ids()), len(of.images)
    sample = "the first" if of.experiment.config.eval.in_order else "a random sample of"
    return f"{sample} {count} of {total} images (eval.max_images)" if count < total else ""


def cautions(of: Evaluation, dequantizations: Mapping[str, Dequantization]) -> list[str]:
    """Warnings before the evaluation: a damaged checkpoint; a model that was trained on other data,
    other times, or without dequantization; dequantizers that do not fit it; files that are not
    used; training images that are evaluated; cautions of the image sets."""
    trained, images, train = of.trained, of.images, of.train
    restored, metadata = trained.restored, trained.restored.metadata
    trained_on = metadata["config"]["data"]["dequantization"]
    found = [f"damaged, so an older checkpoint was taken: {r}" for r in restored.damaged]
    found += compatibility.other_data(metadata, of.experiment.provenance(train))
    found += compatibility.unseen_times(metadata, of.experiment.sde, of.experiment.eval_eps)
    if trained_on == "none":
        found.append(
            "the model was trained on k / (levels - 1) without dequantization, and is evaluated "
            "on (k + u) / levels: this mismatch increases bits/dim "
            "(data.dequantization=uniform trains on the data that are evaluated)"
        )
    if classes := of.experiment.adapter.classes:
        found.append(
            f"each number is conditional on the label of its image ({classes} classes): do not "
            "compare them with those of models without classes"
        )
    if reason := classifier.why_none(of):
        found.append(reason)
    loose = "The number is a valid but loose bound"
    for name, dequantizer in dequantizations.items():
        if dequantizer.model.at_noise and trained_on == "uniform":
            found.append(
                f"{name}: the model was trained on uniformly dequantized images, but this "
                f"dequantizer puts noise around bin centres. {loose}: evaluate with "
                "--config.eval.dequantizers=uniform, or train with "
                "--config.data.dequantization=centre"
            )
        if not dequantizer.model.at_noise and trained.knows_centres:
            found.append(
                f"{name}: the model was trained on bin centres, but this dequantizer needs its "
                f"density in the whole bins. {loose}: evaluate with "
                "--config.eval.dequantizers=truncated_normal, or train with "
                "--config.data.dequantization=uniform"
            )
        if dequantizer.restored is not None:
            score = dequantizer.restored.metadata["score"]
            if score["crc32"] != trained.parameters_crc32:
                found.append(
                    f"{name}: trained for another score (step {score['step']}). {loose}: train "
                    "the dequantizer again with --mode=train_dequantizer"
                )
    for split in {found.skipped: found for found in (images, train)}.values():
        if split.skipped:
            paths, count = "; ".join(split.skipped), len(split.skipped)
            files = "file is" if count == 1 else "files are"
            found.append(f"{count} {split.split} {files} not used: {paths}")
    if images.split != train.split:
        found.append(data.copies(images.images, train.images, f"images ({images.split})"))
    # The caution of a set with scenes is about the confidence interval. The interval is that of the
    # evaluated images, so this caution of the training images is left out.
    of_sets = dict.fromkeys([images.caution, train.caution if train.scenes is None else ""])
    return [*filter(None, [*found, *of_sets])]
