"""Evaluation: every image of a split through a table of cells, to a report.

A cell is one estimator with one dequantizer and K draws of it (``sbml.estimators``); all are of one
checkpoint. ``evaluation.cells`` makes a cell's rows, resumes them and gives them error bars.
"""

import functools
import json
import shlex
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from ml_collections import ConfigDict

from sbml import bits, bound, dequantizers, report
from sbml.bound import GaussianControl
from sbml.data import ImageSet, spread
from sbml.estimators import Cell
from sbml.evaluation import baselines, cells
from sbml.evaluation.cells import CellRun, Dequantization, Evaluation
from sbml.experiment import trained
from sbml.experiment.build import Experiment
from sbml.intervals import mean_interval
from sbml.report import summary
from sbml.report.result import Result
from sbml.runtime.checkpoint import Restored, tree_crc32
from sbml.runtime.files import write_whole
from sbml.runtime.parts import kept, write_npz
from sbml.runtime.versions import versions


def control_variate(
    experiment: Experiment, train: ImageSet, workdir: epath.Path
) -> GaussianControl | None:
    """The Gaussian fitted to the training images' bin centres, where ``eval.control`` asks.

    Fitted once, and then read from ``workdir``.
    """
    if not experiment.config.eval.control:
        return None

    def fit() -> dict[str, np.ndarray]:
        fitted = GaussianControl.fit(train.images, noise_variance=1 / 12)
        in_scale = {
            "mean": bits.to_model(fitted.mean, 0.5, train.levels),
            "variances": (2 / train.levels) ** 2 * fitted.variances,
            **({} if fitted.basis is None else {"basis": fitted.basis}),
        }
        return {name: np.asarray(value, np.float32) for name, value in in_scale.items()}

    found: dict[str, Any] = kept(workdir / "eval", "control", train.fingerprint, fit)
    return GaussianControl(**{"basis": None, **found})


def time_density(
    experiment: Experiment,
    restored: Restored,
    train: ImageSet,
    control: GaussianControl | None,
    workdir: epath.Path,
) -> Callable[[float], np.ndarray | None]:
    """Where the bound's draws are wanted most, from training images, if ``eval.proposal_bins``.

    Found once for each smallest time, and then read from ``workdir``.
    """
    config = experiment.config.eval
    identity = {
        "data": train.fingerprint,
        "parameters_crc32": tree_crc32(restored.state.ema_params),
        "control_crc32": tree_crc32(control),
        "seed": config.seed,
        "bins": config.proposal_bins,
        **experiment.score_identity,
    }

    def pilot(eps: float) -> dict[str, np.ndarray]:
        pixels = jax.numpy.asarray(train.images[spread(len(train), 256)])
        x = bits.to_model(pixels, 0.5, train.levels)
        options: dict[str, Any] = {"eps": eps, "control": control, "bins": config.proposal_bins}
        find = jax.jit(lambda score, x, key: bound.pilot(score, experiment.sde, x, key, **options))
        score = experiment.exact_adapter(restored.state.ema_params)
        return {"density": np.asarray(find(score, x, jax.random.key(config.seed)))}

    @functools.cache
    def density(eps: float) -> np.ndarray | None:
        if not config.proposal_bins:
            return None
        at = {"eps": eps, **identity}
        return kept(workdir / "eval", "density", at, lambda: pilot(eps))["density"]

    return density


