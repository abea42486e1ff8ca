"""Trains a score: ``--mode=train``.

    params <- params + optimizer(gradient of the loss), ema <- decay ema + (1 - decay) params

``program.config.objective`` has the loss.

:func:`fit` is the training from its first line to its last one: it resumes, makes steps, logs,
saves, validates and stops. It also trains dequantizers and the densities of tables, which differ in
what is trained (:class:`Learner`). The batch of a step is a pure function of (seed, step), and the
state holds everything else. So a killed run resumes from its newest undamaged checkpoint with
bitwise the same result as without interruption.
"""

import contextlib
import dataclasses
import functools
import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging

from sbml.core.platform import on_cpu
from sbml.core.progress import Bar
from sbml.core.streams import stream
from sbml.data import VALIDATION, Examples, ImageSet, prefetch, train_batches
from sbml.program.config import compatibility, objective
from sbml.program.config.build import Experiment
from sbml.program.config.trained import Trained
from sbml.program.config.training import Loop, Training
from sbml.program.evaluation import samples
from sbml.program.evaluation.cells import Evaluation, run_of
from sbml.program.report.pictures import png
from sbml.program.runtime import metrics, peers, sharding
from sbml.program.runtime.checkpoint import Checkpoints, OtherModelError, Restored
from sbml.program.runtime.history import noted
from sbml.program.runtime.preemption import Preemption
from sbml.program.runtime.state import TrainState, Update
from sbml.program.runtime.workdir import Workdir

PICTURED = 64  # The largest number of samples that are drawn for a picture during the training.


class NonFiniteLoss(FloatingPointError):
    """A loss or gradient is not finite, so that training cannot continue."""


@dataclasses.dataclass(frozen=True)
class Learner:
    """What is trained, and on which images or rows of a table.

    Attributes:
      section: the section of the config with the settings of the training.
      images: the training images.
      init: a function that makes the state before the first step.
      update: what a step computes.
      provenance: the origin of a checkpoint, stored as its metadata.
      check: a function of a checkpoint's metadata that raises an OtherModelError if training must
        not continue from it.
      labels: the number of each image's class, ``(n,)``, so that a batch is a pair of images and
        labels; None if a batch is only images.
      frozen: arrays that the loss needs and that are not trained.
      validate: a function from the state to numbers for the log; None for no validation.
      picture: a function from the state to a uint8 grid of samples; None for no pictures.
    """

    section: Loop
    images: Examples
    init: Callable[[], TrainState]
    update: Update
    provenance: dict[str, Any]
    check: Callable[[dict[str, Any]], None]
    labels: np.ndarray | None = None
    frozen: Any = ()
    validate: Callable[[TrainState], dict[str, float]] | None = None
    picture: Callable[[TrainState], np.ndarray] | None = None


def check(experiment: Experiment, workdir: Workdir, before: Sequence[str]) -> None:
    """Check that there are images and a bound for the curve of the validation, if it is on, and
    that the training images have all classes of those of the evaluation."""
    if experiment.config.training.validate_every:
        experiment.config.validation_cell()
    if experiment.adapter.classes:
        images = experiment.images("train")
        experiment.labels(images)
        evaluated = experiment.images(experiment.config.eval.split)
        experiment.labels(evaluated, experiment.provenance(images)["classes"])


def run(experiment: Experiment, workdir: Workdir) -> None:
    """Train the score, with its checkpoints in ``workdir/checkpoints``: :func:`fit`."""
    config, images = experiment.config, experiment.images("train")
    provenance = experiment.provenance(images)
    config.optim.warn_if_short(config.training.num_steps)

    def check_metadata(metadata: dict[str, Any]) -> None:
        compatibility.check_training(config, metadata)
        if metadata.get("classes", now := provenance.get("classes")) != now:
            raise OtherModelError(
                f"the checkpoint's classes are {metadata['classes']}, those of the images {now}: "
                "give them the same names, or use another --workdir"
            )

    def picture(state: TrainState) -> np.ndarray:
        now = experiment.with_learned_schedule(state.ema_params)
        count = min(config.sampling.num_images, PICTURED)
        return samples.grid(now, samples.preview(now, state.ema_params, count).images)

    learner = Learner(
        section=config.training,
        images=images,
        init=experiment.init_state,
        update=objective.update(experiment),
        provenance=provenance,
        check=check_metadata,
        labels=experiment.labels(images),
        validate=validator(experiment, images, provenance, workdir)
        if config.training.validate_every
        else None,
        picture=picture,
    )
    fit(experiment, workdir, learner)


