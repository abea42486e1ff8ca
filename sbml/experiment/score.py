"""The definition of the score: ``config.sde``, ``config.model`` and ``config.score``.

    score(x_t, t) = -e(x_t, t) / sigma(t)

The section ``sde`` gives sigma, ``model`` the network, and ``score`` how the noise prediction e is
computed from the network's output. The parameters of a checkpoint have a meaning only together with
these three sections.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import jax.numpy as jnp
from flax import linen as nn

from sbml import integers, networks
from sbml.experiment.data import Data
from sbml.experiment.fields import (
    Section,
    as_tuples,
    check_choice,
    check_fields,
    check_owned,
    choice,
    flag,
    real,
    reals,
    refusal,
    section_errors,
)
from sbml.score import LABELS, LEVELS, PARAMETERIZATIONS, Adapter
from sbml.sdes import SDE, SDES


@dataclasses.dataclass(frozen=True)
class Process(Section):
    """The forward process. Each SDE reads only the fields that it has; see ``sbml.sdes``.

    The upper limits keep all numbers of the SDE far from the limits of float32: with
    beta_max = 1000 the log-SNR at T is -500, and with sigma_max = 1e6 the noise is a million times
    as wide as the data.

    Raises:
      ValueError: for a field outside its range; the message names the field, its value and the
        range.
    """

    section: ClassVar[str] = "sde"

    name: str = choice("vp", SDES)
    beta_min: float = real(0.1, above=0, most=1000)  # the rate beta(t) at t = 0; vp, subvp
    beta_max: float = real(20.0, above=0, most=1000)  # the same at t = T; vp, subvp
    # smallest standard deviation of the noise, for data in [-1, 1]; ve
    sigma_min: float = real(0.01, above=0, most=1e6)
    sigma_max: float = real(50.0, above=0, most=1e6)  # the largest; ve, linear_ve
    gamma_0: float = real(-13.3, least=-60, most=60)  # -log SNR at t = 0; linear_gamma
    gamma_1: float = real(5.0, least=-60, most=60)  # the same at t = T; linear_gamma
    # whether the SDE's numbers are trained too, by the gradient of the bound with the categorical
    # decoder; the numbers above are their initial values
    learned: bool = flag(False)

    def build(self) -> SDE:
        """The SDE ``name``, from those fields that its class has.

        Raises:
          ValueError: if they contradict each other, such as a beta_min above beta_max.
        """
        kind = SDES[self.name]
        with section_errors(self.section):
            return kind(**{f.name: getattr(self, f.name) for f in dataclasses.fields(kind)})


def model_fields(name: str) -> dict[str, Any]:
    """The fields of network ``name`` with their defaults, as plain values."""
    # flax sets ``parent`` and ``name`` of every Linen module; ``Score.adapter`` sets ``outputs``.
    skip = ("parent", "name", "outputs")
    return {f.name: f.default for f in dataclasses.fields(networks.get(name)) if f.name not in skip}


@dataclasses.dataclass(frozen=True)
class Network(Section):
    """``config.model``: the name of a network, and the fields of its class, which explains them.

    Here it is only checked that all fields are present, have the right types, and are finite and
    not absurdly large (``fields.check_owned``). The class checks their ranges when the network is
    built.

    Raises:
      ValueError: for an unknown network, or for a field that is unknown, missing, or of a wrong
        type or size.
    """

    section: ClassVar[str] = "model"

    name: str
    values: Mapping[str, Any]

    def check(self) -> None:
        """Check that the fields are those of the network."""
        check_choice(self.name_of("name"), self.name, networks.NETWORKS)
        check_fields(self.section, self.values, model_fields(self.name), f"default({self.name!r})")
        check_owned(self.section, self.values, networks.get(self.name))

    @classmethod
    def default(cls, name: str) -> Self:
        """Network ``name`` with its own defaults."""
        return cls(name, model_fields(name))

    @classmethod
    def of(cls, values: Mapping[str, Any], *, complete: bool = True) -> Self:
        """The section from one mapping of ``name`` and the network's fields.

        ``complete`` has no effect here: ``check`` refuses a missing field in any case.
        """
        fields = {field: as_tuples(value) for field, value in values.items() if field != "name"}
        return cls(values.get("name", ""), fields)

    def to_dict(self) -> dict[str, Any]:
        """One mapping of ``name`` and the network's fields."""
        return {"name": self.name, **self.values}

    def build(self) -> nn.Module:
        """The network.

        Raises:
          ValueError: for a field outside its range.
        """
        with section_errors(self.section):
            return networks.get(self.name)(**self.values)


@dataclasses.dataclass(frozen=True)
class Score(Section):
    """How the network's output becomes a score; see ``sbml.score``.

    Raises:
      ValueError: for a field outside its range; the message names the field, its value and the
        range.
    """

    section: ClassVar[str] = "score"

    parameterization: str = choice("noise", PARAMETERIZATIONS)
    # the number that tells the network the time; ``time`` is 999 t
    label: str = choice("time", LABELS)
    # standard deviation of the data, at most 1 for data in [-1, 1]; it scales the network's input
    # for ``preconditioned``, ``x0``, ``velocity`` and ``levels``
    data_std: float = real(0.5, above=0, most=1)
    # log-SNRs at which the label scaled_log_snr is 1000 and 0
    log_snr_range: tuple[float, ...] = reals((-5.0, 13.3), least=-60, most=60, each="low,high")

    def check(self) -> None:
        """Check that the range of log-SNRs has its lower end first."""
        if not self.log_snr_range[0] < self.log_snr_range[1]:
            raise refusal(self.name_of("log_snr_range"), self.log_snr_range, "the lower end first")

    def adapter(self, network: nn.Module, sde: SDE, eps: float, data: Data) -> Adapter:
        """The adapter that makes a score of ``network`` and its parameters.

        Args:
          network: the network that ``config.model`` describes.
          sde: the forward process.
          eps: the smallest time of training.
          data: ``config.data``, for the number of levels and the dequantization.

        Raises:
          ValueError: the network embeds the logarithm of a label that is not positive at ``eps``.
        """
        if self.parameterization == LEVELS:
            network = network.clone(outputs=integers.outputs(data.levels))
        adapter = Adapter(
            network,
            sde,
            parameterization=self.parameterization,
            label=self.label,
            data_std=self.data_std,
            eps=eps,
            log_snr_range=(self.log_snr_range[0], self.log_snr_range[1]),
            levels=data.levels,
            data=data.kind,
        )
        if getattr(network, "embedding_type", "") == "fourier":
            self._check_positive(adapter)
        return adapter

    def _check_positive(self, adapter: Adapter) -> None:
        """Check that all labels have a logarithm. They increase with the time, so the first is the
        smallest."""
        first = float(adapter.time_label(jnp.asarray([adapter.eps]))[0])
        if not first > 0:
            raise ValueError(
                f"model.embedding_type=fourier takes the logarithm of score.label={self.label}, "
                f"which is {first:g} at the smallest time: train with "
                "--config.model.embedding_type=fourier_linear or --config.score.label=sigma"
            )
