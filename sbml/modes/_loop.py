"""The training loop of scores and dequantizers: it resumes, makes steps, logs, saves and stops.

A :class:`Task` describes what is trained; the loop itself contains no formula. The batch of a step
is a pure function of (seed, step), and the state holds everything else. So a killed run resumes
from its newest undamaged checkpoint with bitwise the same result as without interruption.
"""

import contextlib
import dataclasses
import functools
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import logging

from sbml.data import Examples, prefetch, train_batches
from sbml.experiment import compatibility
from sbml.experiment.training import Loop
from sbml.platform import compiler_options, platform
from sbml.progress import Bar
from sbml.report.pictures import write_png
from sbml.runtime import metrics, peers, sharding
from sbml.runtime.checkpoint import Checkpoints
from sbml.runtime.history import noted
from sbml.runtime.preemption import Preemption
from sbml.runtime.state import TrainState, Update, make_step, several
from sbml.streams import Name, stream
from sbml.types import Array


class NonFiniteLoss(FloatingPointError):
    """A loss or gradient is not finite, so that training cannot continue."""


@dataclasses.dataclass(frozen=True)
class Task:
    """What is trained, and on which images.

    Attributes:
      name: the name of the progress bar, and of the stream of the steps' keys (``sbml.streams``).
      training: the section of the config with the settings of the loop.
      images: the training images.
      seed: the seed of all random draws.
      init: a function that makes the state before the first step.
      update: what a step computes.
      provenance: the origin of a checkpoint, stored as its metadata.
      check: a function of a checkpoint's metadata that raises an OtherModelError if training must
        not continue from it.
      frozen: arrays that the loss needs and that are not trained.
      flip: whether images are mirrored at random.
      picture: a function from the state to a uint8 grid of samples; None for no pictures.
      validate: a function from the state to numbers for the log, and validate_every: the number of
        steps between its calls; 0: never.
      repeats: the number of rows that ``update.prepare`` makes of one image; ``batch_size`` counts
        rows.
      labels: the number of each image's class, ``(n,)``, so that a batch is a pair of images and
        labels; None if a batch is only images.
    """

    name: Name
    training: Loop
    images: Examples
    seed: int
    init: Callable[[], TrainState]
    update: Update
    provenance: dict[str, Any]
    check: Callable[[dict[str, Any]], None]
    frozen: Any = ()
    flip: bool = False
    picture: Callable[[TrainState], np.ndarray] | None = None
    validate: Callable[[TrainState], dict[str, float]] | None = None
    validate_every: int = 0
    repeats: int = 1
    labels: np.ndarray | None = None


