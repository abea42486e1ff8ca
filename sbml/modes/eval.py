"""Evaluates a checkpoint on the images of a split, and writes a report: ``--mode=eval``.

The results are a table of cells. A cell is one estimator with one dequantizer and K draws of it
(``sbml.estimators``). ``evaluation.cells`` computes bits/dim for every image of a cell, resumes an
interrupted computation, and adds error bars.
"""

import functools
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging

from sbml import bits, bound, dequantizers, report
from sbml.bound import GaussianControl
from sbml.data import ImageSet, spread
from sbml.dequantizers import DEQUANTIZERS
from sbml.estimators import Cell
from sbml.evaluation import baselines, cells
from sbml.evaluation.cells import CellRun, Dequantization, Evaluation
from sbml.experiment import trained
from sbml.experiment.build import Experiment
from sbml.intervals import mean_interval
from sbml.report import summary
from sbml.report.result import Result
from sbml.runtime.checkpoint import Restored
from sbml.runtime.trees import table_crc32, tree_crc32
from sbml.runtime.versions import versions
from sbml.runtime.workdir import EVALUATION, PER_IMAGE, Workdir
from sbml.streams import stream


def control_variate(
    experiment: Experiment, train: ImageSet, workdir: Workdir
) -> GaussianControl | None:
    """The Gaussian of the control variate, fitted to the dequantized training images; None without
    ``eval.control``.

    It is fitted once and then read from ``workdir``.
    """
    if not experiment.config.eval.control:
        return None

    def fit() -> dict[str, np.ndarray]:
        # The fit is to the integers k; then k is mapped to the scale of the model, [-1, 1].
        gaussian = GaussianControl.fit(train.images, noise_variance=1 / 12)
        arrays = {
            "mean": bits.to_model(gaussian.mean, 0.5, train.levels),
            "variances": (2 / train.levels) ** 2 * gaussian.variances,
            **({} if gaussian.basis is None else {"basis": gaussian.basis}),
        }
        return {name: np.asarray(value, np.float32) for name, value in arrays.items()}

    arrays: dict[str, Any] = workdir.compute_once("control", train.fingerprint, fit)
    return GaussianControl(**{"basis": None, **arrays})


def time_density(
    experiment: Experiment,
    restored: Restored,
    train: ImageSet,
    control: GaussianControl | None,
    workdir: Workdir,
) -> Callable[[float], np.ndarray | None]:
    """A function from the smallest time eps to the density of the bound's times, ``(bins,)``.

    The density is estimated on 256 training images, once for each eps, and then read from
    ``workdir``. The function returns None if ``eval.proposal_bins`` is 0.
    """
    config = experiment.config.eval
    identity = {
        "data": train.fingerprint,
        "parameters_crc32": tree_crc32(restored.state.ema_params),
        "control_crc32": tree_crc32(control),
        "seed": config.seed,
        "bins": config.proposal_bins,
        "score": experiment.score_identity,
    }

    def pilot(eps: float) -> dict[str, np.ndarray]:
        pixels = jax.numpy.asarray(train.images[spread(len(train), 256)])
        x = bits.to_model(pixels, 0.5, train.levels)
        options: dict[str, Any] = {"eps": eps, "control": control, "bins": config.proposal_bins}
        run = jax.jit(lambda score, x, key: bound.pilot(score, experiment.sde, x, key, **options))
        score = experiment.exact_adapter(restored.state.ema_params)
        return {"density": np.asarray(run(score, x, stream(jax.random.key(config.seed), "pilot")))}

    @functools.cache
    def density(eps: float) -> np.ndarray | None:
        if not config.proposal_bins:
            return None
        arrays = workdir.compute_once("density", {"eps": eps, **identity}, lambda: pilot(eps))
        return arrays["density"]

    return density


def dequantization(
    experiment: Experiment, name: str, workdir: Workdir, train: ImageSet
) -> Dequantization:
    """The dequantizer called ``name``, with the averaged parameters of its training if it has
    parameters.

    Raises:
      ValueError: it has parameters and was not trained.
    """
    model = experiment.dequantizer(name)
    if not dequantizers.is_trained(model):
        return Dequantization(model, model.init(jax.random.key(0), train.images[:1]))
    restored = experiment.restore_dequantizer(workdir, train)
    return Dequantization(model, restored.state.ema_params, restored)


def _baselines(train: ImageSet, images: ImageSet, ids: np.ndarray) -> list[dict[str, Any]]:
    values = baselines.all_of(train.images, images.images[ids], train.levels)
    intervals = {name: mean_interval(v) for name, v in values.items()}
    return [
        {"name": name, "bits_per_dim": i.mean, "ci95": i.ci95, "interval": list(i.bounds)}
        for name, i in intervals.items()
    ]


