"""The training loop of scores and dequantizers: it resumes, makes steps, logs, saves and stops.

A :class:`Task` describes what is trained; the loop itself contains no formula. The batch of a step
is a pure function of (seed, step), and the state holds everything else. So a killed run resumes
from its newest undamaged checkpoint with bitwise the same result as without interruption.
"""

import contextlib
import dataclasses
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath

from sbml import report
from sbml.data import ImageSet, prefetch, train_batches
from sbml.experiment import trained
from sbml.experiment.training import Loop
from sbml.platform import compiler_options, platform
from sbml.runtime import metrics, peers, progress, sharding
from sbml.runtime.checkpoint import Checkpoints
from sbml.runtime.preemption import Preemption
from sbml.runtime.state import (
    TrainState,
    Update,
    make_step,
    several,
)
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
      field: the prefix of ``training`` and ``optim`` on the command line: empty or
        ``dequantizer.``.
      images: the training images.
      seed, flip: the seed of all random draws, and whether images are mirrored at random.
      init: a function that makes the state before the first step.
      update: what a step computes.
      frozen: arrays that the loss needs and that are not trained.
      provenance: the origin of a checkpoint, stored as its metadata.
      check: a function of a checkpoint's metadata that raises an OtherModelError if training must
        not continue from it.
      directory: the folder of ``metrics.jsonl`` and ``samples/``.
      picture: a function from the state to a uint8 grid of samples; None for no pictures.
      repeats: the number of rows that ``update.prepare`` makes of one image; ``batch_size`` counts
        rows.
    """

    name: Name
    training: Loop
    field: str
    images: ImageSet
    seed: int
    flip: bool
    init: Callable[[], TrainState]
    update: Update
    frozen: Any
    provenance: dict[str, Any]
    check: Callable[[dict[str, Any]], None]
    directory: epath.Path
    picture: Callable[[TrainState], np.ndarray] | None = None
    repeats: int = 1


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
      shard_state: whether ``state`` is split over the devices (``sharding.placement``).
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


class _Trainer:
    """The state of one training run in one process."""

    def __init__(self, task: Task, checkpoints: Checkpoints) -> None:
        training = task.training
        field = f"{task.field}training"
        parts = {f"{field}.accumulate": training.accumulate}
        if task.repeats > 1:
            parts["rows of an image (antithetic noises)"] = task.repeats
        sharding.check_divides(f"{field}.batch_size", training.batch_size, **parts)
        if training.batch_size > (largest := len(task.images) * task.repeats):
            raise ValueError(
                f"{field}.batch_size={training.batch_size} takes "
                f"{training.batch_size // task.repeats} different images a step, "
                f"{task.images.name} has {len(task.images)}: use at most {largest}"
            )
        self.task, self.training, self.checkpoints = task, training, checkpoints
        self.batches = train_batches(
            task.images,
            training.batch_size // task.repeats,
            task.seed,
            flip=task.flip,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        self.mesh = sharding.data_mesh()
        whole = sharding.replicated(self.mesh)
        key = jax.jit(lambda: stream(jax.random.key(task.seed), task.name), out_shardings=whole)
        self.key = key()
        self.frozen = jax.device_put(task.frozen, whole)
        self.provenance = task.provenance
        self.state, self.start = self._restore()
        self.step = compiled_step(
            task.update,
            self.mesh,
            self.state,
            steps_per_dispatch=training.steps_per_dispatch,
            shard_state=training.shard_state,
        )
        self.gather = jax.jit(lambda tree: tree, out_shardings=whole)
        self.saved = self.start
        self.logged = self.start  # step of the last row of metrics
        self.unwritten = 0  # number of files that could not be written
        remaining = max(0, training.num_steps - self.start)
        if remaining % training.steps_per_dispatch:
            raise ValueError(
                f"{field}.steps_per_dispatch={training.steps_per_dispatch} does not divide the "
                f"{remaining} steps from {self.start} to "
                f"{field}.num_steps={training.num_steps}; change either"
            )
        self.pending: deque[tuple[int, dict[str, Array]]] = deque()
        first = jax.process_index() == 0
        self.writer = metrics.MetricsWriter(task.directory, self.start) if first else None
        if first:
            self._set_aside_pictures()

    def _restore(self) -> tuple[TrainState, int]:
        """The state of the newest undamaged checkpoint and its step, or the initial state and 0."""
        shard_state = self.training.shard_state
        expected = sharding.abstract(self.task.init, self.mesh, shard_state=shard_state)

        def template(metadata: dict[str, Any]) -> TrainState:
            self.task.check(metadata)
            return expected

        restored = self.checkpoints.restore(template)
        if restored is None:
            if rows := metrics.read(self.task.directory):
                logging.warning(
                    "%s has no checkpoint, but %s reaches step %d: training begins again at step "
                    "0, the old rows go to %s, and the old pictures to samples/*.earlier. If the "
                    "checkpoints were moved, stop this run, and put them and these files back",
                    *(self.checkpoints.directory, metrics.FILE, rows[-1]["step"], metrics.EARLIER),
                )
            return sharding.initial_state(self.task.init, self.mesh, shard_state=shard_state), 0
        logging.info("Resuming from step %d of %s", restored.step, self.checkpoints.directory)
        for warning in trained.other_data(restored.metadata, self.task.images):
            logging.warning(warning)
        if earlier := trained.earlier_data(restored.metadata, self.task.images):
            self.provenance = {**self.task.provenance, "earlier_data": earlier}
        field, last = self.task.field, self.training.num_steps
        changed = trained.changed_settings(restored.metadata, self.task.provenance, field)
        names = ", ".join(changed)
        if changed and restored.step < last:
            logging.warning("training continues with other settings than it began with: %s", names)
        elif changed or restored.step > last:
            text = "nothing is trained: step %d is stored, and %straining.num_steps=%d. Changed: %s"
            logging.warning(text, restored.step, field, last, names or "nothing else")
        return restored.state, restored.step

    def _set_aside_pictures(self) -> None:
        """Remove the pictures of later steps, which are made again; or rename them, if they are of
        a training that begins again."""
        for path in (self.task.directory / "samples").glob("step_*.png"):
            if not path.stem[5:].isdecimal() or int(path.stem[5:]) <= self.start:
                continue
            if self.start:
                path.unlink()
                continue
            aside = path
            while aside.exists():
                aside = aside.with_name(f"{aside.name}.earlier")
            path.replace(aside)

    def batch(self, step: int) -> Array:
        """The global batch of ``step``, or the stack of the batches of one dispatch."""
        count = self.training.steps_per_dispatch
        if count == 1:
            return sharding.to_global(self.batches[step], sharding.batch_sharding(self.mesh))
        stack = np.stack([self.batches[step + i] for i in range(count)])
        return sharding.to_global(stack, sharding.batch_sharding(self.mesh, axis=1))

    def advance(self, step: int, batch: Array) -> None:
        """Dispatch the update of ``step``, or the updates of one dispatch that begins with it."""
        self.state, metrics = self.step(self.state, batch, self.key, self.frozen)
        self.pending.append((step, metrics))

    def settle(self, leave: int) -> Iterator[tuple[int, float, float]]:
        """Wait for all dispatches but the last ``leave``: (step, loss, grad_norm) of each step."""
        while len(self.pending) > leave:
            first, metrics = self.pending.popleft()
            rows = zip(
                np.atleast_1d(sharding.to_host(metrics["loss"])),
                np.atleast_1d(sharding.to_host(metrics["grad_norm"])),
                strict=True,
            )
            for step, (loss, norm) in enumerate(rows, first):
                if not (np.isfinite(loss) and np.isfinite(norm)):
                    raise NonFiniteLoss(self._failure(step, float(loss), float(norm)))
                yield step, float(loss), float(norm)

    def _failure(self, step: int, loss: float, norm: float) -> str:
        """The message for a loss or gradient that is not finite, with the last good checkpoint."""
        try:
            self.checkpoints.wait()
        except Exception as error:  # What stops the training is the loss.
            logging.error("the last checkpoint was not saved: %s", error)
        steps = self.checkpoints.steps()
        if steps:
            last = (
                f"{self.checkpoints.directory / str(steps[-1])}. The same command resumes from it"
            )
        else:
            last = "none was saved. The same command starts again"
        return (
            f"step {step}: loss {loss}, gradient norm {norm}; training stopped. Last good "
            f"checkpoint: {last}; the same batch follows, so lower {self.task.field}optim.lr or "
            f"set a lower {self.task.field}optim.grad_clip first (0 is no clipping)"
        )

    def save(self, step: int) -> None:
        """Save a checkpoint after ``step`` updates, whose losses must all have been finite."""
        if step > self.saved:
            self.checkpoints.save(step, self.state, self.provenance)
            self.saved = step  # If no save succeeds from here on, ``checkpoints`` raises an error.

    def log(self, step: int, rows: list[tuple[float, float]], seconds: float) -> float:
        """Write the means of ``rows``, (loss, grad_norm) of steps that took ``seconds``; the result
        is the speed in images/s."""
        loss, norm = np.mean(np.asarray(rows), axis=0)
        rate = len(rows) * self.training.batch_size / self.task.repeats / seconds
        self.logged = step
        if self.writer:
            total = self.writer.seconds + seconds
            with self._tolerate_disk_errors(step):
                self.writer.scalars(
                    step,
                    {
                        "loss": float(loss),
                        "grad_norm": float(norm),
                        "images_per_s": rate,
                        "seconds": total,
                    },
                )
        return rate

    def close(self) -> None:
        """Write the metrics that are not written yet."""
        if self.writer:
            with self._tolerate_disk_errors(self.logged):
                self.writer.close()

    @contextlib.contextmanager
    def _tolerate_disk_errors(self, step: int) -> Iterator[None]:
        """A context in which an OSError does not end the training. Only the first is logged."""
        try:
            yield
        except OSError as error:
            if not self.unwritten:
                logging.error("step %d: %s. Training goes on without this file", step, error)
            self.unwritten += 1

    def picture(self, step: int) -> None:
        """Write the task's picture after ``step`` updates, to a file and to tensorboard."""
        if self.task.picture is None:
            return
        # If the parameters were split over the devices, a sampler would gather them in each step.
        average = self.gather(self.state.ema_params)
        grid = self.task.picture(self.state.replace(ema_params=average))
        if self.writer:
            folder = self.task.directory / "samples"
            with self._tolerate_disk_errors(step):
                folder.mkdir(parents=True, exist_ok=True)
                report.write_png(folder / f"step_{step:08d}.png", grid)
                self.writer.image(step, "samples", grid)


