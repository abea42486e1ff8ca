"""Draws samples of a trained model: ``--mode=sample``."""

from collections.abc import Sequence

import jax
import numpy as np
from absl import logging

from sbml import report
from sbml.evaluation.samples import Samples, check_memory, generate, grid, strip
from sbml.experiment import trained
from sbml.experiment.build import Experiment
from sbml.report import summary
from sbml.runtime import sharding
from sbml.runtime.checkpoint import Restored
from sbml.runtime.trees import tree_crc32
from sbml.runtime.workdir import SAMPLES, Workdir


def check(experiment: Experiment, workdir: Workdir, before: Sequence[str]) -> None:
    """Check that the samples fit into memory.

    Raises:
      ValueError: they do not.
    """
    check_memory(experiment.config)


def run(experiment: Experiment, workdir: Workdir) -> None:
    """Draw ``sampling.num_images`` samples with the averaged parameters of the newest checkpoint.

    Writes ``samples.npz``, ``samples.png`` and ``samples_strip.png``, and the report again if there
    is an evaluation. A killed run resumes and gives the same images.

    Raises:
      ValueError: there is no checkpoint, or it belongs to another model.
    """
    with workdir.lock("sample"):
        _run(experiment, workdir)


def _run(experiment: Experiment, workdir: Workdir) -> None:
    config = experiment.config
    experiment, restored = experiment.restored(workdir)
    experiment = experiment.with_dequantization_of(restored)
    for warning in trained.unseen_times(restored.metadata, experiment.sampling_eps, "sampling"):
        logging.warning(warning)
    samples = generate(experiment, restored, workdir)
    # All processes compute the strip, because their devices hold the parameters together.
    rows = min(4, len(samples.images)) if config.sampling.frames > 1 else 0
    picture = strip(experiment, restored.state.ema_params, rows) if rows else None
    try:
        if jax.process_index() == 0:
            _write(experiment, restored, workdir, samples, picture)
    finally:  # The next mode reads the samples in all processes.
        sharding.barrier("samples written")


def _write(
    experiment: Experiment,
    restored: Restored,
    workdir: Workdir,
    samples: Samples,
    picture: np.ndarray | None,
) -> None:
    sampler = np.asarray(repr(experiment.config.sampling.build()))
    crc32 = np.asarray(tree_crc32(restored.state.ema_params))
    origin = {"step": np.asarray(restored.step), "parameters_crc32": crc32, "sampler": sampler}
    columns = {**samples._asdict(), **origin}
    workdir.write(SAMPLES, columns)
    shown = samples.images[:256]  # A picture of more images would be too large.
    report.write_png(workdir / "samples.png", grid(experiment, shown))
    if picture is not None:
        report.write_png(workdir / "samples_strip.png", picture)
    else:  # A strip that is there shows samples of an earlier run.
        (workdir / "samples_strip.png").unlink(missing_ok=True)
    summary.write(workdir, experiment.config.data.images)
    name = experiment.config.sampling.sampler
    print(
        f"{len(samples.images)} samples by {name}, {samples.nfe.mean():.0f} evaluations each: "
        f"{workdir / 'samples.png'}"
    )