def _training_mismatch(restored: Restored, train: ImageSet, eps: float) -> list[str]:
    """Warnings if the model was trained on other data, other times, or without dequantization."""
    warnings = trained.other_data(restored.metadata, train)
    warnings += trained.unseen_times(restored.metadata, eps)
    if restored.metadata["config"]["data"]["dequantization"] == "none":
        warnings.append(
            "the model was trained on k / (levels - 1) without dequantization, and is evaluated "
            "on (k + u) / levels: this mismatch increases bits/dim "
            "(data.dequantization=uniform trains on the data that are evaluated)"
        )
    return warnings


def _dequantizer_mismatch(restored: Restored, name: str, dequantizer: Dequantization) -> list[str]:
    """Warnings if the dequantizer does not fit the score's training data, or was trained for
    another score."""
    warnings = []
    trained_on = restored.metadata["config"]["data"]["dequantization"]
    if dequantizer.model.at_noise and trained_on == "uniform":
        warnings.append(
            f"{name}: the model was trained on uniformly dequantized images, but this dequantizer "
            "puts noise around bin centres. The number is a valid but loose bound: evaluate with "
            "--config.eval.dequantizers=uniform, or train with --config.data.dequantization=centre"
        )
    if not dequantizer.model.at_noise and trained_on == "centre":
        warnings.append(
            f"{name}: the model was trained on bin centres, but this dequantizer needs its density "
            "in the whole bins. The number is a valid but loose bound: evaluate with "
            "--config.eval.dequantizers=truncated_normal, or train with "
            "--config.data.dequantization=uniform"
        )
    if dequantizer.restored is not None:
        score = dequantizer.restored.metadata["score"]
        if score["crc32"] != tree_crc32(restored.state.ema_params):
            warnings.append(
                f"{name}: trained for another score (step {score['step']}). The number is a valid "
                "but loose bound: train the dequantizer again with --mode=train_dequantizer"
            )
    return warnings


def _warnings(
    shared: Evaluation, train: ImageSet, dequantizations: dict[str, Dequantization]
) -> list[str]:
    """Warnings about the model, its dequantizers and the images, before these are evaluated."""
    restored, images = shared.restored, shared.images
    warnings = [f"damaged, so an older checkpoint was taken: {r}" for r in restored.damaged]
    warnings += _training_mismatch(restored, train, shared.experiment.eval_eps)
    for name, dequantizer in dequantizations.items():
        warnings += _dequantizer_mismatch(restored, name, dequantizer)
    for split in {images.split: images, train.split: train}.values():
        if split.skipped:
            paths, count = "; ".join(split.skipped), len(split.skipped)
            files = "file is" if count == 1 else "files are"
            warnings.append(f"{count} {split.split} {files} not used: {paths}")
    if (count := len(shared.ids())) < len(images):
        sample = "the first" if shared.experiment.config.eval.in_order else "a random sample of"
        warnings.append(f"{sample} {count} of {len(images)} images (eval.max_images)")
    # If the images have scenes, the caution is about the interval, which is not of these images.
    cautions = [images.caution, train.caution if train.scenes is None else ""]
    return [*warnings, *filter(None, dict.fromkeys(cautions))]


def as_trained(asked: dict[str, Any], trained: dict[str, Any]) -> dict[str, Any]:
    """The config ``asked`` of this evaluation, with the settings of the training replaced by those
    in the checkpoint's config ``trained``.

    An evaluation does not use the settings of the training, so those in ``asked`` can be wrong.
    """
    data = {name: trained["data"][name] for name in ("dequantization", "flip")}
    sections = {name: trained[name] for name in ("seed", "training", "optim")}
    return {**asked, **sections, "data": {**asked["data"], **data}}


def _fill(
    shared: Evaluation, defined: list[Cell], dequantizations: dict[str, Dequantization]
) -> tuple[dict[str, cells.Table], list[Result], list[str]]:
    """The per-image tables by the names of their files, the result of each cell, and warnings about
    rows that earlier commands computed.

    One table has the columns of all cells with as many images. A cell with fewer images than
    others, such as one with K > 1, has a table of its own.
    """
    results = []
    # All cells are set up before the first is computed, so that errors appear within seconds.
    cell_runs = [CellRun(shared, cell, dequantizations[cell.dequantizer]) for cell in defined]
    shared_table: cells.Table = {"id": max((run.ids for run in cell_runs), key=len)}
    tables = {PER_IMAGE: shared_table}
    for cell, cell_run in zip(defined, cell_runs, strict=True):
        number = cell_run.finish()
        results.append(cell_run.result(number))
        print(results[-1].line)
        columns = {**number.terms, "bits_per_dim": number.values, "nfe": number.nfe}
        named = {f"{cell.name}_{name}": column for name, column in columns.items()}
        if np.array_equal(cell_run.ids, shared_table["id"]):
            shared_table.update(named)
        else:
            tables[f"per_image_{cell.name}.npz"] = {"id": cell_run.ids, **named}
    return tables, results, [warning for run in cell_runs for warning in run.warnings()]