def run(task: Task, checkpoints: Checkpoints) -> None:
    """Train up to ``training.num_steps``, from the newest undamaged checkpoint on.

    Raises:
      ValueError: the config cannot work, or there is a checkpoint of another model.
      NonFiniteLoss: a loss or gradient is not finite; the message names the step and the last good
        checkpoint.
      UnsavedCheckpointError: the last checkpoint could not be written.
      LostProcessError: another process of this run is lost.
      SystemExit: with status 143 after SIGTERM and 130 after Ctrl-C, when everything is saved.
    """
    with Preemption() as preemption:
        # At the end of this context the last save is on disk.
        with checkpoints, peers.watched(checkpoints.newest):
            trainer = _Trainer(task, checkpoints)
            try:
                done = _loop(trainer, preemption)
            finally:
                trainer.close()
        # A signal during the last save also ends the process, before its next mode begins.
        preemption.leave_if_requested(f"step {done} is saved")


def _in_flight() -> int:
    """The number of dispatches ahead of the one whose loss is read, so that no device waits for the
    host.

    On CPU it is 0: a dispatch itself computes (``runtime.cpu``), so the measured times would be
    wrong if losses were read later.
    """
    return 0 if platform().name == "cpu" else 2


def _loop(trainer: _Trainer, preemption: Preemption) -> int:
    """Train up to the last step, or until a signal asks to stop; the number of steps made."""
    training = trainer.training
    stride, total = training.steps_per_dispatch, training.num_steps
    in_flight = _in_flight()
    rows: list[tuple[float, float]] = []
    since = time.perf_counter()
    bar = progress.bar(trainer.task.name, "step", total, trainer.start)

    def settle(leave: int) -> None:
        nonlocal rows, since
        for step, loss, norm in trainer.settle(leave):
            rows.append((loss, norm))
            bar.update()
            end = step + 1
            # The steps of one dispatch end together, so their time is known only at its end.
            complete = (end - trainer.start) % stride == 0
            # A run that goes on from a checkpoint begins with a new row.
            every = training.log_every, training.checkpoint_every
            if complete and (any(_crossed(end, stride, n) for n in every) or end == total):
                now = time.perf_counter()
                rate = trainer.log(end, rows, now - since)
                mean = np.mean([r[0] for r in rows])
                bar.set_postfix_str(f"loss {mean:.4f}, {rate:.0f} images/s", refresh=False)
                rows, since = [], now

    starts = range(trainer.start, total, stride)
    batches = prefetch(lambda i: trainer.batch(starts[i]), 0, len(starts))
    with bar, contextlib.closing(batches):
        for i, batch in batches:
            trainer.advance(starts[i], batch)
            done = starts[i] + stride
            stop = preemption.requested()
            save = stop or done == total or _crossed(done, stride, training.checkpoint_every)
            look = _crossed(done, stride, training.sample_every)
            settle(0 if save or look else in_flight)
            if save:
                trainer.save(done)
            if look:
                trainer.picture(done)
            if stop:
                if rows:  # Steps since the last row of metrics have a row of their own.
                    trainer.log(done, rows, time.perf_counter() - since)
                return done
    return max(trainer.start, total)


def _crossed(done: int, stride: int, every: int) -> bool:
    """Whether the last ``stride`` steps passed a multiple of ``every`` (0: never)."""
    return every > 0 and done // every > (done - stride) // every
