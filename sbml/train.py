"""Training: uint8 batch -> dequantize -> perturb -> score -> loss -> optimizer.

    loss = 1/d  mean over the batch of  weight(t) 1/2 w(t) ||sigma s(x_t, t) + z||^2     nats/dim

With likelihood weighting its expectation is, up to constants, a bound on -log p(x) / d.
"""

import contextlib
import math
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from ml_collections import ConfigDict

from sbml import bits, build, losses, sample, times
from sbml.build import Experiment
from sbml.data import prefetch, train_batches
from sbml.runtime import progress, report, sharding
from sbml.runtime.checkpoint import Checkpoints
from sbml.runtime.metrics import MetricsWriter
from sbml.runtime.preemption import EXIT_CODE, Preemption
from sbml.runtime.state import Loss, Prepare, Step, TrainState, make_step, several
from sbml.types import Array, Key

# Steps dispatched ahead of the one whose loss is read: the device never waits for the host.
IN_FLIGHT = 2


def prepare_fn(experiment: Experiment) -> Prepare:
    """The draws of a batch of uint8 images: x (n, *s) in [-1, 1]; times, weights, keys (n,)."""
    training, levels = experiment.config.training, experiment.levels
    draw = times.DRAWS[training.times]

    def prepare(pixels: Array, key: Key) -> tuple[Array, Array, Array, Key]:
        u_key, time_key, loss_key = jax.random.split(key, 3)
        if experiment.config.data.dequantization == "none":
            x = 2.0 * pixels / (levels - 1) - 1.0
        else:
            x = bits.to_model(pixels, jax.random.uniform(u_key, pixels.shape), levels)
        t, weight = experiment.proposal.at(draw(time_key, len(pixels))[:, 0])
        return x, t, weight, jax.random.split(loss_key, len(pixels))

    return prepare


def loss_fn(experiment: Experiment) -> Loss:
    """Per-example losses (n,) in nats/dim."""
    sde, dims = experiment.sde, math.prod(experiment.shape)

    def loss(params: Any, draws: tuple[Array, Array, Array, Key]) -> Array:
        x, t, weight, keys = draws
        score = experiment.adapter(params)
        terms = losses.dsm_batch(score, sde, x, t, keys, weighting=experiment.weighting)
        return weight * terms / dims

    return loss


def compiled_step(experiment: Experiment, mesh: jax.sharding.Mesh) -> Step:
    """The update, jitted over ``mesh`` with the state donated."""
    training = experiment.config.training
    step = make_step(
        prepare_fn(experiment),
        loss_fn(experiment),
        experiment.optimizer,
        ema=experiment.config.optim.ema,
        accumulate=training.accumulate,
    )
    stacked = training.steps_per_dispatch > 1
    same, split = sharding.replicated(mesh), sharding.batched(mesh, axis=int(stacked))
    return jax.jit(
        several(step) if stacked else step,
        in_shardings=(same, split, same),
        out_shardings=(same, same),
        donate_argnums=0,
    )


class NonFiniteLoss(FloatingPointError):
    """A loss or gradient that is not finite; training cannot go on from it."""


