"""Makes the report of a work directory from the files in it: ``--mode=report``."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax

from sbml.experiment import trained
from sbml.experiment.build import Experiment
from sbml.report import summary
from sbml.report.progress import Progress
from sbml.report.result import Result
from sbml.runtime import metrics
from sbml.runtime.workdir import EVALUATION, Workdir


def run(experiment: Experiment, workdir: Workdir) -> None:
    """Write ``report.html`` and ``report.json`` of ``workdir``, also while other modes run there.

    The model is not run and no lock is taken. The page shows the progress and the losses of the
    training and, as far as they exist, the results, the samples and their quality; for those that
    are missing it shows the commands that make them.

    Raises:
      ValueError: there is neither a training nor an evaluation in ``workdir``, the config is of
        another model than its checkpoint, or a file that the report needs is damaged.
    """
    if (metadata := experiment.config.training.checkpoints(workdir).metadata()) is not None:
        trained.check_score(experiment.config, metadata)
    rows = metrics.read(workdir)
    progress = progress_of(experiment, workdir, rows)
    evaluated = workdir.has(EVALUATION)
    if progress.owner is None and progress.step is None and not evaluated:
        raise ValueError(
            f"{workdir} has no metrics, no checkpoint and no evaluation to report: train first "
            "(--mode=train), or set --workdir to the folder of a run"
        )
    if jax.process_index() > 0:
        return
    print(progress.line)
    if evaluated:
        for result in workdir.read(EVALUATION)["results"]:
            print(Result.read(result).line)
    model = {"name": experiment.config.model.name, "parameters": experiment.parameter_count()}
    known = {"model": model, "config": experiment.to_plain(), "training": progress.plain()}
    if summary.write(workdir, experiment.config.data.images, known, rows):
        print(f"report: {workdir / 'report.html'}")


def progress_of(
    experiment: Experiment, workdir: Workdir, rows: Sequence[Mapping[str, Any]]
) -> Progress:
    """How far the training in ``workdir`` has come; ``rows`` are its metrics. This only reads."""
    training = experiment.config.training
    owner = workdir.owner("train")
    checkpoints = training.checkpoints(workdir).steps()
    steps = [*(row["step"] for row in rows[-1:]), *checkpoints[-1:]]
    return Progress(
        owner,
        max(steps, default=None),
        training.num_steps,
        rows[-1]["loss"] if rows else None,
        checkpoints[-1] if checkpoints else None,
    )
