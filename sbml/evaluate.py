"""Evaluation: every image of a split through the estimators, to a table and a report.

The estimators and their terms are in ``sbml.estimators``. Every image counts exactly once: batches
are padded and the padding is dropped. Keys are per image id, and step sizes per image, so neither
the batch size nor the number of devices changes a result.
"""

import hashlib
import json
import time
import zlib
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from ml_collections import ConfigDict

from sbml import baselines, bits, estimators, summary
from sbml.bound import GaussianControl
from sbml.build import Experiment, warn_if_other_data
from sbml.data import ImageSet, eval_batches
from sbml.intervals import mean_interval
from sbml.runtime import progress, report, sharding
from sbml.runtime.checkpoint import Restored
from sbml.runtime.files import write_whole
from sbml.runtime.parts import Parts, write_npz
from sbml.runtime.versions import versions
from sbml.types import Score


def _columns(
    experiment: Experiment,
    estimator: str,
    score: Score,
    control: GaussianControl | None,
    images: ImageSet,
    ids: np.ndarray,
    mesh: jax.sharding.Mesh,
) -> dict[str, np.ndarray]:
    """The table's rows of ``ids``, on the host; totals in float64 so that the terms add up."""
    config, split = experiment.config.eval, sharding.batched(mesh)
    batch = (
        score,
        sharding.put(images.images[ids], split),
        sharding.put(ids.astype(np.int32), split),
        np.uint32(config.seed),
    )
    common = {"sde": experiment.sde, "levels": experiment.levels, "eps": experiment.eval_eps}
    if estimator == "ode":
        solve = {"trace": experiment.trace, "solver": experiment.eval_solver}
        found = estimators.ode(*batch, **common, **solve)
    else:
        draws = {"draw": config.times, "n_times": config.n_times, "n_images": len(images)}
        found = estimators.evidence_bound(*batch, control, **common, **draws)
    found = sharding.to_host(found)
    names = estimators.TERMS[estimator]
    rows = {name: np.asarray(found[name], np.float64) for name in names if name != "scale"}
    scale = bits.nats_to_bits(bits.scale_nats(images.shape, images.levels), images.shape)
    rows["scale"] = np.full(len(ids), scale)
    rows["bits_per_dim"] = np.sum([rows[name] for name in names], axis=0)
    return {"id": np.asarray(ids, np.int64), **rows, "nfe": np.asarray(found["nfe"])}


def control_variate(experiment: Experiment, train: ImageSet) -> GaussianControl | None:
    """The Gaussian fitted to the training images' bin centres, where ``eval.control`` asks."""
    if not experiment.config.eval.control:
        return None
    centres = 2.0 * (np.asarray(train.images) + 0.5) / train.levels - 1.0
    fitted = GaussianControl.fit(centres, noise_variance=(2 / train.levels) ** 2 / 12)
    return jax.tree.map(lambda a: np.asarray(a, np.float32), fitted)


def _identity(
    experiment: Experiment,
    estimator: str,
    restored: Restored,
    images: ImageSet,
    control: GaussianControl | None,
) -> dict[str, Any]:
    """What a result depends on: not the batch size, nor how many images are wanted."""
    config, free = experiment.to_plain(), ("batch_size", "max_images", "estimators")
    evaluation = {k: v for k, v in config["eval"].items() if k not in free}
    crc = control_crc = 0
    for leaf in jax.tree.leaves(restored.state.ema_params):
        crc = zlib.crc32(np.asarray(leaf.addressable_data(0)).tobytes(), crc)
    for leaf in jax.tree.leaves(control):
        control_crc = zlib.crc32(leaf.tobytes(), control_crc)
    return {
        "estimator": estimator,
        "control_crc32": control_crc,
        "step": restored.step,
        "parameters_crc32": crc,
        "eval": {**evaluation, "smallest_time": experiment.eval_eps},
        "score": config["score"],
        "sde": config["sde"],
        "data": images.fingerprint,
    }


def table(
    experiment: Experiment,
    estimator: str,
    restored: Restored,
    images: ImageSet,
    control: GaussianControl | None,
    workdir: epath.Path,
) -> dict[str, np.ndarray]:
    """Every wanted image's row, made or read back from an earlier, interrupted evaluation."""
    config, mesh = experiment.config.eval, sharding.data_mesh()
    count = min(config.max_images or len(images), len(images))
    identity = _identity(experiment, estimator, restored, images, control)
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:12]
    parts = Parts(workdir / "eval" / digest, identity)
    done = parts.read()
    missing = np.setdiff1d(np.arange(count), done.get("id", []))
    if len(missing) < count:
        logging.info("%d of %d images were evaluated before", count - len(missing), count)
    score = experiment.adapter(restored.state.ema_params)
    bar = progress.bar(f"eval {estimator}", "image", count, count - len(missing))
    with bar:
        for rows, mask in eval_batches(len(missing), sharding.round_up(config.batch_size)):
            columns = _columns(experiment, estimator, score, control, images, missing[rows], mesh)
            columns = {k: v[mask] for k, v in columns.items()}
            if jax.process_index() == 0:
                parts.write(columns)
            bar.update(int(mask.sum()))
            bar.set_postfix_str(f"{np.mean(columns['bits_per_dim']):.3f} bits/dim", refresh=False)
    sharding.barrier("evaluated")
    full = parts.read()
    return {k: v[full["id"] < count] for k, v in full.items()}


