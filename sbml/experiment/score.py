"""What a score is: ``config.sde``, ``config.model`` and ``config.score``.

These three are what a checkpoint's parameters have a meaning under.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from flax import linen as nn

from sbml import adapters, integers, networks
from sbml.adapters import Adapter
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
from sbml.sdes import SDE, SDES


@dataclasses.dataclass(frozen=True)
class Process(Section):
    """The forward process. An SDE reads the fields that it has, and checks their lower ends.

    The upper ends keep what the SDE computes far from float32's limits: beta_max = 1000 already
    means log-SNRs of -500 at T, and sigma_max = 1e6 noise a million times as wide as the data.

    Raises:
      ValueError: naming a field, its value and what it may be.
    """

    section: ClassVar[str] = "sde"

    name: str = choice("vp", SDES)
    beta_min: float = real(0.1, above=0, most=1000)  # the rate of noise at t = 0; vp, subvp
    beta_max: float = real(20.0, above=0, most=1000)  # the same at t = T; vp, subvp
    # smallest standard deviation of the noise, for data in [-1, 1]; ve
    sigma_min: float = real(0.01, above=0, most=1e6)
    sigma_max: float = real(50.0, above=0, most=1e6)  # the largest; ve, linear_ve
    gamma_0: float = real(-13.3, least=-60, most=60)  # -log SNR at t = 0; linear_gamma
    gamma_1: float = real(5.0, least=-60, most=60)  # the same at t = T; linear_gamma
    # the SDE's numbers are trained, from these on, through the bound with the categorical decoder
    learned: bool = flag(False)

    def build(self) -> SDE:
        """The SDE, from those fields that it has.

        Raises:
          ValueError: where they do not go together.
        """
        kind = SDES[self.name]
        with section_errors(self.section):
            return kind(**{f.name: getattr(self, f.name) for f in dataclasses.fields(kind)})


def model_fields(name: str) -> dict[str, Any]:
    """The fields of network ``name`` with their defaults, as plain values."""
    # flax sets the first two of every Linen module, the score's parameterization the third.
    skip = ("parent", "name", "outputs")
    return {f.name: f.default for f in dataclasses.fields(networks.get(name)) if f.name not in skip}


@dataclasses.dataclass(frozen=True)
class Network(Section):
    """``config.model``: a network's name beside its own fields, which its class explains.

    The class checks them when the network is built; here they need to be there, of their types,
    and neither infinite nor beyond all use (``fields.check_owned``).

    Raises:
      ValueError: an unknown network; an unknown or missing field, or one that cannot be.
    """

    section: ClassVar[str] = "model"

    name: str
    values: Mapping[str, Any]

    def check(self) -> None:
        """The fields are those of the network."""
        check_choice(self.name_of("name"), self.name, networks.NETWORKS)
        check_fields(self.section, self.values, model_fields(self.name))
        check_owned(self.section, self.values, networks.get(self.name))

    @classmethod
    def default(cls, name: str) -> Self:
        """Network ``name`` with its own defaults."""
        return cls(name, model_fields(name))

    @classmethod
    def of(cls, values: Mapping[str, Any], *, complete: bool = True) -> Self:
        """Of the name and the network's fields side by side; they are always complete."""
        fields = {field: as_tuples(value) for field, value in values.items() if field != "name"}
        return cls(values.get("name", ""), fields)

    def to_dict(self) -> dict[str, Any]:
        """The name and the network's fields side by side."""
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
    """How the network's output becomes a score; see ``sbml.adapters``.

    Raises:
      ValueError: naming a field, its value and what it may be.
    """

    section: ClassVar[str] = "score"

    parameterization: str = choice("noise", adapters.PARAMETERIZATIONS)
    label: str = choice("time", adapters.LABELS)  # what tells the network the time; time: 999 t
    # standard deviation of the data, for preconditioned; of data in [-1, 1] it is at most 1
    data_std: float = real(0.5, above=0, most=1)
    # log-SNRs at which the label scaled_log_snr is 1000 and 0
    log_snr_range: tuple[float, ...] = reals((-5.0, 13.3), least=-60, most=60, each="low,high")

    def check(self) -> None:
        """The range of log-SNRs has two ends."""
        if not self.log_snr_range[0] < self.log_snr_range[1]:
            raise refusal(self.name_of("log_snr_range"), self.log_snr_range, "the lower end first")

    def adapter(self, network: nn.Module, sde: SDE, eps: float, data: Data) -> Adapter:
        """From parameters of ``network`` to a score of ``data`` under ``sde``, from ``eps`` on."""
        if self.parameterization == adapters.LEVELS:
            network = network.clone(outputs=integers.outputs(data.levels))
        return Adapter(
            network,
            sde,
            parameterization=self.parameterization,
            label=self.label,
            data_std=self.data_std,
            eps=eps,
            log_snr_range=(self.log_snr_range[0], self.log_snr_range[1]),
            levels=data.levels,
            data="centre" if data.dequantization == "centre" else "uniform",
        )
