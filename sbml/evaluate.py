"""Evaluation: uint8 image -> dequantize -> probability-flow ODE -> bits/dim, itemised.

    bits/dim = [ -log pi(z) - integral div v dt + d log(L / 2) ] / (d log 2)

Every image counts exactly once: batches are padded and the padding is dropped. Keys are per image
id, and step sizes per image, so neither the batch size nor the number of devices changes a result.
"""

import functools
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
from tqdm.auto import tqdm

from sbml import baselines, bits, likelihood, summary
from sbml.build import Experiment, warn_if_other_data
from sbml.data import ImageSet, eval_batches
from sbml.dequantizers import uniform
from sbml.intervals import mean_interval
from sbml.likelihood import Trace
from sbml.ode import Solver
from sbml.runtime import report, sharding
from sbml.runtime.checkpoint import Restored
from sbml.runtime.files import write_whole
from sbml.runtime.parts import Parts, write_npz
from sbml.runtime.versions import versions
from sbml.sdes import SDE
from sbml.types import Array, Score

TERMS = ("prior", "divergence", "dequantization", "scale")


@functools.partial(jax.jit, static_argnames=("sde", "levels", "eps", "trace", "solver"))
def _ode_batch(
    score: Score,
    pixels: Array,
    ids: Array,
    seed: Array,
    *,
    sde: SDE,
    levels: int,
    eps: float,
    trace: Trace,
    solver: Solver,
) -> dict[str, Array]:
    """Per-image terms in bits/dim and solver counts of uint8 ``pixels (n, *s)``."""
    base_key = jax.random.key(seed)

    def one(pixels: Array, i: Array) -> dict[str, Array]:
        u_key, trace_key = jax.random.split(jax.random.fold_in(base_key, i))
        u, log_q = uniform.Model().sample({}, pixels, u_key)
        x = bits.to_model(pixels, u, levels)
        result = likelihood.ode_logp(score, sde, x, trace_key, eps=eps, trace=trace, solver=solver)
        return {
            "prior": bits.nats_to_bits(-result.prior, x.shape),
            "divergence": bits.nats_to_bits(-result.divergence, x.shape),
            "dequantization": bits.nats_to_bits(log_q, x.shape),
            "nfe": result.stats.nfe,
        }

    return jax.vmap(one)(pixels, ids)


def _columns(
    experiment: Experiment, score: Score, images: ImageSet, ids: np.ndarray, mesh: jax.sharding.Mesh
) -> dict[str, np.ndarray]:
    """The table's rows of ``ids``, on the host; totals in float64 so that the terms add up."""
    split = sharding.batched(mesh)
    terms = sharding.to_host(
        _ode_batch(
            score,
            sharding.put(images.images[ids], split),
            sharding.put(ids.astype(np.int32), split),
            np.uint32(experiment.config.eval.seed),
            sde=experiment.sde,
            levels=experiment.levels,
            eps=experiment.eval_eps,
            trace=experiment.trace,
            solver=experiment.eval_solver,
        )
    )
    rows = {name: np.asarray(terms[name], np.float64) for name in TERMS if name != "scale"}
    scale = bits.nats_to_bits(bits.scale_nats(images.shape, images.levels), images.shape)
    rows["scale"] = np.full(len(ids), scale)
    rows["bits_per_dim"] = np.sum([rows[name] for name in TERMS], axis=0)
    return {"id": np.asarray(ids, np.int64), **rows, "nfe": np.asarray(terms["nfe"])}


def _identity(experiment: Experiment, restored: Restored, images: ImageSet) -> dict[str, Any]:
    """What a result depends on: not the batch size, nor how many images are wanted."""
    config = experiment.to_plain()
    evaluation = {k: v for k, v in config["eval"].items() if k not in ("batch_size", "max_images")}
    crc = 0
    for leaf in jax.tree.leaves(restored.state.ema_params):
        crc = zlib.crc32(np.asarray(leaf.addressable_data(0)).tobytes(), crc)
    return {
        "step": restored.step,
        "parameters_crc32": crc,
        "eval": {**evaluation, "smallest_time": experiment.eval_eps},
        "score": config["score"],
        "sde": config["sde"],
        "data": images.fingerprint,
    }


def table(
    experiment: Experiment, restored: Restored, images: ImageSet, workdir: epath.Path
) -> dict[str, np.ndarray]:
    """Every wanted image's row, made or read back from an earlier, interrupted evaluation."""
    config, mesh = experiment.config.eval, sharding.data_mesh()
    count = min(config.max_images or len(images), len(images))
    identity = _identity(experiment, restored, images)
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:12]
    parts = Parts(workdir / "eval" / digest, identity)
    done = parts.read()
    missing = np.setdiff1d(np.arange(count), done.get("id", []))
    if len(missing) < count:
        logging.info("%d of %d images were evaluated before", count - len(missing), count)
    score = experiment.adapter(restored.state.ema_params)
    bar = tqdm(
        total=count,
        initial=count - len(missing),
        desc="eval",
        unit="image",
        disable=jax.process_index() > 0,
    )
    with bar:
        for rows, mask in eval_batches(len(missing), sharding.round_up(config.batch_size)):
            columns = _columns(experiment, score, images, missing[rows], mesh)
            columns = {k: v[mask] for k, v in columns.items()}
            if jax.process_index() == 0:
                parts.write(columns)
            bar.update(int(mask.sum()))
            bar.set_postfix_str(f"{np.mean(columns['bits_per_dim']):.3f} bits/dim")
    sharding.barrier("evaluated")
    full = parts.read()
    return {k: v[full["id"] < count] for k, v in full.items()}


def _result(experiment: Experiment, rows: dict[str, np.ndarray], size: int) -> dict[str, Any]:
    interval = mean_interval(rows["bits_per_dim"])
    return {
        "estimator": "ode",
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
        "terms": {name: float(rows[name].mean()) for name in TERMS},
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
    warnings = warn_if_other_data(restored.metadata, train)
    if restored.metadata["config"]["data"]["dequantization"] == "none":
        warnings.append(
            "the model was trained on k / (levels - 1) without dequantization, and is evaluated "
            "on (k + u) / levels: the mismatch costs bits (data.dequantization=uniform trains on "
            "what is evaluated)"
        )
        logging.warning(warnings[-1])
    start = time.perf_counter()
    rows = table(experiment, restored, images, workdir)
    result = _result(experiment, rows, len(images))
    if result["n"] < len(images):
        warnings.append(f"only {result['n']} of {len(images)} images (eval.max_images)")
    if images.skipped:
        warnings.append(f"{len(images.skipped)} unreadable files: {'; '.join(images.skipped)}")
    if result["nonfinite"]:
        warnings.append(f"{result['nonfinite']} images have a non-finite likelihood")
    evaluation = {
        "title": workdir.name,
        "results": [result],
        "baselines": _baselines(train, images, rows["id"]),
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
        write_npz(workdir / summary.PER_IMAGE, rows)
        text = json.dumps(report.strict(evaluation), indent=1)
        write_whole(workdir / summary.EVALUATION, text.encode())
        summary.write(workdir, images)
    low, high = result["interval"]
    print(
        f"{result['bits_per_dim']:.4f} bits/dim, 95% interval [{low:.4f}, {high:.4f}], "
        f"n={result['n']}; report: {workdir / 'report.html'}"
    )
