"""Builds the objects that a config describes: SDE, score, optimizer, estimators, sampler.

Objects that depend on one section only are built by a method of that section; this file combines
several sections. Every error in a config is a ValueError that is raised before any work is done.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any, Final, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from ml_collections import ConfigDict

from sbml import data
from sbml.core.streams import stream
from sbml.core.types import Score
from sbml.likelihood import discrete
from sbml.program.config import compatibility
from sbml.program.config.config import Config
from sbml.program.config.evaluation import Eval
from sbml.program.config.fields import errors_of
from sbml.program.config.sampling import Sampling
from sbml.program.config.training import (
    discrete_time,
    loss_unit,
    smallest_time,
    smallest_trained_time,
)
from sbml.program.runtime import sharding
from sbml.program.runtime.checkpoint import Restored
from sbml.program.runtime.state import TrainState
from sbml.program.runtime.versions import versions
from sbml.score import Adapter
from sbml.sdes import SDE, Kernel
from sbml.sdes.times import Grid, Proposal

T = TypeVar("T")
SDE_NUMBERS = "sde"  # where the parameters of a learned SDE hold its numbers


def part(make: Callable[[Any], T]) -> "cached_property[T]":
    """A property that is made when it is first asked for, and then kept. Its arrays are made
    outside of a function that JAX may be tracing at that time."""

    @functools.wraps(make)
    def outside(experiment: Any) -> T:
        with jax.ensure_compile_time_eval():
            return make(experiment)

    return cached_property(outside)


class Experiment:
    """The objects that a config describes, each made when it is first asked for.

    The constructor makes nothing; no part reads data or makes parameters.

    Attributes:
      config: the config; its sections are ``config.data``, ``config.training`` ...
      shape: shape of an image, (height, width, channels).
      levels: number of levels of the integer data.
    """

    def __init__(self, config: ConfigDict | Config) -> None:
        self.config: Final = config if isinstance(config, Config) else Config(**config.to_dict())
        self.config.check_learned()
        self.shape: Final = self.config.data.shape
        self.levels: Final = self.config.data.levels
        self._images: dict[str, data.ImageSet] = {}

    @part
    def sde(self) -> SDE:
        """The forward process."""
        return self.config.sde.build()

    @part
    def eps(self) -> float:
        """The smallest time of training."""
        c = self.config
        return smallest_time(self.sde, c.training, c.data, c.eval.tau or math.inf)

    @part
    def adapter(self) -> Adapter:
        """Maps parameters to the score that is evaluated and sampled."""
        c = self.config
        return c.score.adapter(c.model.build(), self.sde, self.eps, c.data)

    @part
    def exact_adapter(self) -> Adapter:
        """The same in float32, whatever ``model.dtype`` is, for likelihoods. With the rounding
        errors of bfloat16, an ODE with step control takes three times the evaluations and does not
        converge."""
        exact = self.adapter.model
        if hasattr(exact, "dtype"):  # A network without this field always computes in float32.
            exact = exact.clone(dtype="float32")
        return dataclasses.replace(self.adapter, model=exact)

    @part
    def trained_kernel(self) -> Kernel:
        """The process that noises images in training: the SDE, or its discrete levels."""
        return self.config.training.kernel(self.sde)

    @part
    def trained_adapter(self) -> Adapter:
        """Maps parameters to the score in the training loss, with the same network."""
        if self.trained_kernel is self.sde:
            return self.adapter
        return dataclasses.replace(self.adapter, sde=self.trained_kernel, labels=self.sde)

    @part
    def proposal(self) -> Proposal | Grid:
        """The distribution of the times in training."""
        return self.config.training.proposal(self.sde, self.eps)

    @part
    def optimizer(self) -> optax.GradientTransformation:
        """The optimizer of the score."""
        training = self.config.training
        unit = loss_unit(self.sde, training, self.eps)
        return self.config.optim.transformation(training.num_steps, unit)

    @part
    def _first(self) -> float:
        """The smallest time at which the network sees images in training."""
        return smallest_trained_time(self.sde, self.config.training.discrete_levels, self.eps)

    @part
    def eval_eps(self) -> float:
        """The smallest time of an evaluation."""
        return self._smallest(self.config.eval, self._first)

    def _smallest(self, section: Eval | Sampling, usual: float) -> float:
        eps = usual if section.smallest_time is None else section.smallest_time
        with errors_of(f"sde.name={self.config.sde.name}"):
            self.sde.check_time(eps, section.name_of("smallest_time"))
        return eps

    @part
    def discrete_eps(self) -> float:
        """The smallest time for dequantizers with noise around bin centres, set by ``eval.tau``."""
        tau = self.config.eval.tau or math.inf
        return float(discrete_time(self.sde, self.levels, self.eval_eps, tau))

    @part
    def sampling_eps(self) -> float:
        """The smallest time of samples."""
        return self._smallest(self.config.sampling, max(1e-3, self._first))

    @part
    def trained_dequantizer(self) -> Any:
        """The dequantizer that ``--mode=train_dequantizer`` trains."""
        return self.dequantizer(self.config.dequantizer.name)

    @part
    def dequantizer_optimizer(self) -> optax.GradientTransformation:
        """The optimizer of the dequantizer."""
        section = self.config.dequantizer
        # The norm for clipping refers to the paper's loss in nats; the loss here is in nats/dim.
        unit = 1 / math.prod(self.shape)
        return section.optim.transformation(section.training.num_steps, unit)

    def check(self) -> None:
        """Make every part, so that a config that cannot work is refused before the first mode."""
        for name, value in vars(type(self)).items():
            if isinstance(value, cached_property):
                getattr(self, name)

    def dequantizer(self, name: str) -> Any:
        """The dequantizer called ``name``, for these levels and this SDE."""
        tau = discrete.tau(self.sde, self.levels, self.discrete_eps)
        return self.config.dequantizer.build(name, levels=self.levels, tau=tau)

    def images(self, split: str) -> data.ImageSet:
        """The images of ``split``, the same in all processes; every process calls this."""
        if split not in self._images:
            images = self.config.data.images(split)
            if jax.process_count() > 1:
                sharding.check_same(f"{split} images", images.fingerprint["id"])
            self._images[split] = images
        return self._images[split]

    def loaded(self, split: str) -> data.ImageSet:
        """The images of ``split``; one process can call this alone."""
        return self._images.get(split) or self.config.data.images(split)

    def labels(self, images: data.ImageSet, classes: Sequence[str] = ()) -> np.ndarray | None:
        """The number of each image's class, int32 ``(n,)``; None for a model without classes.

        It is the place of the label among the names ``classes`` of the training, or if they are not
        given, among the sorted labels of ``images``.
        """
        count = self.adapter.classes
        if not count:
            return None
        if images.labels is None:
            raise ValueError(
                f"model.classes={count}, but the images of {images.name} ({images.split}) have no "
                "labels: digits, sets of tfds with labels, and folders with a subfolder for each "
                "class have them"
            )
        names, numbers = np.unique(images.labels, return_inverse=True)
        classes = list(classes) or names.tolist()
        if len(classes) != count:
            raise ValueError(
                f"model.classes={count}, but {images.name} ({images.split}) has {len(classes)} "
                f"classes, {', '.join(classes[:10])}: set --config.model.classes={len(classes)}"
            )
        if unseen := [name for name in names.tolist() if name not in classes]:
            raise ValueError(
                f"{images.name} ({images.split}) has images of the class {unseen[0]}, which the "
                f"training did not see: its classes are {', '.join(classes)}"
            )
        place = np.array([classes.index(name) for name in names.tolist()], np.int32)
        found: np.ndarray = place[numbers]
        return found

    def refuse_classes(self, mode: str) -> None:
        """Raise a ValueError if the model has classes, which ``mode`` does not know."""
        if self.adapter.classes:
            raise ValueError(
                f"--mode={mode} with model.classes={self.adapter.classes}: this mode is for models "
                "without classes"
            )

    def parameter_count(self) -> int:
        """The number of the network's parameters."""
        shapes = jax.eval_shape(lambda k: self.adapter.init(k, self.shape), jax.random.key(0))
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))

    def init_state(self) -> TrainState:
        """The state before the first step; ``sharding.initial_state`` compiles this and places the
        result on the devices."""
        training = self.config.training
        statistics = jnp.zeros((2, training.proposal_bins)) if training.proposal_bins else ()
        key = stream(jax.random.key(self.config.seed), "parameters")
        params = self.adapter.init(key, self.shape)
        if self.config.sde.learned:
            numbers = {name: jnp.asarray(v, float) for name, v in vars(self.sde).items()}
            params = {**params, SDE_NUMBERS: numbers}
        return TrainState.create(params, self.optimizer, statistics)

    def trained_score(self, params: Any) -> tuple[Score, Any]:
        """The score in the training loss, and the process that noises the images.

        With ``sde.learned`` the numbers of the SDE are scalars among the parameters,

            params = {**parameters of the network, "sde": {"gamma_0": (), "gamma_1": ()}},

        and the gradient of the bound trains them too (Kingma, Salimans, Poole, Ho, "Variational
        Diffusion Models", 2021, section 5.1). Their averages are kept as those of the network are.
        """
        if not self.config.sde.learned:
            return self.trained_adapter(params), self.trained_kernel
        sde = dataclasses.replace(self.sde, **params[SDE_NUMBERS])
        return dataclasses.replace(self.adapter, sde=sde)(params), sde

    def with_learned_schedule(self, params: Any) -> "Experiment":
        """This experiment with the SDE whose numbers are in ``params``, if its SDE is learned."""
        if SDE_NUMBERS not in params:
            return self
        learned = {n: float(sharding.to_host(v)) for n, v in params[SDE_NUMBERS].items()}
        return self._with(sde=self.config.sde.replace(**learned))

    def for_validation(self) -> "Experiment":
        """This experiment with the evaluation settings of a validation during a training."""
        changed = {
            "split": data.VALIDATION,
            "max_images": self.config.training.validation_images,
            # A density from a pilot would give each point other times.
            "bound": self.config.eval.bound.replace(target_se=0.0, proposal_bins=0),
        }
        return self._with(eval=self.config.eval.replace(**changed))

    def with_dequantization_of(self, restored: Restored) -> "Experiment":
        """This experiment with the dequantization of the data on which ``restored`` was trained."""
        trained_on = restored.metadata["config"]["data"]["dequantization"]
        if trained_on == self.config.data.dequantization:
            return self
        return self._with(data=self.config.data.replace(dequantization=trained_on))

    def _with(self, **sections: Any) -> "Experiment":
        """This experiment with other sections, but with its smallest time of training, on which
        labels of the time depend."""
        training = self.config.training.replace(smallest_time=self.eps)
        changed = Experiment(self.config.replace(training=training, **sections))
        changed._images = self._images
        return changed

    def init_dequantizer(self, images: data.ImageSet) -> TrainState:
        """The dequantizer's state before the first step. Its data-dependent initialisation uses a
        batch that is spread evenly over ``images``."""
        size = self.config.dequantizer.training.batch_size
        pixels = images.images[data.spread(len(images), size)]
        key = stream(jax.random.key(self.config.seed), "dequantizer parameters")
        params = self.trained_dequantizer.init(key, jnp.asarray(pixels))
        return TrainState.create(params, self.dequantizer_optimizer)

    def restore(self, workdir: epath.PathLike) -> Restored:
        """The newest undamaged checkpoint of ``workdir``, for evaluation or sampling.

        Settings that only affect the training may differ from those of the checkpoint; settings
        that affect the score may not.
        """
        missing = "no checkpoint in {}: train first (--mode=train), or name the run's --workdir"
        with self.config.training.checkpoints(workdir) as checkpoints:
            return checkpoints.require(self._template(), missing)

    def restore_each(self, workdir: epath.PathLike) -> Iterator[Restored]:
        """The state before the first step, and all undamaged checkpoints of ``workdir`` by their
        steps, as :meth:`restore` reads one."""
        yield Restored(0, self.init_state(), {})
        with self.config.training.checkpoints(workdir) as checkpoints:
            yield from checkpoints.each(self._template())

    def _template(self) -> Callable[[dict], TrainState]:
        mesh = sharding.data_mesh()
        # Errors in ``template`` are reported as damaged files. An error in the config is not one.
        expected = sharding.abstract(self.init_state, mesh)

        def template(metadata: dict) -> TrainState:
            compatibility.check_score(self.config, metadata)
            bins = metadata["config"]["training"]["proposal_bins"]
            placement = sharding.replicated(mesh)
            statistics = jax.ShapeDtypeStruct((2, bins), jnp.float32, sharding=placement)
            optimizer = self.config.optim.replace(name=metadata["config"]["optim"]["name"])
            init = functools.partial(optimizer.transformation(1, 1.0).init, expected.params)
            return expected.replace(
                statistics=statistics if bins else (), opt_state=sharding.abstract(init, mesh)
            )

        return template

    def restore_dequantizer(self, workdir: epath.PathLike, images: data.ImageSet) -> Restored:
        """The newest undamaged checkpoint of the dequantizer trained in ``workdir``."""
        expected = sharding.abstract(lambda: self.init_dequantizer(images), sharding.data_mesh())

        def template(metadata: dict) -> TrainState:
            compatibility.check_dequantizer(self.config, metadata)
            return expected

        missing = "no dequantizer in {}: train it first (--mode=train_dequantizer)"
        with self.config.dequantizer.training.checkpoints(workdir) as checkpoints:
            return checkpoints.require(template, missing)

    def provenance(self, examples: data.Examples) -> dict:
        """The origin of a checkpoint, stored as its metadata: config, training data, versions, and
        the names of the classes of a model with classes."""
        classes = examples.classes if self.adapter.classes else ()
        return {
            "config": self.config.plain(),
            "smallest_time": self.eps,
            "data": examples.fingerprint,
            "versions": versions(),
            **({"classes": [*classes]} if classes else {}),
        }
