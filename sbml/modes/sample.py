"""Draws samples of a trained model: ``--mode=sample``."""

from collections.abc import Sequence

import jax

from sbml.evaluation.samples import Drawing, memory, memory_needed
from sbml.experiment.build import Experiment
from sbml.report import summary
from sbml.runtime import sharding
from sbml.runtime.workdir import Workdir


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

    Writes ``samples.npz``, ``samples.png`` and ``samples_strip.png``, and the report again if there
    is an evaluation. A killed run resumes and gives the same images.
    """
    config = experiment.config
    with workdir.lock("sample"):
        drawing = Drawing.of(experiment, workdir)
        samples, strip = drawing.samples(), drawing.strip()
        try:
            if jax.process_index() == 0:
                drawing.write(samples, strip)
                summary.write(workdir, config.data.images)
                print(
                    f"{len(samples.images)} samples by {config.sampling.sampler}, "
                    f"{samples.nfe.mean():.0f} evaluations each: {workdir / 'samples.png'}"
                )
        finally:  # The next mode reads the samples in all processes.
            sharding.barrier("samples written")
