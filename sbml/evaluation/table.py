"""The table of an evaluation: its cells, the numbers of every image, and the files they go to."""

import shlex
import sys
from typing import Any

import numpy as np
from absl import logging

from sbml.estimate import Columns
from sbml.evaluation import baselines
from sbml.evaluation.cells import CellRun
from sbml.evaluation.inputs import Dequantization, Inputs, check_first_batch
from sbml.experiment import trained
from sbml.intervals import mean_interval
from sbml.report.result import Result, strict
from sbml.runtime.checkpoint import Restored
from sbml.runtime.trees import table_crc32, tree_crc32
from sbml.runtime.versions import versions
from sbml.runtime.workdir import EVALUATION, PER_IMAGE, Workdir


class Table:
    """The results of the cells that ``eval`` asks for; :meth:`fill` computes them.

    Attributes:
      columns: the per-image columns by the names of their files. One file has the columns of all
        cells with as many images. A cell with fewer images than others, such as one with K > 1, has
        a file of its own.
      results: the result of each cell.
      warnings: warnings about the model, its dequantizers, the images and, at last, the results.
    """

    def __init__(self, shared: Inputs) -> None:
        self.shared = shared
        cells = shared.experiment.config.eval.cells()
        self.undefined = {c.name: c.reason_undefined for c in cells if c.reason_undefined}
        self.cells = [cell for cell in cells if not cell.reason_undefined]
        names = dict.fromkeys(cell.dequantizer for cell in self.cells)
        self.dequantizations = {name: shared.dequantization(name) for name in names}
        for dequantization in self.dequantizations.values():
            check_first_batch(shared, dequantization)
        self.columns: dict[str, Columns] = {}
        self.results: list[Result] = []
        self.warnings: list[str] = []
        # These come before the work, so that the user can stop it.
        self._warn(cautions(shared, self.dequantizations))

    def _warn(self, found: list[str]) -> None:
        for warning in found:
            logging.warning(warning)
        self.warnings += found

    def fill(self) -> None:
        """Compute all cells, or read the rows that an interrupted evaluation has computed."""
        # All cells are set up before the first is computed, so that errors appear within seconds.
        runs = [CellRun(self.shared, c, self.dequantizations[c.dequantizer]) for c in self.cells]
        ids = max((run.ids for run in runs), key=len)
        self.columns[PER_IMAGE] = shown = {"id": ids}
        for run in runs:
            number = run.finish()
            self.results.append(run.result(number))
            print(self.results[-1].line)
            columns = {**number.terms, "bits_per_dim": number.values, "nfe": number.nfe}
            named = {f"{run.cell.name}_{name}": column for name, column in columns.items()}
            if np.array_equal(run.ids, ids):
                shown.update(named)
            else:
                self.columns[f"per_image_{run.cell.name}.npz"] = {"id": run.ids, **named}
        if names := self.shared.images.ids:
            shown["name"] = np.asarray(names)[ids]
        self._warn([each for result in self.results for each in result.warnings(names)])
        self._warn([warning for run in runs for warning in run.warnings()])

    def plain(self) -> dict[str, Any]:
        """What ``evaluation.json`` holds."""
        shared = self.shared
        experiment, restored, train = shared.experiment, shared.restored, shared.train
        pixels = shared.images.images[self.columns[PER_IMAGE]["id"]]
        intervals = {
            name: mean_interval(values)
            for name, values in baselines.all_of(train.images, pixels, train.levels).items()
        }
        left_out = baselines.omitted(train.images)
        # An evaluation does not use the settings of the training, so those that it was given can be
        # wrong: the config has those of the checkpoint.
        given, asked = restored.metadata["config"], experiment.config.plain()
        data = {name: given["data"][name] for name in ("dequantization", "flip")}
        sections = {name: given[name] for name in ("seed", "training", "optim")}
        return {
            "title": shared.workdir.name,
            "results": [result.plain() for result in self.results],
            **({"undefined": self.undefined} if self.undefined else {}),
            "baselines": [
                {"name": name, "bits_per_dim": i.mean, "ci95": i.ci95, "interval": list(i.bounds)}
                for name, i in intervals.items()
            ],
            **({"baselines_left_out": left_out} if left_out else {}),
            "warnings": self.warnings,
            "model": {
                "name": experiment.config.model.name,
                "parameters": experiment.parameter_count(),
            },
            "checkpoint": {
                "step": restored.step,
                "parameters_crc32": tree_crc32(restored.state.ema_params),
            },
            "data": {
                "train": train.fingerprint,
                experiment.config.eval.split: shared.images.fingerprint,
            },
            "config": {**asked, **sections, "data": {**asked["data"], **data}},
            "tables": {name: table_crc32(columns) for name, columns in self.columns.items()},
            "command": shlex.join(["python", "-m", "sbml.main", *sys.argv[1:]]),
            "versions": versions(),
        }

    def write(self, workdir: Workdir, evaluation: dict[str, Any]) -> None:
        """Write the columns, and then the evaluation that names them; delete those of an earlier
        evaluation."""
        for name, columns in self.columns.items():
            workdir.write(name, columns)
        workdir.write(EVALUATION, strict(evaluation))
        for path in workdir.path.glob("per_image*.npz"):
            if path.name not in self.columns:
                path.unlink()


def cautions(inputs: Inputs, dequantizations: dict[str, Dequantization]) -> list[str]:
    """Warnings before the evaluation: a damaged checkpoint; a model that was trained on other data,
    other times, or without dequantization; dequantizers that do not fit it; files that are not
    used and images that are not evaluated; cautions of the image sets."""
    restored = inputs.restored
    metadata, images, train = restored.metadata, inputs.images, inputs.train
    found = [f"damaged, so an older checkpoint was taken: {r}" for r in restored.damaged]
    found += trained.other_data(metadata, train)
    found += trained.unseen_times(metadata, inputs.experiment.eval_eps)
    if metadata["config"]["data"]["dequantization"] == "none":
        found.append(
            "the model was trained on k / (levels - 1) without dequantization, and is evaluated "
            "on (k + u) / levels: this mismatch increases bits/dim "
            "(data.dequantization=uniform trains on the data that are evaluated)"
        )
    for name, dequantizer in dequantizations.items():
        found += misfits(restored, name, dequantizer)
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


def misfits(restored: Restored, name: str, dequantizer: Dequantization) -> list[str]:
    """Warnings if the dequantizer does not fit the score's training data, or was trained for
    another score."""
    found = []
    trained_on = restored.metadata["config"]["data"]["dequantization"]
    if dequantizer.model.at_noise and trained_on == "uniform":
        found.append(
            f"{name}: the model was trained on uniformly dequantized images, but this dequantizer "
            "puts noise around bin centres. The number is a valid but loose bound: evaluate with "
            "--config.eval.dequantizers=uniform, or train with --config.data.dequantization=centre"
        )
    if not dequantizer.model.at_noise and trained_on == "centre":
        found.append(
            f"{name}: the model was trained on bin centres, but this dequantizer needs its density "
            "in the whole bins. The number is a valid but loose bound: evaluate with "
            "--config.eval.dequantizers=truncated_normal, or train with "
            "--config.data.dequantization=uniform"
        )
    if dequantizer.restored is not None:
        score = dequantizer.restored.metadata["score"]
        if score["crc32"] != tree_crc32(restored.state.ema_params):
            found.append(
                f"{name}: trained for another score (step {score['step']}). The number is a valid "
                "but loose bound: train the dequantizer again with --mode=train_dequantizer"
            )
    return found