def run(task: Task, checkpoints: Checkpoints) -> None:
    """Train up to ``training.num_steps``, from the newest undamaged checkpoint on.

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
    _check_batch_size(task)
    with Preemption() as preemption:
        # At the end of this context the last save is on disk.
        with checkpoints, peers.watched(checkpoints.newest):
            done = _train(task, checkpoints, preemption)
        # A signal during the last save also ends the process, before its next mode begins.
        preemption.leave_if_requested(f"step {done} is saved")


def _train(task: Task, checkpoints: Checkpoints, preemption: Preemption) -> int:
    """Train up to the last step, or until a signal asks to stop; return the step of the state."""
    training, mesh = task.training, sharding.data_mesh()
    stride, total = training.steps_per_dispatch, training.num_steps  # a dispatch is stride steps
    state, start, provenance = _restore(task, checkpoints, mesh)
    if (remaining := max(0, total - start)) % stride:
        raise ValueError(
            f"{training.name_of('steps_per_dispatch')}={stride} does not divide the {remaining} "
            f"steps from {start} to {training.name_of('num_steps')}={total}; change either"
        )

    whole = sharding.replicated(mesh)
    split = sharding.batch_sharding(mesh, axis=int(stride > 1))
    make_key = jax.jit(lambda: stream(jax.random.key(task.seed), task.name), out_shardings=whole)
    key, frozen = make_key(), jax.device_put(task.frozen, whole)
    gather = jax.jit(lambda tree: tree, out_shardings=whole)
    shard_state = training.shard_state
    update = compiled_step(
        task.update, mesh, state, steps_per_dispatch=stride, shard_state=shard_state
    )
    images = train_batches(
        task.images,
        training.batch_size // task.repeats,
        task.seed,
        flip=task.flip,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        labels=task.labels,
    )

    def batch_of(dispatch: int) -> Any:
        steps = [images[start + dispatch * stride + i] for i in range(stride)]
        batch = jax.tree.map(lambda *parts: np.stack(parts), *steps) if stride > 1 else steps[0]
        place = functools.partial(jax.make_array_from_process_local_data, split)
        return jax.tree.map(place, batch)

    writer, directory = None, checkpoints.directory.parent
    if jax.process_index() == 0:
        writer = metrics.MetricsWriter(directory, start)
        for path in (directory / "samples").glob("step_*.png"):
            if not path.stem[5:].isdecimal() or int(path.stem[5:]) <= start:
                continue
            if start:  # This picture is made again.
                path.unlink()
                continue
            aside = path  # The training begins again; people may want the old picture.
            while aside.exists():
                aside = aside.with_name(f"{aside.name}.earlier")
            path.replace(aside)
    rows: list[tuple[float, float]] = []  # loss and grad_norm of the steps since the last row
    text = ""  # what the bar says about the last row
    bar = Bar(task.name, "step", total, min(start, total))

    def averaged() -> TrainState:
        # If the parameters were split over the devices, a sampler or an evaluation would gather
        # them in each of its steps.
        return state.replace(ema_params=gather(state.ema_params))

    def validates(step: int) -> bool:
        """Whether the state after ``step`` is validated: the last one is, too."""
        every = task.validate_every
        return every > 0 and (step == total or _passed(step, stride, every))

    if task.validate and remaining:  # An error, such as too little memory, then comes at once.
        found = task.validate(averaged())
        if writer and start and validates(start):  # The run may have stopped before this number.
            writer.amend(start, found)
    since = time.perf_counter()

    def log(step: int) -> None:
        """Write the means of ``rows``, which end with ``step``, as one row, and begin a new one."""
        nonlocal rows, since, text
        now = time.perf_counter()
        loss, norm = map(float, np.mean(rows, axis=0))
        rate = len(rows) * training.batch_size / task.repeats / (now - since)
        text = f"loss {loss:.4f}, the mean of {len(rows)} steps"
        if writer:
            seconds = writer.seconds + now - since
            values = {"loss": loss, "grad_norm": norm, "images_per_s": rate, "seconds": seconds}
            writer.scalars(step, values)
        rows, since = [], now

    done, in_flight = start, _in_flight()
    pending: deque[tuple[int, dict[str, Array]]] = deque()  # dispatches whose losses are not read
    batches = prefetch(batch_of, 0, remaining // stride)
    try:
        note = noted(directory, task.name, first=start)
        with bar, contextlib.closing(batches), note if remaining else contextlib.nullcontext():
            for _, batch in batches:
                state, values = update(state, batch, key, frozen)
                done += stride
                pending.append((done, values))
                stop = preemption.requested()
                save = stop or done == total or _passed(done, stride, training.checkpoint_every)
                look = _passed(done, stride, training.sample_every)
                # A run that stops is validated when it continues.
                validate = validates(done) and not (stop and done < total)
                row = save or validate  # They end a row.

                while len(pending) > (0 if row or look else in_flight):
                    end, values = pending.popleft()
                    losses, norms = (
                        np.atleast_1d(sharding.to_host(values[name])).tolist()
                        for name in ("loss", "grad_norm")
                    )
                    for step, loss, norm in zip(
                        range(end - stride, end), losses, norms, strict=True
                    ):
                        if not (np.isfinite(loss) and np.isfinite(norm)):
                            message = f"step {step}: loss {loss}, gradient norm {norm}"
                            raise NonFiniteLoss(f"{message}; {_remedy(task, checkpoints)}")
                        rows.append((loss, norm))
                    # A save ends a row too: a run that goes on from it begins with a new one.
                    if _passed(end, stride, training.log_every) or (row and not pending):
                        log(end)
                    bar.update(stride, text)

                if save:  # If no save succeeds from here on, ``checkpoints`` raises an error.
                    checkpoints.save(done, state, provenance)
                if validate and task.validate:
                    before = time.perf_counter()
                    found = task.validate(averaged())
                    since += time.perf_counter() - before  # It is not a time of the training.
                    text += f", validation {found['validation_bits_per_dim']:.4f} bits/dim"
                    bar.update(0, text)
                    if writer:
                        writer.amend(done, found)
                if look and task.picture:
                    grid = task.picture(averaged())
                    if writer:
                        path = directory / "samples" / f"step_{done:08d}.png"
                        with writer.tolerant(done):
                            path.parent.mkdir(parents=True, exist_ok=True)
                            write_png(path, grid)
                        writer.picture(done, grid)
                if stop:
                    break
    finally:
        if writer:
            writer.close()
    return done


def _check_batch_size(task: Task) -> None:
    """Check that a batch divides into equal parts on each device, and has no image twice."""
    training, images, devices = task.training, task.images, jax.device_count()
    name, size = training.name_of("batch_size"), training.batch_size
    parts = devices * training.accumulate * task.repeats
    if size % parts:
        lower = size // parts * parts
        raise ValueError(
            f"{name}={size} is not a multiple of {parts} = {devices} devices x "
            f"{training.accumulate} {training.name_of('accumulate')} x {task.repeats} rows of an "
            f"image; use {f'{lower} or ' if lower else ''}{lower + parts}"
        )
    if size > (largest := len(images) * task.repeats):
        raise ValueError(
            f"{name}={size} takes {size // task.repeats} different {images.unit}s a step, "
            f"{images.name} has {len(images)}: use at most {largest}"
        )


def _restore(
    task: Task, checkpoints: Checkpoints, mesh: jax.sharding.Mesh
) -> tuple[TrainState, int, dict[str, Any]]:
    """The state of the newest undamaged checkpoint, or the initial state; its step; and the
    metadata of the checkpoints to come."""
    training, provenance = task.training, task.provenance
    expected = sharding.abstract(task.init, mesh, shard_state=training.shard_state)

    def template(metadata: dict[str, Any]) -> TrainState:
        task.check(metadata)
        return expected

    restored = checkpoints.restore(template)
    if restored is None:
        if rows := metrics.read(checkpoints.directory.parent):
            logging.warning(
                "%s has no checkpoint, but %s reaches step %d: training begins again at step 0, "
                "the old rows go to %s, and the old pictures to samples/*.earlier. If the "
                "checkpoints were moved, stop this run, and put them and these files back",
                *(checkpoints.directory, metrics.FILE, rows[-1]["step"], metrics.EARLIER),
            )
        state = sharding.initial_state(task.init, mesh, shard_state=training.shard_state)
        return state, 0, provenance
    logging.info("Resuming from step %d of %s", restored.step, checkpoints.directory)
    for warning in compatibility.other_data(restored.metadata, task.images):
        logging.warning(warning)
    if earlier := compatibility.earlier_data(restored.metadata, task.images):
        provenance = {**provenance, "earlier_data": earlier}
    changed = compatibility.changed_settings(restored.metadata, task.provenance, _prefix(task))
    names = ", ".join(changed)
    if changed and restored.step < training.num_steps:
        logging.warning("training continues with other settings than it began with: %s", names)
    elif changed or restored.step > training.num_steps:
        logging.warning(
            "nothing is trained: step %d is stored, and %s=%d. Changed: %s",
            *(restored.step, training.name_of("num_steps"), training.num_steps),
            names or "nothing else",
        )
    return restored.state, restored.step, provenance


def _prefix(task: Task) -> str:
    """The prefix of the names of the task's sections: empty or ``dequantizer.``."""
    return task.training.section.removesuffix("training")


