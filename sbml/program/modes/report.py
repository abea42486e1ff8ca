"""Makes the report of a work directory from the files in it: ``--mode=report``."""

from typing import Any

import jax

from sbml.program.config import compatibility
from sbml.program.config.build import Experiment
from sbml.program.report import result, summary
from sbml.program.runtime import metrics
from sbml.program.runtime.workdir import EVALUATION, Workdir


def run(experiment: Experiment, workdir: Workdir) -> None:
    """Write ``report.html`` and ``report.json`` of ``workdir``, also while other modes run there.

    The model is not run and no lock is taken. The page shows the progress and the losses of the
    training and, as far as they exist, the results, the samples and their quality; for those that
    are missing it shows the commands that make them.
    """
    config = experiment.config
    checkpoints = config.training.checkpoints(workdir)
    if (metadata := checkpoints.metadata()) is not None:
        compatibility.check_score(config, metadata)
    owner, curves, saved = workdir.owner("train"), metrics.read(workdir), checkpoints.steps()
    loss = curves[-1]["loss"] if curves else None
    step = max([*(point["step"] for point in curves[-1:]), *saved[-1:]], default=None)
    evaluated = workdir.has(EVALUATION)
    if owner is None and step is None and not evaluated:
        raise ValueError(
            f"{workdir} has no metrics, no checkpoint and no evaluation to report: train first "
            "(--mode=train), or set --workdir to the folder of a run"
        )
    if jax.process_index() > 0:
        return
    training = progress(owner, step, config.training.num_steps, loss, saved[-1] if saved else None)
    print(training["line"])
    if evaluated:
        for row in result.read(workdir.read(EVALUATION)["results"]):
            print(result.line(row))
    model = {"name": config.model.name, "parameters": experiment.parameter_count()}
    known = {"model": model, "config": experiment.config.plain(), "training": training}
    if names := (metadata or {}).get("classes"):
        known["classes"] = names
    if summary.write(workdir, config.data.images, known, curves):
        print(f"report: {workdir / 'report.html'}")
        if saved:
            print(result.next_steps(workdir))


def progress(
    owner: str | None, step: int | None, num_steps: int, loss: float | None, checkpoint: int | None
) -> dict[str, Any]:
    """How far a training has come: these arguments, and ``line``, which says it in words.

    Args:
      owner: the process that is training at this moment, in words; None if there is none.
      step: the last step in the metrics or of a checkpoint; None if there is neither.
      num_steps: the number of steps that the config asks for.
      loss: the last loss that was logged, in nats per dimension; None if none was.
      checkpoint: the step of the newest checkpoint; None if there is none.
    """
    saved = checkpoint or 0
    if owner is not None:
        words = ["training in progress"]
    elif step is None:
        words = ["not trained yet"]
    else:
        words = ["training complete" if saved >= num_steps else "training stopped"]
    if step is not None:
        # The config may be that of an earlier, shorter training.
        words.append(f"step {step:,}" + (f" of {num_steps:,}" if step <= num_steps else ""))
        if owner is None and saved < step == num_steps:
            words.append(f"saved up to step {saved:,}" if saved else "no checkpoint")
    words.append("no loss logged yet" if loss is None else f"last loss {loss:z.4f}")
    return {
        "line": ", ".join(words),
        "owner": owner,
        "step": step,
        "num_steps": num_steps,
        "loss": loss,
        "checkpoint": checkpoint,
    }
