"""The report of a work directory, made from the files that the modes have written there.

    eval        evaluation.json, per_image.npz
    sample      samples.npz
    eval of training images     train/evaluation.json
    quality     quality.json, neighbours.png
    compress, decompress        codec.json
    train       metrics.jsonl, samples/step_*.png

If there is an evaluation, the modes ``eval``, ``sample``, ``quality`` and ``decompress`` also write
``report.json`` and ``report.html``. The mode ``report`` writes them even without an evaluation. If
the evaluation is of other images than those of the config, nothing is written.
"""

import itertools
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging

from sbml.core.files import read_png
from sbml.core.types import Json
from sbml.data import ImageSet
from sbml.program.report import page, result
from sbml.program.report.stored import OtherEvaluation, Stored
from sbml.program.runtime import history, metrics
from sbml.program.runtime.workdir import EVALUATION, Workdir
from sbml.statistics.intervals import difference

Rows = Sequence[Mapping[str, Any]]  # of a file of metrics
NEIGHBOURS_CAPTION = "The first samples, and below each the training image nearest to it."


def write(
    workdir: Workdir,
    load: Callable[[str], ImageSet],
    known: Mapping[str, Any] | None = None,
    curves: Rows | None = None,
) -> bool:
    """Write ``report.json`` and ``report.html``, if there is an evaluation or ``known`` is given.

    Args:
      workdir: the work directory.
      load: a function from a split to its images. If they cannot be loaded, or are not those that
        were evaluated, a warning is logged and the report is not written.
      known: ``model``, ``config`` and ``training`` (its progress) of a run that may have no
        evaluation. The report then also lists what is missing.
      curves: the metrics; None to read them.

    Returns:
      Whether the report was written.
    """
    stored = Stored(workdir)
    curves = metrics.read(workdir) if curves is None else curves
    past = metrics.read(workdir, history.FILE)
    evaluation, table, images = stored.evaluation, None, None
    if evaluation:
        split = evaluation["results"][0]["split"]
        evaluated = evaluation["data"].get(split)
        try:
            images = load(split)
            if images.fingerprint != evaluated:
                raise ValueError(f"it is of {evaluated}, this config has {images.fingerprint}")
        except (ValueError, OSError, ImportError) as error:
            logging.warning("the images of %s: %s: the report stays as it is", EVALUATION, error)
            return False
        try:
            table = stored.table()
        except OtherEvaluation as error:
            logging.warning("%s: the report stays as it is", error)
            return False
    elif known is None:
        return False
    empty = {"title": workdir.name, "results": [], "warnings": []}
    content: dict[str, Any] = {**(known or {}), **empty, **evaluation}
    warnings, checkpoint = [*content["warnings"]], content.get("checkpoint", {})
    newest = content.get("training", {}).get("checkpoint") or 0
    trained_further = newest > checkpoint.get("step", newest)
    if trained_further:
        warning = (
            f"the results are those of step {checkpoint['step']}, but the newest checkpoint is of "
            f"step {newest}: evaluate it (--mode=eval)"
        )
        logging.warning("%s", warning)
        warnings.insert(0, warning)
    if (codec := stored.codec(checkpoint)) is not None:
        content["codec"] = codec
        warnings += codec.get("warnings", [])
    (samples, quality), pictures = stored.samples(checkpoint), []
    if samples is not None:
        count, failed = len(samples["images"]), int(np.sum(samples["failed"]))
        content["samples"] = {
            "count": count,
            "nfe_mean": float(samples["nfe"].mean()),
            "nfe_max": int(samples["nfe"].max()),
            "sampler": str(samples["sampler"]),
            **({} if checkpoint else {"step": int(samples["step"])}),
        }
        if failed:
            warnings.append(f"{failed} of {count} samples are not finite")
        if quality is not None:
            content["quality"] = quality["values"]
            warnings += [f"quality of the samples: {each}" for each in quality.get("warnings", [])]
            if png := stored.neighbours(quality):
                pictures = [(NEIGHBOURS_CAPTION, png)]
    elif (drawn := stored.drawn_at) is not None:
        evaluated = checkpoint["step"]
        remedy = "evaluate again (--mode=eval), or " if drawn > evaluated else ""
        remedy += "draw new samples (--mode=sample)"
        warnings.insert(
            0,
            f"the samples are of another checkpoint (step {drawn}) than the results (step "
            f"{evaluated}{', of other parameters' if drawn == evaluated else ''}), and left out: "
            f"{remedy}",
        )
    if found := provenance_of(past, content, curves):
        content["provenance"] = found
    if content["results"] and content["results"][0]["split"] != "train":
        content["gap"] = gap_of(workdir, evaluation, stored.of_training)
    content["warnings"] = warnings
    if known is not None:
        # The newest picture of the training takes the place of samples.
        paths = [] if samples else (workdir / "samples").glob("step_*.png")
        steps = {int(p.stem[5:]): p for p in paths if p.stem[5:].isdecimal()}
        if steps:
            last = max(steps)
            pictures = [(f"Samples during the training, at step {last:,}.", read_png(steps[last]))]
        modes = {"results": "eval", "samples": "sample", "quality": "quality"}
        busy = {name: workdir.owner(mode) for name, mode in modes.items()}
        content["running"] = {modes[name]: owner for name, owner in busy.items() if owner}
        missing = {n: mode for n, mode in modes.items() if not (content.get(n) or busy[n])}
        if trained_further:
            # Samples are drawn from the newest checkpoint, and the report shows them only beside an
            # evaluation of the same checkpoint.
            before = {"results": "eval", "samples": "eval,sample", "quality": "eval,sample,quality"}
            missing = {n: before[n] for n in ("results", *missing) if not busy[n]}
        elif "samples" in missing and "quality" in missing:
            missing["quality"] = "sample,quality"
        command = f"python -m sbml.main --workdir={shlex.quote(str(workdir))} --mode="
        content["missing"] = {name: command + mode for name, mode in missing.items()}
    page.write(
        workdir.path,
        content,
        table=table,
        images=None if images is None else images.images,
        levels=content["config"]["data"]["levels"] if images is None else images.levels,
        curves=curves,
        samples=None if samples is None else samples["images"],
        pictures=pictures,
    )
    return True