def _write(workdir: Workdir, tables: dict[str, cells.Table], evaluation: dict[str, Any]) -> None:
    """Write the tables and then the evaluation that names them; delete those of an earlier one."""
    for name, columns in tables.items():
        workdir.write(name, columns)
    workdir.write(EVALUATION, report.strict(evaluation))
    for path in workdir.path.glob("per_image*.npz"):
        if path.name not in tables:
            path.unlink()


def check(experiment: Experiment, workdir: Workdir, before: Sequence[str]) -> None:
    """Check that the dequantizers with parameters are trained, or will be.

    Raises:
      ValueError: one is not.
    """
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

    Writes ``per_image.npz``, ``evaluation.json``, ``report.json`` and ``report.html``. A killed
    evaluation resumes where it stopped.

    Raises:
      ValueError: there is no checkpoint or no trained dequantizer, or it belongs to another model.
      cells.Unconverged: fixed steps are too coarse.
    """
    precision = experiment.config.eval.precision
    with workdir.lock("eval"), jax.default_matmul_precision(precision):
        _run(experiment, workdir)


def _run(experiment: Experiment, workdir: Workdir) -> None:
    config = experiment.config
    experiment, restored = experiment.restored(workdir)
    images, train = experiment.images(config.eval.split), experiment.images("train")
    table = config.eval.cells()
    defined = [cell for cell in table if not cell.reason_undefined]
    undefined = {cell.name: cell.reason_undefined for cell in table if cell.reason_undefined}
    dequantizations = {
        name: dequantization(experiment, name, workdir, train)
        for name in {cell.dequantizer: None for cell in defined}
    }
    start = time.perf_counter()
    wants_control = any(cell.kind.reducible for cell in defined)
    control = control_variate(experiment, train, workdir) if wants_control else None
    density = time_density(experiment, restored, train, control, workdir)
    shared = Evaluation(experiment, restored, images, control, density, workdir)
    for dequantizer in dequantizations.values():
        cells.check_first_batch(shared, dequantizer)
    before = _warnings(shared, train, dequantizations)
    for warning in before:  # Before the work, so that the user can stop it.
        logging.warning(warning)
    with shared.preemption:
        tables, results, of_rows = _fill(shared, defined, dequantizations)
    shared_table = tables[PER_IMAGE]
    if images.ids:
        shared_table["name"] = np.asarray(images.ids)[shared_table["id"]]
    of_results = [warning for result in results for warning in result.warnings(images.ids)]
    for warning in (*of_results, *of_rows):
        logging.warning(warning)
    left_out = baselines.omitted(train.images)
    evaluation = {
        "title": workdir.name,
        "results": [result.plain() for result in results],
        **({"undefined": undefined} if undefined else {}),
        "baselines": _baselines(train, images, shared_table["id"]),
        **({"baselines_left_out": left_out} if left_out else {}),
        "warnings": [*before, *of_results, *of_rows],
        "model": {"name": config.model.name, "parameters": experiment.parameter_count()},
        "checkpoint": {
            "step": restored.step,
            "parameters_crc32": tree_crc32(restored.state.ema_params),
        },
        "data": {"train": train.fingerprint, config.eval.split: images.fingerprint},
        "config": as_trained(experiment.to_plain(), restored.metadata["config"]),
        "tables": {name: table_crc32(columns) for name, columns in tables.items()},
        "command": shlex.join(["python", "-m", "sbml.main", *sys.argv[1:]]),
        "versions": versions(),
    }
    if jax.process_index() == 0:
        _write(workdir, tables, evaluation)
        summary.write(workdir, lambda _: images)
    # The time is only printed, so that a resumed evaluation writes the same files as one without
    # interruption.
    print(f"report: {workdir / 'report.html'}, in {time.perf_counter() - start:.0f} s")
    # A signal during the last batch also ends the process, before its next mode begins.
    shared.preemption.leave_if_requested("the evaluation is written")