def compiled_step(
    update: Update,
    mesh: jax.sharding.Mesh,
    state: TrainState,
    *,
    steps_per_dispatch: int = 1,
    shard_state: bool = False,
) -> Any:
    """``update`` as a function ``(state, batch, key, frozen) -> (state, metrics)``, compiled for
    the devices of ``mesh``. The memory of the old state is used for the new one (donated).

    Args:
      update: what a step computes.
      mesh: the devices.
      state: the state or its shapes, with shardings; the new state has the same shardings.
      steps_per_dispatch: the number of steps in one call; if it is more than 1, the batches are
        stacked along a leading axis.
      shard_state: whether ``state`` is split over the devices (``sharding.abstract``).
    """
    if shard_state:
        optimizer = sharding.partitioned(update.optimizer, mesh)
        update = dataclasses.replace(update, optimizer=optimizer)
    step, stacked = make_step(update), steps_per_dispatch > 1
    placement = jax.tree.map(lambda leaf: leaf.sharding, state)
    whole, split = sharding.replicated(mesh), sharding.batch_sharding(mesh, axis=int(stacked))
    return jax.jit(
        several(step) if stacked else step,
        in_shardings=(placement, split, whole, whole),
        out_shardings=(placement, whole),
        donate_argnums=0,
        compiler_options=compiler_options(),
    )


def _remedy(task: Task, checkpoints: Checkpoints) -> str:
    """What to do after a loss that is not finite, as the end of a message."""
    try:
        checkpoints.wait()
    except Exception as error:  # What stops the training is the loss.
        logging.error("the last checkpoint was not saved: %s", error)
    optim = f"{_prefix(task)}optim"
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
    return 0 if platform().name == "cpu" else 2


def _passed(done: int, stride: int, every: int) -> bool:
    """Whether the last ``stride`` steps passed a multiple of ``every`` (0: never)."""
    return every > 0 and done // every > (done - stride) // every
