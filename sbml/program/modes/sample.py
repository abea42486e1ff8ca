"""Draws samples of a trained model: ``--mode=sample``."""

import math
import os
from collections.abc import Sequence

import jax
import numpy as np
from absl import logging

from sbml.core.streams import stream
from sbml.program.config import compatibility
from sbml.program.config.build import Experiment
from sbml.program.config.config import Config
from sbml.program.config.trained import Trained
from sbml.program.evaluation import samples
from sbml.program.evaluation.samples import grid
from sbml.program.report.pictures import png
from sbml.program.runtime.preemption import Preemption
from sbml.program.runtime.workdir import SAMPLES, Workdir
from sbml.samplers import Chain, Sampler

COMPARED = 64  # samples whose densities are compared
LARGEST = 100  # dimensions for which they are compared


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


def run(trained: Trained, preemption: Preemption) -> Workdir:
    """Draw ``sampling.num_images`` samples.

    Writes ``samples.npz``, ``samples.png`` and, with ``sampling.frames``, ``samples_strip.png``: up
    to four rows of images, each from noise on the left to a sample on the right. A killed run
    resumes and gives the same images.
    """
    experiment, workdir = trained.experiment, trained.workdir
    config, eps = experiment.config.sampling, experiment.sampling_eps
    metadata = trained.restored.metadata
    for warning in compatibility.unseen_times(metadata, experiment.sde, eps, "sampling"):
        logging.warning(warning)
    # Pixels are integers, so they are drawn in the precision of the device, which is faster.
    with jax.default_matmul_precision(None):
        drawn = samples.stored(trained, preemption)
        strips = {}
        if config.frames > 1:
            ids, seed = np.arange(min(4, config.num_images), dtype=np.int32), np.uint32(config.seed)
            how, score = samples.Recipe.of(experiment), experiment.adapter(trained.params)
            paths = np.asarray(samples.paths(score, ids, seed, how, config.frames))
            strip = grid(experiment, paths.reshape(-1, *experiment.shape), columns=config.frames)
            strips["samples_strip.png"] = png(strip)
    origin = {"step": trained.restored.step, "parameters_crc32": trained.parameters_crc32}
    workdir.write(SAMPLES, {**drawn._asdict(), **origin, "sampler": repr(config.build())})
    shown = drawn.images[:256]  # A picture of more images would be too large.
    for name, picture in {"samples.png": png(grid(experiment, shown)), **strips}.items():
        workdir.write_bytes(name, picture)
    workdir.keep("samples_strip.png", strips)  # Without frames, it is of an earlier run.
    print(
        f"{len(drawn.images)} samples by {config.sampler.name}, {drawn.nfe.mean():.0f} evaluations "
        f"each: {workdir / 'samples.png'}"
    )
    with preemption.suspended("the samples are written"):
        if line := gap(trained, config.build()):
            print(line)
    return workdir


def gap(trained: Trained, sampler: Sampler) -> str:
    """How far the density of a deterministic ``sampler`` with few steps is from that of the ODE, in
    words; "" for other samplers, and for more than ``LARGEST`` dimensions (``Density.gap``).

    It is computed only if it costs less than the samples: an evaluation with the exact trace of d
    dimensions costs as much as d + 1 evaluations.
    """
    density = trained.density(trained.experiment.sampling_eps)
    if density.dims > LARGEST or not isinstance(sampler, Chain) or sampler.obstacle(True):
        return ""
    classes = len(trained.classes)
    condition = np.arange(COMPARED) % classes if classes else None
    key = stream(jax.random.key(trained.experiment.config.sampling.seed), "sampler")
    name = trained.experiment.config.sampling.sampler.name
    steps = len(sampler.times(density.sde, trained.experiment.sampling_eps)) - 1
    if COMPARED * (density.dims + 1) > trained.experiment.config.sampling.num_images:
        return (
            f"{steps} steps of {name}: the distance to the model would cost more than the samples; "
            f"in Python: sbml.load({str(trained.workdir)!r}).gap(key, {COMPARED}, sampler=...)"
        )
    try:
        found = density.gap(key, COMPARED, condition, sampler=sampler)
    except ValueError as error:  # A few long steps may fold space; the samples are drawn anyway.
        return f"{steps} steps of {name}: the distance to the model is not known: {error}"
    for warning in found.warnings("eval.ode."):
        logging.warning("gap: %s", warning)
    return f"{steps} steps of {name}: {samples.from_model(found, density.shape)}"
