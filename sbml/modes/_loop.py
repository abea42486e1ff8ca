"""The training loop that every trained model shares: resume, step, log, save, stop.

A task says what is trained; the loop knows no formula. The batch of a step is a pure function of
(seed, step) and the state holds everything else, so a killed run goes on bitwise from its newest
whole checkpoint.
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
from sbml.runtime import metrics, progress, sharding
from sbml.runtime.checkpoint import Checkpoints
from sbml.runtime.preemption import Preemption
from sbml.runtime.state import (
    TrainState,
    Update,
    make_step,
    several,
)
from sbml.types import Array


class NonFiniteLoss(FloatingPointError):
    """A loss or gradient that is not finite; training cannot go on from it."""


@dataclasses.dataclass(frozen=True)
class Task:
    """What is trained.

    Attributes:
      name: of the progress bar.
      training: how, of the config.
      field: what precedes ``training`` and ``optim`` on the command line.
      images, seed, flip: where batches come from.
      init: the state before the first step.
      update: what a step computes.
      repeats: rows that ``update.prepare`` makes of one image; ``batch_size`` counts rows.
      frozen: arrays that the loss needs and nothing changes.
      provenance: what a checkpoint says of its origin.
      check: raises where a checkpoint's metadata forbid to go on from it.
      directory: where ``metrics.jsonl`` and ``samples/`` go.
      picture: a grid of images to look at, from the state; None for nothing to look at.
    """

    name: str
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
    """``update`` jitted over ``mesh``, with the state donated.

    Args:
      update: what a step computes.
      mesh: the devices.
      state: arrays or shapes; the new state is placed as they are.
      steps_per_dispatch: with more than one, the batches are stacked on a leading axis.
      shard_state: whether ``state`` is spread over the devices (``sharding.placement``).
    """
    if shard_state:
        optimizer = sharding.partitioned(update.optimizer, mesh)
        update = dataclasses.replace(update, optimizer=optimizer)
    step, stacked = make_step(update), steps_per_dispatch > 1
    placement = jax.tree.map(lambda leaf: leaf.sharding, state)
    same, split = sharding.replicated(mesh), sharding.batch_sharding(mesh, axis=int(stacked))
    return jax.jit(
        several(step) if stacked else step,
        in_shardings=(placement, split, same, same),
        out_shardings=(placement, same),
        donate_argnums=0,
        compiler_options=compiler_options(),
    )


class _Trainer:
    """The state of one training run in one process."""

    def __init__(self, task: Task, checkpoints: Checkpoints) -> None:
        training = task.training
        field = f"{task.field}training"
        parts = training.accumulate * task.repeats
        sharding.check_divides(f"{field}.batch_size", training.batch_size, parts)
        if training.batch_size > (most := len(task.images) * task.repeats):
            raise ValueError(
                f"{field}.batch_size={training.batch_size} takes "
                f"{training.batch_size // task.repeats} different images a step, "
                f"{task.images.name} has {len(task.images)}: use at most {most}"
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
        same = sharding.replicated(self.mesh)
        self.key = jax.jit(lambda: jax.random.key(task.seed), out_shardings=same)()
        self.frozen = jax.device_put(task.frozen, same)
        self.state, self.start = self._restore()
        self.step = compiled_step(
            task.update,
            self.mesh,
            self.state,
            steps_per_dispatch=training.steps_per_dispatch,
            shard_state=training.shard_state,
        )
        self.gathered = jax.jit(lambda tree: tree, out_shardings=same)
        self.saved = self.start
        self.unwritten = 0  # files that could not be written
        left = max(0, training.num_steps - self.start)
        if left % training.steps_per_dispatch:
            raise ValueError(
                f"{field}.steps_per_dispatch={training.steps_per_dispatch} does not divide the "
                f"{left} steps from {self.start} to "
                f"{field}.num_steps={training.num_steps}; change either"
            )
        self.pending: deque[tuple[int, dict[str, Array]]] = deque()
        first = jax.process_index() == 0
        self.writer = metrics.MetricsWriter(task.directory, self.start) if first else None

    def _restore(self) -> tuple[TrainState, int]:
        shard_state = self.training.shard_state
        wanted = sharding.abstract(self.task.init, self.mesh, shard_state=shard_state)

        def template(metadata: dict[str, Any]) -> TrainState:
            trained.of_another_model(self.task.check, metadata)
            return wanted

        restored = self.checkpoints.restore(template)
        if restored is None:
            if rows := metrics.read(self.task.directory):
                logging.warning(
                    "%s has no checkpoint, but %s reaches step %d: training begins again at step "
                    "0. If there were checkpoints, stop it now and put them back",
                    *(self.checkpoints.directory, metrics.FILE, rows[-1]["step"]),
                )
            return sharding.initial_state(self.task.init, self.mesh, shard_state=shard_state), 0
        logging.info("Resuming from step %d of %s", restored.step, self.checkpoints.directory)
        trained.warn_if_other_data(restored.metadata, self.task.images)
        trained.warn_if_trained_otherwise(restored.metadata, self.task.provenance, self.task.field)
        if restored.step > self.training.num_steps:
            logging.warning(
                "step %d is past %straining.num_steps=%d: nothing is trained",
                *(restored.step, self.task.field, self.training.num_steps),
            )
        return restored.state, restored.step

    def batch(self, step: int) -> Array:
        """The global batch of ``step``, or the stack of those that one dispatch takes."""
        count = self.training.steps_per_dispatch
        if count == 1:
            return sharding.to_global(self.batches[step], sharding.batch_sharding(self.mesh))
        stack = np.stack([self.batches[step + i] for i in range(count)])
        return sharding.to_global(stack, sharding.batch_sharding(self.mesh, axis=1))

    def advance(self, step: int, batch: Array) -> None:
        """Dispatch the update of ``step``."""
        self.state, metrics = self.step(self.state, batch, self.key, self.frozen)
        self.pending.append((step, metrics))

    def settle(self, leave: int) -> Iterator[tuple[int, float, float]]:
        """Read the oldest dispatched steps, all but ``leave``, as (step, loss, grad_norm)."""
        while len(self.pending) > leave:
            first, metrics = self.pending.popleft()
            rows = zip(
                np.atleast_1d(sharding.to_host(metrics["loss"])),
                np.atleast_1d(sharding.to_host(metrics["grad_norm"])),
                strict=True,
            )
            for step, (loss, norm) in enumerate(rows, first):
                if not (np.isfinite(loss) and np.isfinite(norm)):
                    raise NonFiniteLoss(self._epitaph(step, float(loss), float(norm)))
                yield step, float(loss), float(norm)

    def _epitaph(self, step: int, loss: float, norm: float) -> str:
        self.checkpoints.wait()
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
            f"{self.task.field}optim.grad_clip first"
        )

    def save(self, step: int) -> None:
        """Checkpoint after ``step`` updates; only ever called once every loss so far was finite."""
        if step > self.saved:
            self.checkpoints.save(step, self.state, self.task.provenance)
            self.saved = step  # Or tried to: at the end the checkpoints say whether it is.

    def log(self, step: int, rows: list[tuple[float, float]], seconds: float) -> float:
        """Write the mean of ``rows`` of (loss, grad_norm); returns images/s."""
        loss, norm = np.mean(np.asarray(rows), axis=0)
        rate = len(rows) * self.training.batch_size / self.task.repeats / seconds
        if self.writer:
            total = self.writer.seconds + seconds
            with self._despite_the_disk(step):
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

    @contextlib.contextmanager
    def _despite_the_disk(self, step: int) -> Iterator[None]:
        """A file that cannot be written costs itself, not the training; the first is logged."""
        try:
            yield
        except OSError as error:
            if not self.unwritten:
                logging.error("step %d: %s. Training goes on without this file", step, error)
            self.unwritten += 1

    def picture(self, step: int) -> None:
        """The task's picture, to disk and to tensorboard."""
        if self.task.picture is None:
            return
        # Whole on every device: a sampler would gather each layer again at each of its steps.
        average = self.gathered(self.state.ema_params)
        grid = self.task.picture(self.state.replace(ema_params=average))
        if self.writer:
            folder = self.task.directory / "samples"
            with self._despite_the_disk(step):
                folder.mkdir(parents=True, exist_ok=True)
                report.write_png(folder / f"step_{step:08d}.png", grid)
                self.writer.image(step, "samples", grid)