def dequantization(
    experiment: Experiment, name: str, workdir: epath.Path, train: ImageSet
) -> Dequantization:
    """The dequantizer called ``name``, with the averaged parameters of its training if it has any.

    Raises:
      ValueError: if it was to be trained and was not.
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
    """Warnings of a model trained on other data, or otherwise than it is evaluated from ``eps``."""
    warnings = trained.warn_if_other_data(restored.metadata, train)
    warnings += trained.unseen_times(restored.metadata, eps)
    if restored.metadata["config"]["data"]["dequantization"] == "none":
        warnings.append(
            "the model was trained on k / (levels - 1) without dequantization, and is evaluated "
            "on (k + u) / levels: the mismatch costs bits (data.dequantization=uniform trains on "
            "what is evaluated)"
        )
    return warnings


def _dequantizer_mismatch(restored: Restored, name: str, found: Dequantization) -> list[str]:
    """Warnings of a dequantizer made for another score, or other than the score was trained on."""
    trained_on = restored.metadata["config"]["data"]["dequantization"]
    if found.model.at_noise and trained_on == "uniform":
        return [
            f"{name}: the model was trained on uniformly dequantized images, this asks for noise "
            "around bin centres: still a bound, but a loose one (data.dequantization=centre)"
        ]
    if not found.model.at_noise and trained_on == "centre":
        return [
            f"{name}: the model was trained on bin centres, this asks for its density all over the "
            "bins: still a bound, but a loose one (data.dequantization=uniform)"
        ]
    if found.restored is not None:
        against = found.restored.metadata["score"]["crc32"]
        if against != tree_crc32(restored.state.ema_params):
            return [
                f"{name}: trained against another score (step "
                f"{found.restored.metadata['score']['step']}): still a bound, but a loose one"
            ]
    return []


def _warnings(shared: Evaluation, train: ImageSet, found: dict[str, Dequantization]) -> list[str]:
    """What is known of the model, its dequantizers and the images before anything is computed."""
    restored, images = shared.restored, shared.images
    warnings = [f"damaged, so an older checkpoint was taken: {r}" for r in restored.damaged]
    warnings += _training_mismatch(restored, train, shared.experiment.eval_eps)
    for name, dequantizer in found.items():
        warnings += _dequantizer_mismatch(restored, name, dequantizer)
    for split in (images, train):
        if split.skipped:
            named = "; ".join(split.skipped)
            warnings.append(f"{len(split.skipped)} unreadable {split.split} files: {named}")
    if (count := len(shared.ids())) < len(images):
        how = "the first" if shared.experiment.config.eval.in_order else "a random sample of"
        warnings.append(f"{how} {count} of {len(images)} images (eval.max_images)")
    return [*warnings, images.caution] if images.caution else warnings


def as_trained(asked: dict[str, Any], trained: dict[str, Any]) -> dict[str, Any]:
    """The config of this evaluation, with what its checkpoint says of the training in its place.

    An evaluation needs no flag of how its model was trained, so ``asked`` may say anything of it.
    """
    data = {name: trained["data"][name] for name in ("dequantization", "flip")}
    sections = {name: trained[name] for name in ("seed", "training", "optim")}
    return {**asked, **sections, "data": {**asked["data"], **data}}


def _fill(
    shared: Evaluation, defined: list[Cell], found: dict[str, Dequantization]
) -> tuple[cells.Table, list[Result]]:
    """Every cell's columns in one per-image table, and its result.

    A cell of fewer images than others, as where K > 1, has a table of its own on disk.
    """
    results, written = [], {summary.PER_IMAGE}
    # All are set up before the first is computed: what cannot be must not cost hours first.
    cell_runs = [CellRun(shared, cell, found[cell.dequantizer]) for cell in defined]
    tables: cells.Table = {"id": max((run.ids for run in cell_runs), key=len)}
    for cell, cell_run in zip(defined, cell_runs, strict=True):
        number = cell_run.finish()
        results.append(cell_run.result(number))
        print(results[-1].line)
        columns = {**number.terms, "bits_per_dim": number.values, "nfe": number.nfe}
        named = {f"{cell.name}_{name}": column for name, column in columns.items()}
        if np.array_equal(cell_run.ids, tables["id"]):
            tables.update(named)
            continue
        written.add(f"per_image_{cell.name}.npz")
        if jax.process_index() == 0:
            path = shared.workdir / f"per_image_{cell.name}.npz"
            write_npz(path, {"id": cell_run.ids, **named})
    if jax.process_index() == 0:  # Those of an earlier evaluation belong to no result any more.
        for path in shared.workdir.glob("per_image*.npz"):
            if path.name not in written:
                path.unlink()
    return tables, results


def run(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Evaluate the newest checkpoint of ``workdir`` on ``eval.split``, with averaged parameters.

    Writes ``per_image.npz``, ``evaluation.json``, ``report.json`` and ``report.html``. A killed
    evaluation resumes where it was.

    Raises:
      ValueError: without a checkpoint or a trained dequantizer, or with one of another model; and
        ``cells.Unconverged`` where fixed steps are too coarse.
    """
    experiment = Experiment(config)
    with jax.default_matmul_precision(config.eval.precision):
        _run(experiment, epath.Path(workdir))


def _run(experiment: Experiment, workdir: epath.Path) -> None:
    config = experiment.config
    restored = experiment.restore(workdir)
    experiment = experiment.scheduled(restored.state.ema_params)
    images, train = experiment.images(config.eval.split), experiment.images("train")
    defined = [cell for cell in experiment.cells if not cell.undefined]
    undefined = {cell.name: cell.undefined for cell in experiment.cells if cell.undefined}
    found = {
        name: dequantization(experiment, name, workdir, train)
        for name in {cell.dequantizer: None for cell in defined}
    }
    start = time.perf_counter()
    wants_control = any(cell.is_bound for cell in defined)
    control = control_variate(experiment, train, workdir) if wants_control else None
    density = time_density(experiment, restored, train, control, workdir)
    shared = Evaluation(experiment, restored, images, control, density, workdir)
    for dequantizer in found.values():
        cells.check_first_batch(shared, dequantizer)
    warnings = _warnings(shared, train, found)
    tables, results = _fill(shared, defined, found)
    if images.ids:
        tables["name"] = np.asarray(images.ids)[tables["id"]]
    warnings += [warning for result in results for warning in result.warnings]
    for warning in warnings:
        logging.warning(warning)
    evaluation = {
        "title": workdir.name,
        "results": [result.plain() for result in results],
        **({"undefined": undefined} if undefined else {}),
        "baselines": _baselines(train, images, tables["id"]),
        "warnings": warnings,
        "model": {"name": config.model.name, "parameters": experiment.parameter_count()},
        "checkpoint": {
            "step": restored.step,
            "parameters_crc32": tree_crc32(restored.state.ema_params),
        },
        "data": {"train": train.fingerprint, config.eval.split: images.fingerprint},
        "config": as_trained(experiment.to_plain(), restored.metadata["config"]),
        "command": shlex.join(["python", "-m", "sbml.main", *sys.argv[1:]]),
        "versions": versions(),
    }
    if jax.process_index() == 0:
        write_npz(workdir / summary.PER_IMAGE, tables)
        text = json.dumps(report.strict(evaluation), indent=1)
        write_whole(workdir / summary.EVALUATION, text.encode())
        summary.write(workdir, lambda _: images)
    # Printed only: what is written of an evaluation is the same bytes, killed and resumed or not.
    print(f"report: {workdir / 'report.html'}, in {time.perf_counter() - start:.0f} s")
