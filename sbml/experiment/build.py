"""From a config to objects: what several sections make together (one alone: ``sections``).

Everything derived from several fields is computed here, after command-line overrides. A wrong value
is a ValueError that names the field, before any work is done.
"""

import dataclasses
import math
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import optax
from etils import epath
from ml_collections import ConfigDict

from sbml import adapters, data, dequantizers, discrete, integers, losses, samplers, sdes, times
from sbml.divergence import Trace
from sbml.estimators import Cell
from sbml.experiment import trained
from sbml.experiment.config import check_ranges
from sbml.experiment.sections import (
    cells,
    check_choice,
    data_options,
    loss_unit,
    network,
    optimizer,
    plain,
    proposal,
    sampler,
    sde,
    smallest_time,
    solver,
    trace,
    trained_from,
)
from sbml.ode import Solver
from sbml.runtime import sharding
from sbml.runtime.checkpoint import Checkpoints, Restored
from sbml.runtime.state import TrainState
from sbml.runtime.versions import versions
from sbml.types import Key

PRECISIONS = ("default", "high", "highest")
DEQUANTIZATIONS = ("uniform", "centre", "none")
NOISES = ("independent", "antithetic")


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What a config describes. Building one reads no data and makes no arrays."""

    config: ConfigDict

    def __post_init__(self) -> None:
        # Touch every part now: a bad field must not surface after an hour of training.
        check_ranges(self.config)
        _ = (self.trained_adapter, self.proposal, self.optimizer, self.weighting)
        _ = (self.antithetic, self.cells)
        _ = (self.eval_proposal, self.eval_solver, self.sampler, self.sampling_eps, self.eval_eps)
        _ = self.dequantizer_optimizer
        name = self.config.dequantizer.name
        if not dequantizers.is_trained(self.dequantizer(name)):
            raise ValueError(f"dequantizer.name={name} has nothing to train; choose variational")
        check_choice("eval.times", self.config.eval.times, times.DRAWS)
        check_choice("training.times", self.config.training.times, times.DRAWS)
        check_choice("eval.split", self.config.eval.split, data.SPLITS)
        check_choice("eval.precision", self.config.eval.precision, PRECISIONS)
        check_choice("data.dequantization", self.config.data.dequantization, DEQUANTIZATIONS)

    @property
    def shape(self) -> tuple[int, ...]:
        """(height, width, channels)."""
        return tuple(self.config.data.shape)

    @property
    def levels(self) -> int:
        return self.config.data.levels

    @cached_property
    def sde(self) -> sdes.SDE:
        return sde(self.config)

    @cached_property
    def adapter(self) -> adapters.Adapter:
        """From parameters to the score that is evaluated and sampled."""
        score = self.config.score
        data = self.config.data
        model = network(self.config)
        if score.parameterization == adapters.LEVELS:
            model = model.clone(outputs=integers.outputs(data.levels))
        return adapters.Adapter(
            model,
            self.sde,
            parameterization=score.parameterization,
            label=score.label,
            data_std=score.data_std,
            eps=smallest_time(self.config),
            log_snr_range=tuple(score.log_snr_range),
            levels=data.levels,
            data="centre" if data.dequantization == "centre" else "uniform",
        )

    @property
    def exact_adapter(self) -> adapters.Adapter:
        """The adapter in float32 whatever ``model.dtype`` is, as likelihoods are computed.

        bfloat16 is as noise to the step control: three times the evaluations, and no convergence.
        """
        return dataclasses.replace(self.adapter, model=self.adapter.model.clone(dtype="float32"))

    @cached_property
    def trained_kernel(self) -> sdes.Kernel:
        """What noises the images in training: the SDE, or ``training.discrete_levels`` of it.

        Raises:
          ValueError: for flags that a discrete-time loss does not have.
        """
        training = self.config.training
        if not training.discrete_levels:
            return self.sde
        for flag in ("likelihood_weighting", "importance_sampling"):
            if training[flag]:
                raise ValueError(
                    f"training.discrete_levels={training.discrete_levels} with training.{flag}: "
                    f"the discrete-time losses have neither; set --config.training.{flag}=False"
                )
        return self.sde.levels(training.discrete_levels)

    @property
    def trained_adapter(self) -> adapters.Adapter:
        """From parameters to the score that the loss sees, of the same network."""
        if self.trained_kernel is self.sde:
            return self.adapter
        return dataclasses.replace(self.adapter, sde=self.trained_kernel, labels=self.sde)

    @cached_property
    def proposal(self) -> times.Proposal | times.Grid:
        if levels := self.config.training.discrete_levels:
            return times.Grid(levels)
        return times.PROPOSALS[proposal(self.config.training)](self.sde, smallest_time(self.config))

    @property
    def antithetic(self) -> bool:
        """Whether every image of a batch is called twice, with noises z and -z."""
        return check_choice("training.noises", self.config.training.noises, NOISES) == "antithetic"

    @property
    def adapts(self) -> bool:
        """Whether the times' density follows the noise that training meets."""
        return self.config.training.proposal_bins > 0

    @property
    def weighting(self) -> str:
        kind = "likelihood" if self.config.training.likelihood_weighting else "original"
        assert kind in losses.WEIGHTINGS
        return kind

    @cached_property
    def optimizer(self) -> optax.GradientTransformation:
        return optimizer(self.config, loss_unit(self.config))

    @property
    def cells(self) -> list[Cell]:
        """The table that ``config.eval`` asks for, undefined cells included."""
        return cells(self.config.eval)

    def trace(self, num_importance: int = 1) -> Trace:
        """How the divergence is computed with K draws of the dequantizer."""
        return trace(self.config.eval, num_importance)

    def dequantizer(self, name: str) -> Any:
        """The dequantizer called ``name``, for these levels and this SDE."""
        kind = dequantizers.get(check_choice("dequantizer", name, dequantizers.DEQUANTIZERS))
        fields = {
            **self.config.dequantizer.model,
            "levels": self.levels,
            "tau": discrete.tau(self.sde, self.levels, self.discrete_eps),
        }
        return kind(
            **{f.name: fields[f.name] for f in dataclasses.fields(kind) if f.name in fields}
        )

    @cached_property
    def dequantizer_optimizer(self) -> optax.GradientTransformation:
        # The paper's is in nats, ours in nats/dim.
        return optimizer(self.config.dequantizer, 1 / math.prod(self.shape))

    @property
    def eval_proposal(self) -> str:
        """Where the bound's times are drawn, of ``times.PROPOSALS``.

        Raises:
          ValueError: for times uniform in t with a density, which is learned in log-SNR.
        """
        if not self.config.eval.importance_sampling and (bins := self.config.eval.proposal_bins):
            raise ValueError(
                f"eval.importance_sampling=False with eval.proposal_bins={bins}: the density of "
                "the bound's times is one of log-SNR; set --config.eval.proposal_bins=0"
            )
        return proposal(self.config.eval)

    @property
    def eval_solver(self) -> Solver:
        return solver(self.config.eval)

    @property
    def path_solver(self) -> Solver:
        """Evaluation's, ten times as strict: for a path alone, whose error no score takes out."""
        return self.eval_solver.tighter(10)

    @property
    def sampler(self) -> samplers.Sampler:
        return sampler(self.config.sampling)

    @property
    def eval_eps(self) -> float:
        return self._time("eval", trained_from(self.config))

    @property
    def discrete_eps(self) -> float:
        """The smallest time of what is of the integers themselves, by ``eval.tau``."""
        tau = self.config.eval.tau or math.inf
        return discrete.smallest_time(self.sde, self.levels, self.eval_eps, tau)

    @property
    def sampling_eps(self) -> float:
        return self._time("sampling", max(1e-3, trained_from(self.config)))

    def _time(self, section: str, otherwise: float) -> float:
        given = self.config[section].smallest_time
        eps = otherwise if given is None else given
        return self.sde.check_time(eps, f"{section}.smallest_time")

    def images(self, split: str) -> data.ImageSet:
        """The images of ``split``.

        Raises:
          ValueError: if they are not what ``config.data`` says they are.
        """
        d = self.config.data
        images = data.load(d.source, split, data_options(d))
        if images.shape != self.shape or images.levels != self.levels:
            raise ValueError(
                f"{d.source} has images of shape {images.shape} with {images.levels} levels, the "
                f"config says {self.shape} with {self.levels}; "
                f"set --config.data.shape={','.join(map(str, images.shape))} "
                f"--config.data.levels={images.levels}"
            )
        return images

    def parameter_count(self) -> int:
        """How many parameters the network has."""
        shapes = jax.eval_shape(lambda k: self.adapter.init(k, self.shape), jax.random.key(0))
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))

    def init_state(self) -> TrainState:
        """The state before the first step; compiled and put on devices by ``sharding.made``."""
        bins = self.config.training.proposal_bins
        statistics = jnp.zeros((2, bins)) if self.adapts else ()
        params = self.adapter.init(self._init_key(), self.shape)
        return TrainState.create(params, self.optimizer, statistics)

    def _init_key(self) -> Key:
        return jax.random.fold_in(jax.random.key(self.config.seed), jnp.iinfo(jnp.int32).max)

    def checkpoints(self, workdir: epath.PathLike) -> Checkpoints:
        """The checkpoints of the run in ``workdir``."""
        training = self.config.training
        return Checkpoints(
            epath.Path(workdir) / "checkpoints",
            keep_last=training.keep_last,
            keep_every=training.keep_every or None,
        )

    def dequantizer_checkpoints(self, workdir: epath.PathLike) -> Checkpoints:
        """The checkpoints of the dequantizer in ``workdir``."""
        training = self.config.dequantizer.training
        return Checkpoints(
            epath.Path(workdir) / "dequantizer" / "checkpoints",
            keep_last=training.keep_last,
            keep_every=training.keep_every or None,
        )

    def init_dequantizer(self, images: data.ImageSet) -> TrainState:
        """The state before the first step, fitted to a batch from all over ``images``."""
        model = self.dequantizer(self.config.dequantizer.name)
        size = self.config.dequantizer.training.batch_size
        pixels = images.images[data.spread(len(images), size)]
        params = model.init(self._init_key(), jnp.asarray(pixels))
        return TrainState.create(params, self.dequantizer_optimizer)

    def restore_dequantizer(self, workdir: epath.PathLike, images: data.ImageSet) -> Restored:
        """The newest whole checkpoint of the dequantizer trained in ``workdir``.

        Raises:
          ValueError: if there is none, or it is another model's.
        """
        mesh = sharding.data_mesh()
        wanted = sharding.abstract(lambda: self.init_dequantizer(images), mesh)
        with self.dequantizer_checkpoints(workdir) as checkpoints:
            restored = checkpoints.restore(wanted)
        if restored is None:
            raise ValueError(
                f"no dequantizer in {checkpoints.directory}: train it first "
                "(--mode=train_dequantizer)"
            )
        trained.check_dequantizer(self.config, restored.metadata)
        return restored

    def restore(self, workdir: epath.PathLike) -> Restored:
        """The newest whole checkpoint of ``workdir``, to evaluate or sample: how it was trained
        is free, what its parameters mean is not.

        Raises:
          ValueError: if there is none, or it is another model's.
        """
        mesh = sharding.data_mesh()
        # Here, not in the reader: an error of the config's is not a damaged checkpoint.
        wanted = sharding.abstract(self.init_state, mesh)

        def template(metadata: dict) -> TrainState:
            bins = metadata["config"]["training"].get("proposal_bins", 0)
            same = sharding.replicated(mesh)
            statistics = jax.ShapeDtypeStruct((2, bins), jnp.float32, sharding=same)
            return wanted.replace(statistics=statistics if bins else ())

        with self.checkpoints(workdir) as checkpoints:
            restored = checkpoints.restore(template)
        if restored is None:
            raise ValueError(
                f"no checkpoint in {checkpoints.directory}: train first (--mode=train), or "
                "name the run's --workdir"
            )
        trained.check_score(self.config, restored.metadata)
        return restored

    @property
    def score_identity(self) -> dict[str, Any]:
        """What a score depends on beside its parameters, as plain JSON values."""
        config = self.to_plain()
        free = ("dropout", "init_scale", "dtype", "remat")
        model = {field: v for field, v in config["model"].items() if field not in free}
        sections = {"sde": config["sde"], "score": config["score"], "model": model}
        return {**sections, "label_eps": self.adapter.eps}

    def provenance(self, images: data.ImageSet) -> dict:
        """What a checkpoint says of its origin: config, training data, versions."""
        return {"config": self.to_plain(), "data": images.fingerprint, "versions": versions()}

    def to_plain(self) -> dict:
        """The config as plain JSON values."""
        return plain(self.config.to_dict())