def gap_of(workdir: Workdir, evaluation: Json, of_training: Json) -> Json:
    """The results of an ``evaluation`` of held-out images minus those of training images.

    The ``rows`` are empty if there is no evaluation of training images by the same checkpoint, from
    the same smallest time; the ``command`` makes one. ``diffusion`` is the difference of this term
    alone, if the losses at each noise level are known.
    """
    # The settings of the evaluation must be the same; those of the model are in the checkpoint.
    new = {"workdir": str(workdir), "mode": "eval", "config.eval.split": "train"}
    new["config.eval.max_images"] = str(evaluation["results"][0]["n"])
    kept = {}
    for flag, after in itertools.pairwise([*shlex.split(evaluation.get("command", "")), ""]):
        name, equals, value = flag.lstrip("-").partition("=")
        if name not in new and name.startswith(("config.eval.", "config.data.", "trust")):
            kept[name] = value if equals else after
    flags = [f"--{name}={value}" for name, value in {**new, **kept}.items()]
    command = shlex.join(["python", "-m", "sbml.main", *flags])
    found: dict[str, Any] = {"rows": [], "command": command}
    if (levels := evaluation.get("noise_levels")) is not None:
        names = ("edges", "split", "train", "split_stderr", "train_stderr")
        edges, *curves = (np.asarray(levels[name], float) for name in names)
        held, train = (page.area(edges, curve) for curve in curves[:2])
        half = 1.96 * float(np.linalg.norm(np.diff(edges) * np.stack(curves[2:])))
        found["diffusion"] = {"held_out": held, "train": train, "gap": held - train, "ci95": half}
    if not of_training:
        return found
    if of_training["checkpoint"] != evaluation["checkpoint"]:
        logging.warning("%s/train/%s is of another checkpoint: left out", workdir, EVALUATION)
        return found
    same_as = (*result.KIND, "smallest_time")
    trained = {tuple(r[name] for name in same_as): r for r in result.read(of_training["results"])}
    for own in result.read(evaluation["results"]):
        if (same := trained.get(tuple(own[name] for name in same_as))) is not None:
            gap = difference(result.population(own), result.population(same))
            row = {name: own[name] for name in result.KIND}
            row |= {"held_out": own["bits_per_dim"], "held_out_images": own["n"]}
            row |= {"train": same["bits_per_dim"], "train_images": same["n"]}
            found["rows"].append({**row, "gap": gap.mean, "interval": list(gap.bounds)})
    return found


def provenance_of(rows: Rows, content: Json, curves: Rows) -> dict[str, dict[str, str]]:
    """Code, hardware, dates, duration and cost of the ``training`` and of the ``evaluation`` of the
    checkpoint, as far as they are known from the ``rows`` of the history."""
    begun = max((i for i, row in enumerate(rows) if row.get("first") == 0), default=0)
    step, results = content.get("checkpoint", {}).get("step"), content["results"]
    trained = [row for row in rows[begun:] if row["mode"] == "train"]
    found = {"training": _sums(trained), "evaluation": {}}
    if not trained and curves:
        found["training"]["duration"] = page.duration(curves[-1]["seconds"])
    if curves and step:
        count = step * content["config"]["training"]["batch_size"]
        found["training"]["network evaluations"] = f"{count:,}, with gradients"
    if results:
        of = {"mode": "eval", "step": step, "split": results[0]["split"]}
        evaluated = [row for row in rows[begun:] if of.items() <= row.items()]
        versions = content.get("versions", {"sbml": "of an unknown version", "devices": "unknown"})
        first = {"code": f"sbml {versions['sbml']}", "hardware": versions["devices"]}
        count = round(sum(float(row["n"]) * float(row["nfe_mean"]) for row in results))
        found["evaluation"] = {**first, **_sums(evaluated), "network evaluations": f"{count:,}"}
    return {name: values for name, values in found.items() if values}


def _sums(rows: Rows) -> dict[str, str]:
    """The code, hardware, dates, duration and cost of all ``rows`` of the history, as text."""
    if not rows:
        return {}
    found = {k: "; ".join(dict.fromkeys(row[k] for row in rows)) for k in ("code", "hardware")}
    seconds = sum(row["seconds"] for row in rows)
    device = sum(row["seconds"] * row["devices"] for row in rows) / 3600
    cpu = sum(row["cpu_seconds"] for row in rows if not row["devices"]) / 3600
    cost = {"device-hours": device, "CPU-hours": cpu}
    return {
        **found,
        "date (UTC)": " to ".join(dict.fromkeys([rows[0]["start"], rows[-1]["end"]])),
        "duration": page.duration(seconds),
        "cost": ", ".join(f"{value:.2g} {name}" for name, value in cost.items() if value),
    }