def validator(
    experiment: Experiment, train: ImageSet, metadata: dict[str, Any], workdir: Workdir
) -> Callable[[TrainState], dict[str, float]]:
    """A function that computes a point of the curve of ``training.validate_every`` from the state
    of a training on ``train``: ``validation_bits_per_dim``, the bound of an evaluation on at most
    ``training.validation_images`` images, with the averaged parameters in float32, and
    ``validation_stderr``, its standard error as a mean over images.

    All points have the same images, times and noises, so the difference between two points has less
    noise than each of them. ``metadata`` is that of the checkpoints.
    """
    cell, images = experiment.config.validation_cell(), experiment.images(VALIDATION)
    experiment = experiment.for_validation()

    def validate(state: TrainState) -> dict[str, float]:
        now = experiment.with_learned_schedule(state.ema_params)
        trained = Trained(now, Restored(0, state, metadata), workdir)
        evaluation = Evaluation(trained, images, train)
        with jax.default_matmul_precision(now.config.eval.precision):
            # The rows are not stored, because no other run needs them.
            of = evaluation, cell, evaluation.dequantization(cell.dequantizer)
            found = run_of(*of, stored=False, progress=False).measurement.estimate()
        point, stderr = {"validation_bits_per_dim": found.mean}, found.population.stderr
        # One image has no standard error.
        return point | ({"validation_stderr": stderr} if math.isfinite(stderr) else {})

    return validate


