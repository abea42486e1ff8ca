"""The table of an evaluation: its cells, the numbers of every image, and the files they go to."""

import shlex
import sys
from typing import Any

import numpy as np
from absl import logging

from sbml import report
from sbml.estimate import Columns
from sbml.evaluation import baselines, cautions
from sbml.evaluation.cells import CellRun
from sbml.evaluation.inputs import Inputs, check_first_batch
from sbml.intervals import mean_interval
from sbml.report.result import Result
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
        self.undefined = {cell.name: cell.reason_undefined for cell in cells}
        self.cells = [cell for cell in cells if not cell.reason_undefined]
        names = dict.fromkeys(cell.dequantizer for cell in self.cells)
        self.dequantizations = {name: shared.dequantization(name) for name in names}
        for dequantization in self.dequantizations.values():
            check_first_batch(shared, dequantization)
        self.columns: dict[str, Columns] = {}
        self.results: list[Result] = []
        self.warnings: list[str] = []
        # These come before the work, so that the user can stop it.
        self._warn(cautions.warnings(shared, self.dequantizations))

    def _warn(self, found: list[str]) -> None:
        for warning in found:
            logging.warning(warning)
        self.warnings += found

    def fill(self) -> None:
        """Compute all cells, or read the rows that an interrupted evaluation has computed.

        Raises:
          cells.Unconverged: fixed steps are too coarse.
        """
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
        undefined = {name: reason for name, reason in self.undefined.items() if reason}
        left_out = baselines.omitted(train.images)
        return {
            "title": shared.workdir.name,
            "results": [result.plain() for result in self.results],
            **({"undefined": undefined} if undefined else {}),
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
            "config": as_trained(experiment.to_plain(), restored.metadata["config"]),
            "tables": {name: table_crc32(columns) for name, columns in self.columns.items()},
            "command": shlex.join(["python", "-m", "sbml.main", *sys.argv[1:]]),
            "versions": versions(),
        }

    def write(self, workdir: Workdir, evaluation: dict[str, Any]) -> None:
        """Write the columns, and then the evaluation that names them; delete those of an earlier
        evaluation."""
        for name, columns in self.columns.items():
            workdir.write(name, columns)
        workdir.write(EVALUATION, report.strict(evaluation))
        for path in workdir.path.glob("per_image*.npz"):
            if path.name not in self.columns:
                path.unlink()


def as_trained(asked: dict[str, Any], trained: dict[str, Any]) -> dict[str, Any]:
    """The config ``asked`` of this evaluation, with the settings of the training replaced by those
    in the checkpoint's config ``trained``.

    An evaluation does not use the settings of the training, so those in ``asked`` can be wrong.
    """
    data = {name: trained["data"][name] for name in ("dequantization", "flip")}
    sections = {name: trained[name] for name in ("seed", "training", "optim")}
    return {**asked, **sections, "data": {**asked["data"], **data}}