def _result(
    experiment: Experiment, estimator: str, rows: dict[str, np.ndarray], size: int
) -> dict[str, Any]:
    interval = mean_interval(rows["bits_per_dim"])
    return {
        "estimator": estimator,
        "dequantizer": "uniform",
        "split": experiment.config.eval.split,
        "n": interval.n,
        "split_size": size,
        "bits_per_dim": interval.mean,
        "stderr": interval.stderr,
        "ci95": interval.ci95,
        "interval": list(interval.bounds),
        "nonfinite": interval.nonfinite,
        "min": float(rows["bits_per_dim"].min()),
        "max": float(rows["bits_per_dim"].max()),
        "terms": {name: float(rows[name].mean()) for name in estimators.TERMS[estimator]},
        "nfe_mean": float(rows["nfe"].mean()),
        "nfe_max": int(rows["nfe"].max()),
    }


def _baselines(train: ImageSet, images: ImageSet, ids: np.ndarray) -> list[dict[str, Any]]:
    chosen = images.images[ids]
    values = {
        "per-pixel histogram": baselines.histogram(train.images, chosen, train.levels),
        "full-covariance Gaussian": baselines.gaussian(train.images, chosen),
    }
    intervals = {name: mean_interval(v) for name, v in values.items()}
    return [
        {"name": name, "bits_per_dim": i.mean, "ci95": i.ci95, "interval": list(i.bounds)}
        for name, i in intervals.items()
    ]


def _training_mismatch(restored: Restored, train: ImageSet) -> list[str]:
    """Warnings of a model trained on other data, or otherwise than it is evaluated."""
    warnings = warn_if_other_data(restored.metadata, train)
    if restored.metadata["config"]["data"]["dequantization"] == "none":
        warnings.append(
            "the model was trained on k / (levels - 1) without dequantization, and is evaluated "
            "on (k + u) / levels: the mismatch costs bits (data.dequantization=uniform trains on "
            "what is evaluated)"
        )
        logging.warning(warnings[-1])
    return warnings


def run(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Evaluate the newest checkpoint of ``workdir`` on ``eval.split``, with averaged parameters.

    Writes ``per_image.npz``, ``evaluation.json``, ``report.json`` and ``report.html``. A killed
    evaluation resumes where it was.

    Raises:
      ValueError: without a checkpoint, or with one of another model.
    """
    experiment, workdir = Experiment(config), epath.Path(workdir)
    restored = experiment.restore(workdir)
    images, train = experiment.images(config.eval.split), experiment.images("train")
    warnings = _training_mismatch(restored, train)
    start = time.perf_counter()
    control = control_variate(experiment, train) if "bound" in config.eval.estimators else None
    tables, results = {}, []
    for estimator in config.eval.estimators:
        fitted = control if estimator == "bound" else None
        rows = table(experiment, estimator, restored, images, fitted, workdir)
        results.append(_result(experiment, estimator, rows, len(images)))
        ids = rows.pop("id")
        tables.update({f"{estimator}_{name}": column for name, column in rows.items()})
        if results[-1]["nonfinite"]:
            count = results[-1]["nonfinite"]
            warnings.append(f"{estimator}: {count} images have a non-finite result")
    if images.skipped:
        warnings.append(f"{len(images.skipped)} unreadable files: {'; '.join(images.skipped)}")
    if len(ids) < len(images):
        warnings.append(f"only {len(ids)} of {len(images)} images (eval.max_images)")
    evaluation = {
        "title": workdir.name,
        "results": results,
        "baselines": _baselines(train, images, ids),
        "warnings": warnings,
        "model": {"name": config.model.name, "parameters": experiment.parameter_count()},
        "checkpoint": {"step": restored.step},
        "solver": {
            "method": config.eval.method,
            "rtol": config.eval.rtol,
            "atol": config.eval.atol,
            "trace": config.eval.trace,
            "probes": config.eval.probes,
            "smallest_time": experiment.eval_eps,
        },
        "data": {"train": train.fingerprint, config.eval.split: images.fingerprint},
        "config": experiment.to_plain(),
        "versions": versions(),
        "timing": {"evaluation_seconds": round(time.perf_counter() - start, 1)},
    }
    if jax.process_index() == 0:
        write_npz(workdir / summary.PER_IMAGE, {"id": ids, **tables})
        text = json.dumps(report.strict(evaluation), indent=1)
        write_whole(workdir / summary.EVALUATION, text.encode())
        summary.write(workdir, images)
    for result in results:
        low, high = result["interval"]
        print(
            f"{result['estimator']:6s} {result['bits_per_dim']:.4f} bits/dim, "
            f"95% interval [{low:.4f}, {high:.4f}], n={result['n']}"
        )
    print(f"report: {workdir / 'report.html'}")
