"""The whole config: as users write it, and as the program reads it.

Users have a ``ConfigDict``: a config file calls :func:`default` and sets what differs, the command
line overrides fields by ``--config.optim.lr=1e-4``. The program has a :class:`Config`, which is
frozen and checked. Its sections explain every field, with its default and range, each in a file of
its own beside this one. Fields hold plain values only; objects are made of them in ``build``.
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any, Self

from ml_collections import ConfigDict, config_dict

from sbml import data
from sbml.adapters import LEVELS
from sbml.experiment.data import Data
from sbml.experiment.dequantizer import Dequantizer
from sbml.experiment.evaluation import Eval
from sbml.experiment.fields import Section, choices_in, integer, names, plain
from sbml.experiment.latents import Latents
from sbml.experiment.optim import Optim
from sbml.experiment.sampling import Sampling
from sbml.experiment.score import Network, Process, Score
from sbml.experiment.training import Training


@dataclasses.dataclass(frozen=True)
class Config(Section):
    """The paper's CIFAR-10 settings for VP with likelihood weighting and importance sampling.

    Raises:
      ValueError: naming a field, its value and what it may be.
    """

    seed: int = integer(0, below=2**32)
    mode: tuple[str, ...] = names(("train",))  # any of --mode's, in order
    data: Data = Data()
    sde: Process = Process()
    model: Network = Network.default("ncsnpp")
    score: Score = Score()
    training: Training = Training()
    optim: Optim = Optim()
    eval: Eval = Eval()
    dequantizer: Dequantizer = Dequantizer()
    sampling: Sampling = Sampling()
    latents: Latents = Latents()

    def check(self) -> None:
        """What is evaluated is held out, and a learned decoder has been learned."""
        if self.eval.split == data.VALIDATION and not self.data.validation:
            raise ValueError(data.NO_VALIDATION.format(f"eval.split={self.eval.split}"))
        trained = self.score.parameterization, self.data.dequantization
        if "learned" in choices_in(self.eval.dequantizers) and trained != (LEVELS, "centre"):
            raise ValueError(
                "eval.dequantizers=learned with score.parameterization={}, data.dequantization={}: "
                "only an integer denoiser of bin centres has a learned decoder; set "
                "--config.score.parameterization=levels --config.data.dequantization=centre, or "
                "choose other dequantizers".format(*trained)
            )

    @classmethod
    def read(cls, config: ConfigDict) -> Self:
        """What ``config`` says, checked.

        Raises:
          ValueError: naming a field that is wrong, unknown or missing.
        """
        return cls.of(config.to_dict())

    def plain(self) -> dict[str, Any]:
        """As plain JSON values."""
        return plain(self)


def default(network: str = "ncsnpp") -> ConfigDict:
    """The defaults of :class:`Config`, with network ``network`` and its own, to be changed."""
    return ConfigDict(_editable(Config(model=Network.default(network)))).lock()


def _editable(section: Section) -> dict[str, Any]:
    """The fields of ``section``; one that may be left open knows its type."""
    fields = section.to_dict()
    for field in dataclasses.fields(section):
        if field.name in fields and fields[field.name] is None:
            fields[field.name] = config_dict.placeholder(field.metadata["rule"].kind)
    return {k: _editable(v) if isinstance(v, Section) else v for k, v in fields.items()}


def check_overrides(config: ConfigDict, arguments: Sequence[str]) -> None:
    """Refuse ``--config.a.b=value`` for a field that ``config`` does not have.

    Raises:
      ValueError: naming the field and those there are beside it.
    """
    for name in re.findall(r"^--?config\.([\w.]+)", "\n".join(arguments), re.MULTILINE):
        node, known = config, "config"
        for part in name.split("."):
            if not isinstance(node, ConfigDict) or part not in node:
                fields = sorted(node) if isinstance(node, ConfigDict) else []
                raise ValueError(
                    f"unknown field config.{name}: {known} has {', '.join(fields) or 'no fields'}"
                )
            node, known = node[part], f"{known}.{part}"


def small_dequantizer(config: ConfigDict, *, num_steps: int) -> None:
    """Give ``config`` a Flow++ that a CPU trains in minutes."""
    config.dequantizer.model.update(filters=32, components=8, blocks=1)
    config.dequantizer.training.update(
        batch_size=64, num_steps=num_steps, log_every=20, checkpoint_every=num_steps // 2
    )
    nats = float(math.prod(config.data.shape))  # Clips at 1 in nats/dim.
    config.dequantizer.optim.update(lr=2e-3, warmup=50, grad_clip=nats)