class _Trainer:
    """The state of one training run in one process."""

    def __init__(self, experiment: Experiment, workdir: epath.Path, checkpoints: Checkpoints):
        config = experiment.config
        sharding.check_divides(
            "training.batch_size", config.training.batch_size, config.training.accumulate
        )
        self.experiment, self.workdir, self.checkpoints = experiment, workdir, checkpoints
        self.images = experiment.images("train")
        self.batches = train_batches(
            self.images,
            config.training.batch_size,
            config.seed,
            flip=config.data.flip,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        self.mesh = sharding.data_mesh()
        self.key = jax.jit(
            lambda: jax.random.key(config.seed), out_shardings=sharding.replicated(self.mesh)
        )()
        self.state, self.start = self._restore()
        self.step = compiled_step(experiment, self.mesh)
        self.saved = self.start
        if (config.training.num_steps - self.start) % config.training.steps_per_dispatch:
            raise ValueError(
                f"training.steps_per_dispatch={config.training.steps_per_dispatch} does not divide "
                f"the {config.training.num_steps - self.start} steps from {self.start} to "
                f"training.num_steps={config.training.num_steps}; change either"
            )
        self.pending: deque[tuple[int, dict[str, Array]]] = deque()
        self.writer = MetricsWriter(workdir, self.start) if jax.process_index() == 0 else None

    def _restore(self) -> tuple[TrainState, int]:
        fresh = self.experiment.init_state(self.mesh)
        restored = self.checkpoints.restore(fresh)
        if restored is None:
            return fresh, 0
        logging.info("Resuming from step %d of %s", restored.step, self.checkpoints.directory)
        build.warn_if_other_data(restored.metadata, self.images)
        return restored.state, restored.step

    def batch(self, step: int) -> Array:
        """The global batch of ``step``, or the stack of those that one dispatch takes."""
        count = self.experiment.config.training.steps_per_dispatch
        if count == 1:
            return sharding.to_global(self.batches[step], sharding.batched(self.mesh))
        stack = np.stack([self.batches[step + i] for i in range(count)])
        return sharding.to_global(stack, sharding.batched(self.mesh, axis=1))

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
        last = self.checkpoints.directory / str(steps[-1]) if steps else "none was saved"
        return (
            f"step {step}: loss {loss}, gradient norm {norm}; training stopped. Last good "
            f"checkpoint: {last}. The same command resumes from it; the same batch follows, so "
            "lower optim.lr or optim.grad_clip first"
        )

    def save(self, step: int) -> None:
        """Checkpoint after ``step`` updates; only ever called once every loss so far was finite."""
        if step > self.saved:
            self.checkpoints.save(step, self.state, self.experiment.provenance(self.images))
            self.saved = step

    def log(self, step: int, rows: list[tuple[float, float]], seconds: float) -> float:
        """Write the mean of ``rows`` of (loss, grad_norm); returns images/s."""
        size = self.experiment.config.training.batch_size
        loss, norm = np.mean(np.asarray(rows), axis=0)
        rate = len(rows) * size / seconds
        if self.writer:
            total = self.writer.seconds + seconds
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

    def samples(self, step: int) -> None:
        """A grid of samples of the averaged parameters, to disk and to tensorboard."""
        count = self.experiment.config.sampling.num_images
        images, _ = sample.generate(self.experiment, self.state.ema_params, count, quiet=True)
        if self.writer:
            folder = self.workdir / "samples"
            folder.mkdir(parents=True, exist_ok=True)
            grid = sample.grid(self.experiment, images)
            report.write_png(folder / f"step_{step:08d}.png", grid)
            self.writer.image(step, "samples", grid)


def run(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Train up to ``training.num_steps``, resuming from the newest whole checkpoint of ``workdir``.

    Writes ``checkpoints/``, ``metrics.jsonl``, ``tensorboard/`` and ``samples/``.

    Raises:
      ValueError: for a config that cannot work, or a checkpoint of another model.
      NonFiniteLoss: naming the step, the loss and the last good checkpoint.
      SystemExit: with status 143 after SIGTERM, once everything is saved.
    """
    experiment, workdir = Experiment(config), epath.Path(workdir)
    with experiment.checkpoints(workdir) as checkpoints, Preemption() as preemption:
        trainer = _Trainer(experiment, workdir, checkpoints)
        try:
            _loop(trainer, preemption)
        finally:
            if trainer.writer:
                trainer.writer.close()


def _loop(trainer: _Trainer, preemption: Preemption) -> None:
    training = trainer.experiment.config.training
    stride, total = training.steps_per_dispatch, training.num_steps
    rows: list[tuple[float, float]] = []
    since = time.perf_counter()
    bar = progress.bar("train", "step", total, trainer.start)

    def settle(leave: int) -> None:
        nonlocal rows, since
        for step, loss, norm in trainer.settle(leave):
            rows.append((loss, norm))
            bar.update()
            if (step + 1) % training.log_every == 0 or step + 1 == total:
                now = time.perf_counter()
                rate = trainer.log(step + 1, rows, now - since)
                mean = np.mean([r[0] for r in rows])
                bar.set_postfix_str(f"loss {mean:.4f}, {rate:.0f} images/s", refresh=False)
                rows, since = [], now

    starts = range(trainer.start, total, stride)
    batches = prefetch(lambda i: trainer.batch(starts[i]), 0, len(starts))
    with bar, contextlib.closing(batches):
        for i, batch in batches:
            step = starts[i]
            trainer.state, metrics = trainer.step(trainer.state, batch, trainer.key)
            trainer.pending.append((step, metrics))
            done = step + stride
            stop = preemption.requested(done)
            save = stop or done == total or _crossed(done, stride, training.checkpoint_every)
            picture = _crossed(done, stride, training.sample_every)
            settle(0 if save or picture else IN_FLIGHT)
            if save:
                trainer.save(done)
            if picture:
                trainer.samples(done)
            if stop:
                trainer.checkpoints.wait()
                logging.warning("SIGTERM: saved step %d; the same command resumes from it", done)
                raise SystemExit(EXIT_CODE)


def _crossed(done: int, stride: int, every: int) -> bool:
    """Whether the last ``stride`` steps passed a multiple of ``every`` (0: never)."""
    return every > 0 and done // every > (done - stride) // every