def run(task: Task, checkpoints: Checkpoints) -> None:
    """Train up to ``training.num_steps``, from the newest whole checkpoint.

    Raises:
      ValueError: for a config that cannot work, or a checkpoint of another model.
      NonFiniteLoss: naming the step, the loss and the last good checkpoint.
      UnsavedCheckpointError: the disk has no room for the last checkpoint.
      SystemExit: with status 143 after SIGTERM, 130 after Ctrl-C, once everything is saved.
    """
    with Preemption() as preemption:
        with checkpoints:  # Left with the last save on disk.
            trainer = _Trainer(task, checkpoints)
            try:
                done = _loop(trainer, preemption)
            finally:
                if trainer.writer:
                    trainer.writer.close()
        # Whenever it came, in the last save too: what follows in this process is not begun.
        preemption.leave_if_requested(f"step {done} is saved")


def _in_flight() -> int:
    """Steps dispatched ahead of the one whose loss is read, so that no device waits for the host.

    On CPU dispatch itself computes (``runtime.cpu``): read later, steps would seem to take no time.
    """
    return 0 if platform().name == "cpu" else 2


def _loop(trainer: _Trainer, preemption: Preemption) -> int:
    """Train until done, or asked to stop; the number of steps made and saved."""
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
            # The steps of one dispatch end together: only at its end is there a time to tell.
            whole = (end - trainer.start) % stride == 0
            if whole and (_crossed(end, stride, training.log_every) or end == total):
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
                if rows:  # The part of a row: no step's loss or time is lost.
                    trainer.log(done, rows, time.perf_counter() - since)
                return done
    return max(trainer.start, total)


def _crossed(done: int, stride: int, every: int) -> bool:
    """Whether the last ``stride`` steps passed a multiple of ``every`` (0: never)."""
    return every > 0 and done // every > (done - stride) // every
