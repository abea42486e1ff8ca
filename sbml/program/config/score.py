"""The definition of the score: ``config.sde``, ``config.model`` and ``config.score``.

    score(x_t, t) = -e(x_t, t) / sigma(t)

The section ``sde`` gives sigma, ``model`` the network, and ``score`` how the noise prediction e is
computed from the network's output. The parameters of a checkpoint have a meaning only together with
these three sections.
"""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import jax.numpy as jnp
from annotated_types import Ge, Le
from flax import linen as nn

from sbml.core.types import Json
from sbml.networks import NETWORKS
from sbml.program.config.data import Data
from sbml.program.config.fields import Chosen, Section, among, field, refusal
from sbml.score import LABELS, LEVELS, PARAMETERIZATIONS, Adapter, integers
from sbml.sdes import SDE, SDES, Rescaled

LogSNR = Annotated[float, Ge(-60), Le(60)]

# Fields of networks whose value "fourier" takes log(label), and the value to use instead.
NOT_LOGARITHMIC = {"embedding_type": "fourier_linear", "time_embedding_type": "positional"}


class Process(Chosen):
    """The forward process: its name, and the numbers of its class, such as ``beta_max`` for vp and
    subvp, ``sigma_max`` for ve, or ``gamma_0`` for linear_gamma (``sbml.sdes``).

    A number of another SDE of this package is ignored if it has the default of that SDE, so that a
    config can change the name alone.
    """

    section: ClassVar[str] = "sde"
    parts: ClassVar[Mapping[str, Any]] = SDES

    name: Annotated[str, among(SDES)] = field("vp", "the SDE")
    learned: bool = field(
        False,
        "train the SDE's numbers too, by the gradient of the bound with the categorical decoder; "
        "the numbers of the config are then their initial values",
    )
    data_scale: float = field(
        1.0,
        "the network's data are data_scale x + data_shift, where x are those of this package; "
        "256/255 for a model of images 2 k / 255 - 1",
        gt=0,
        le=1e3,
    )
    data_shift: float = field(0.0, "see data_scale", ge=0, le=1e3)

    @classmethod
    def relevant(cls, own: Json, made: type[Section]) -> Json:
        kinds = map(SDES.__getitem__, SDES)
        usual = [(number.name, number.default) for k in kinds for number in dataclasses.fields(k)]
        fits = made.model_fields.__contains__
        return {name: v for name, v in own.items() if fits(name) or (name, v) not in usual}

    def check(self) -> None:
        """Check the numbers, and that the SDE of a model of other units is not learned."""
        self.build()
        if self.learned and self.rescaled:
            raise ValueError(
                f"sde.learned with sde.data_scale={self.data_scale:g}, sde.data_shift="
                f"{self.data_shift:g}: set --config.sde.data_scale=1 --config.sde.data_shift=0"
            )

    @property
    def rescaled(self) -> bool:
        """Whether the network's data have other units than those of this package."""
        return (self.data_scale, self.data_shift) != (1.0, 0.0)

    def build(self) -> SDE:
        """The SDE of the data of this package."""
        sde: SDE = super().build()
        return Rescaled(sde, self.data_scale, self.data_shift) if self.rescaled else sde


class Network(Chosen):
    """The network: its name, and the fields of its class, which explains them."""

    section: ClassVar[str] = "model"
    parts: ClassVar[Mapping[str, Any]] = NETWORKS
    # flax sets ``parent`` and ``name`` of every Linen module; ``Score.adapter`` sets ``outputs``.
    skip: ClassVar[tuple[str, ...]] = ("parent", "name", "outputs")

    name: Annotated[str, among(NETWORKS)] = field("ncsnpp", "the network")

    def check(self) -> None:
        """Check the ranges of the fields."""
        self.build()


class Score(Section):
    """How the network's output becomes a score; see ``sbml.score``."""

    section: ClassVar[str] = "score"

    parameterization: Annotated[str, among(PARAMETERIZATIONS)] = field(
        "noise", "what the network predicts"
    )
    label: Annotated[str, among(LABELS)] = field(
        "time", "the number that tells the network the time (sbml.score)"
    )
    time_scale: float = field(999.0, "the label ``time`` is this number times t", gt=0, le=1e6)
    data_std: float = field(
        0.5,
        "standard deviation of the network's data, at most 1 for data in [-1, 1]; it scales its "
        "input for ``preconditioned``, ``x0``, ``velocity`` and ``levels``",
        gt=0,
        le=1,
    )
    log_snr_range: tuple[LogSNR, LogSNR] = field(
        (-5.0, 13.3), "log-SNRs low,high at which the label scaled_log_snr is 1000 and 0"
    )

    def check(self) -> None:
        """Check that the range of log-SNRs has its lower end first."""
        if not self.log_snr_range[0] < self.log_snr_range[1]:
            raise refusal(self.name_of("log_snr_range"), self.log_snr_range, "the lower end first")

    def adapter(self, network: nn.Module, sde: SDE, eps: float, data: Data) -> Adapter:
        """The adapter that makes a score of ``network`` and its parameters; ``eps`` is the smallest
        time of training."""
        if self.parameterization == LEVELS:
            network = network.clone(outputs=integers.outputs(data.levels))
        adapter = Adapter(network, sde, eps=eps, levels=data.levels, data=data.kind, **dict(self))
        # Labels increase with the time, so the first is the smallest.
        first = float(adapter.time_label(jnp.asarray([eps]))[0])
        for embedding, other in NOT_LOGARITHMIC.items():
            if getattr(network, embedding, "") == "fourier" and not first > 0:
                raise ValueError(
                    f"model.{embedding}=fourier takes the logarithm of score.label={self.label}, "
                    f"which is {first:g} at the smallest time: train with "
                    f"--config.model.{embedding}={other} or --config.score.label=sigma"
                )
        return adapter