def fit(experiment: Experiment, workdir: Workdir, learner: Learner) -> None:
    """Train up to ``num_steps`` of the learner's section, from the newest undamaged checkpoint on.

    Beside the folder of the checkpoints, this writes ``metrics.jsonl``, ``tensorboard/`` and
    ``samples/``.

    Raises:
      ValueError: the config cannot work, or there is a checkpoint of another model.
      DamagedCheckpointError: there are checkpoints, and all of them are damaged.
      NonFiniteLoss: a loss or gradient is not finite; the message names the step and the newest
        checkpoint.
      UnsavedCheckpointError: the last checkpoint could not be written.
      LostProcessError: another process of this run is lost.
      SystemExit: with status 143 after SIGTERM and 130 after Ctrl-C, when everything is saved.
    """
    section, images, seed = learner.section, learner.images, experiment.config.seed
    _check_batch_size(section, images)
    checkpoints, mesh = section.checkpoints(workdir), sharding.data_mesh()
    folder, whole = checkpoints.directory.parent, sharding.replicated(mesh)
    stride, total = section.steps_per_dispatch, section.num_steps  # A dispatch is stride steps.
    validate_every = section.validate_every if isinstance(section, Training) else 0

    # At the end of these contexts the last save is on disk.
    with Preemption() as preemption, checkpoints, peers.watched(checkpoints.newest):
        state, start, metadata = _restore(learner, checkpoints, mesh)
        if (remaining := max(0, total - start)) % stride:
            raise ValueError(
                f"{section.name_of('steps_per_dispatch')}={stride} does not divide the {remaining} "
                f"steps from {start} to {section.name_of('num_steps')}={total}; change either"
            )

        # What a step needs: its compiled update, its key, and its batch.
        update = sharding.compiled_step(
            learner.update, mesh, state, steps_per_dispatch=stride, shard_state=section.shard_state
        )
        key = jax.jit(lambda: stream(jax.random.key(seed), section.name), out_shardings=whole)()
        frozen = jax.device_put(learner.frozen, whole)
        batches = train_batches(
            images,
            section.batch_size // section.rows_per_image,
            seed,
            flip=experiment.config.data.flip,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            labels=learner.labels,
        )
        split = sharding.batch_sharding(mesh, axis=int(stride > 1))

        def batch_of(dispatch: int) -> Any:
            steps = [batches[start + dispatch * stride + i] for i in range(stride)]
            batch = jax.tree.map(lambda *parts: np.stack(parts), *steps) if stride > 1 else steps[0]
            place = functools.partial(jax.make_array_from_process_local_data, split)
            return jax.tree.map(place, batch)

        # What is done with the averaged parameters. If they were split over the devices, a sampler
        # or an evaluation would gather them in each of its steps.
        gather = jax.jit(lambda tree: tree, out_shardings=whole)

        def averaged() -> TrainState:
            return state.replace(ema_params=gather(state.ema_params))

        def validates(step: int) -> bool:
            """Whether the state after ``step`` is validated: the last one is, too."""
            return validate_every > 0 and (step == total or _passed(step, stride, validate_every))

        log = metrics.Log(folder, start, section.batch_size / section.rows_per_image)
        if learner.validate and remaining:  # An error, as of too little memory, then comes at once.
            with log.paused():
                found = learner.validate(averaged())
            # The run may have stopped after the step ``start``, before it was validated.
            if start and validates(start):
                log.validation(start, found)

        done, in_flight = start, _in_flight()
        pending: deque[tuple[int, Any]] = deque()  # dispatches whose losses are not read
        with (
            contextlib.closing(log),
            Bar(section.name, "step", total, min(start, total)) as bar,
            contextlib.closing(prefetch(batch_of, 0, remaining // stride)) as dispatches,
            noted(folder, section.name, first=start) if remaining else contextlib.nullcontext(),
        ):
            for _, batch in dispatches:
                state, values = update(state, batch, key, frozen)
                done += stride
                pending.append((done, values))

                stop = preemption.requested()
                saves = stop or done == total or _passed(done, stride, section.checkpoint_every)
                # A run that stops is validated when it continues.
                validated = validates(done) and not (stop and done < total)
                pictured = _passed(done, stride, section.sample_every)
                row = saves or validated  # They end a row of the log: the next step begins one.

                # Before a save all losses up to it are read, so a state after a loss that is not
                # finite is never saved.
                while len(pending) > (0 if row or pictured else in_flight):
                    end, values = pending.popleft()
                    read = [sharding.to_host(values[name]) for name in ("loss", "grad_norm")]
                    for step, (loss, norm) in enumerate(np.stack(read, -1).reshape(-1, 2).tolist()):
                        if not (np.isfinite(loss) and np.isfinite(norm)):
                            message = (
                                f"step {end - stride + step}: loss {loss}, gradient norm {norm}"
                            )
                            raise NonFiniteLoss(f"{message}; {_remedy(section, checkpoints)}")
                        log.add(loss, norm)
                    if _passed(end, stride, section.log_every) or (row and not pending):
                        log.row(end)
                    bar.update(stride, log.text)

                # A save that fails is only logged if a later one succeeds. If none does, the
                # context of ``checkpoints`` ends with an error.
                if saves:
                    checkpoints.save(done, state, metadata)
                if validated and learner.validate:
                    with log.paused():
                        found = learner.validate(averaged())
                    log.validation(done, found)
                    bar.update(0, log.text)
                if pictured and learner.picture:
                    grid = learner.picture(averaged())
                    log.picture(done, grid, png(grid))
                if stop:
                    break
    # A signal during the last save also ends the process, before its next mode begins.
    preemption.leave_if_requested(f"step {done} is saved")


def _check_batch_size(section: Loop, images: Examples) -> None:
    """Check that a batch divides into equal parts on each device, and has no image twice."""
    devices, rows = jax.device_count(), section.rows_per_image
    name, size = section.name_of("batch_size"), section.batch_size
    parts = devices * section.accumulate * rows
    if size % parts:
        lower = size // parts * parts
        raise ValueError(
            f"{name}={size} is not a multiple of {parts} = {devices} devices x "
            f"{section.accumulate} {section.name_of('accumulate')} x {rows} rows of an "
            f"image; use {f'{lower} or ' if lower else ''}{lower + parts}"
        )
    if size > (largest := len(images) * rows):
        raise ValueError(
            f"{name}={size} takes {size // rows} different {images.unit}s a step, "
            f"{images.name} has {len(images)}: use at most {largest}"
        )


def _restore(
    learner: Learner, checkpoints: Checkpoints, mesh: jax.sharding.Mesh
) -> tuple[TrainState, int, dict[str, Any]]:
    """The state of the newest undamaged checkpoint, or the initial state; its step; and the
    metadata of the checkpoints to come."""
    section, images, provenance = learner.section, learner.images, learner.provenance
    expected = sharding.abstract(learner.init, mesh, shard_state=section.shard_state)

    def template(metadata: dict[str, Any]) -> TrainState:
        learner.check(metadata)
        return expected

    restored = checkpoints.restore(template)
    if restored is None:
        if rows := metrics.read(checkpoints.directory.parent):
            logging.warning(
                f"{checkpoints.directory} has no checkpoint, but {metrics.FILE} reaches step "
                f"{rows[-1]['step']}: training begins again at step 0, the old rows go to "
                f"{metrics.EARLIER}, and the old pictures to samples/*.earlier. If the checkpoints "
                "were moved, stop this run, and put them and these files back"
            )
        state = sharding.initial_state(learner.init, mesh, shard_state=section.shard_state)
        return state, 0, provenance
    logging.info("Resuming from step %d of %s", restored.step, checkpoints.directory)
    for warning in compatibility.other_data(restored.metadata, provenance):
        logging.warning(warning)
    if earlier := compatibility.earlier_data(restored.metadata, images):
        provenance = {**provenance, "earlier_data": earlier}
    changed = compatibility.changed_settings(
        restored.metadata, learner.provenance, _prefix(section)
    )
    names = ", ".join(changed)
    if changed and restored.step < section.num_steps:
        logging.warning("training continues with other settings than it began with: %s", names)
    elif changed or restored.step > section.num_steps:
        settings = f"{section.name_of('num_steps')}={section.num_steps}"
        stored = f"nothing is trained: step {restored.step} is stored, and {settings}"
        logging.warning(f"{stored}. Changed: {names or 'nothing else'}")
    return restored.state, restored.step, provenance


def _prefix(section: Loop) -> str:
    """The prefix of the names of the sections beside this one: empty or ``dequantizer.``."""
    return section.section.removesuffix("training")


def _remedy(section: Loop, checkpoints: Checkpoints) -> str:
    """What to do after a loss that is not finite, as the end of a message."""
    try:
        checkpoints.wait()
    except Exception as error:  # What stops the training is the loss.
        logging.error("the last checkpoint was not saved: %s", error)
    optim = f"{_prefix(section)}optim"
    return (
        f"training stopped. The same command goes on from {checkpoints.newest()}, with the same "
        f"batches: lower {optim}.lr or set a lower {optim}.grad_clip first (0 is no clipping)"
    )


def _in_flight() -> int:
    """The number of dispatches ahead of the one whose loss is read, so that no device waits for the
    host.

    On CPU it is 0: the call of a step returns after its computation (``runtime.cpu``), so reading
    losses later would save no time, and the measured times would be wrong.
    """
    return 0 if on_cpu() else 2


def _passed(done: int, stride: int, every: int) -> bool:
    """Whether the last ``stride`` steps passed a multiple of ``every`` (0: never)."""
    return every > 0 and done // every > (done - stride) // every
