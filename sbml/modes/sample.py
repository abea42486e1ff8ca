"""Draws samples of a trained model: ``--mode=sample``."""

import math
import os
from collections.abc import Sequence

import jax
import numpy as np
from absl import logging

from sbml.evaluation import samples
from sbml.evaluation.samples import grid
from sbml.experiment import compatibility
from sbml.experiment.build import Experiment
from sbml.experiment.config import Config
from sbml.report import summary
from sbml.report.plots import write_png
from sbml.runtime import sharding
from sbml.runtime.trees import tree_crc32
from sbml.runtime.workdir import SAMPLES, Workdir


def memory_needed(config: Config) -> int:
    """Bytes that the samples of ``config`` need at most: four copies of the columns of their table.

    The columns are read from parts, joined, sorted by their ids, and written to one file.
    """
    row = math.prod(config.data.shape) + 21  # nfe, failed, id and sweep have 4, 1, 8 and 8 bytes
    return 4 * row * config.sampling.num_images


def memory() -> int:
    """Bytes of this machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check(experiment: Experiment, workdir: Workdir, before: Sequence[str]) -> None:
    """Check that the samples fit into this machine's memory."""
    config = experiment.config
    count, needed, there = config.sampling.num_images, memory_needed(config), memory()
    if needed > there:
        raise ValueError(
            f"sampling.num_images={count}: the samples need {needed / 1e9:,.1f} GB of memory, and "
            f"this machine has {there / 1e9:,.1f}: draw at most {there * count // needed}"
        )


def run(experiment: Experiment, workdir: Workdir) -> None:
    """Draw ``sampling.num_images`` samples with the averaged parameters of the newest checkpoint.

    Writes ``samples.npz``, ``samples.png`` and, with ``sampling.frames``, ``samples_strip.png``: up
    to four rows of images, each from noise on the left to a sample on the right. The report is
    written again if there is an evaluation. A killed run resumes and gives the same images.
    """
    config, load = experiment.config.sampling, experiment.config.data.images
    with workdir.lock("sample"):
        experiment, restored = experiment.restored(workdir)
        experiment = experiment.with_dequantization_of(restored)
        for warning in compatibility.unseen_times(
            restored.metadata, experiment.sampling_eps, "sampling"
        ):
            logging.warning(warning)
        params = restored.state.ema_params
        drawn, strip = samples.stored(experiment, restored, workdir), None
        if config.frames > 1:  # In all processes, because their devices hold the parameters.
            ids, seed = np.arange(min(4, config.num_images), dtype=np.int32), np.uint32(config.seed)
            how, score = samples.Recipe.of(experiment), experiment.adapter(params)
            paths = np.asarray(samples.paths(score, ids, seed, how, config.frames))
            strip = grid(experiment, paths.reshape(-1, *experiment.shape), columns=config.frames)
        try:
            if jax.process_index() == 0:
                origin = {"step": restored.step, "parameters_crc32": tree_crc32(params)}
                columns = {**drawn._asdict(), **origin, "sampler": repr(config.build())}
                workdir.write(SAMPLES, columns)
                shown = drawn.images[:256]  # A picture of more images would be too large.
                write_png(workdir / "samples.png", grid(experiment, shown))
                if strip is not None:
                    write_png(workdir / "samples_strip.png", strip)
                else:  # A strip that is there shows samples of an earlier run.
                    (workdir / "samples_strip.png").unlink(missing_ok=True)
                print(
                    f"{len(drawn.images)} samples by {config.sampler}, "
                    f"{drawn.nfe.mean():.0f} evaluations each: {workdir / 'samples.png'}"
                )
                summary.write(workdir, load)
        finally:  # The next mode reads the samples in all processes.
            sharding.barrier("samples written")
