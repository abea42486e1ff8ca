"""The whole config: a ``ConfigDict`` that users change, and a ``Config`` that the program reads.

A config file calls :func:`default` and sets the fields that differ. The command line overrides
fields, as in ``--config.optim.lr=1e-4``. From the resulting ``ConfigDict`` the program makes a
:class:`Config`, which is frozen and checked. Each of its sections has a file beside this one, which
explains the fields with their defaults and ranges. Fields hold plain values only; ``build`` makes
objects from them.
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any, Self

from ml_collections import ConfigDict, config_dict

from sbml import data, dequantizers
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
    """All settings of a run. The defaults are the paper's for CIFAR-10 and the SDE VP, with
    likelihood weighting and importance sampling.

    Raises:
      ValueError: a field is invalid; the message gives its name, value and range.
    """

    seed: int = integer(0, below=2**32)  # seed of training
    mode: tuple[str, ...] = names(("train",))  # modes to run, in order, without the flag --mode
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
        """Check that the split to evaluate exists, and that the dequantizers of the evaluation can
        be trained with this config and fit the images."""
        if self.eval.split == data.VALIDATION and not self.data.validation:
            raise ValueError(data.NO_VALIDATION.format(f"eval.split={self.eval.split}"))
        for name in choices_in(self.eval.dequantizers):
            kind = dequantizers.DEQUANTIZERS.get(name)
            if kind and dequantizers.is_trained(kind) and name != self.dequantizer.name:
                raise ValueError(
                    f"eval.dequantizers={name}, but the dequantizer that is trained is "
                    f"dequantizer.name={self.dequantizer.name}: begin the config with "
                    f"sbml.experiment.config.default({self.model.name!r}, dequantizer={name!r})"
                )
            self.check_dequantizer("eval.dequantizers", name)

    def check_dequantizer(self, field: str, name: str) -> None:
        """Check that the dequantizer ``name``, the value of ``field``, fits images and score.

        Raises:
          ValueError: it does not.
        """
        kind = dequantizers.DEQUANTIZERS.get(name)
        settings = self.data.shape, self.score.parameterization, self.data.dequantization
        if kind and (reason := dequantizers.misfit(kind, *settings)):
            raise ValueError(f"{field}={name} with {reason}")

    @classmethod
    def read(cls, config: ConfigDict) -> Self:
        """The checked config with the fields of ``config``.

        Raises:
          ValueError: a field is invalid, unknown or missing; the message names it.
        """
        return cls.of(config.to_dict())

    def plain(self) -> dict[str, Any]:
        """The config as plain JSON values."""
        return plain(self)


def default(network: str = "ncsnpp", dequantizer: str = "variational") -> ConfigDict:
    """A config for users to change: the defaults of :class:`Config`, of the network called
    ``network``, and of the dequantizer to train called ``dequantizer``.

    Raises:
      ValueError: there is no such network or dequantizer.
    """
    config = Config(model=Network.default(network), dequantizer=Dequantizer.default(dequantizer))
    return ConfigDict(_editable(config)).lock()


def _editable(section: Section) -> dict[str, Any]:
    """The fields of ``section``; a field whose default is None is a placeholder of its type."""
    fields = section.to_dict()
    for field in dataclasses.fields(section):
        if field.name in fields and fields[field.name] is None:
            fields[field.name] = config_dict.placeholder(field.metadata["rule"].kind)
    return {k: _editable(v) if isinstance(v, Section) else v for k, v in fields.items()}


def check_overrides(config: ConfigDict, arguments: Sequence[str]) -> None:
    """Check that ``config`` has every field that is set by ``--config.a.b=value``.

    Raises:
      ValueError: it lacks one; the message names the field and the fields of its section.
    """
    for name in re.findall(r"^--?(?:no)?config\.([^=\n]*)", "\n".join(arguments), re.MULTILINE):
        node, section = config, "config"
        for part in name.split("."):
            if not isinstance(node, ConfigDict) or part not in node:
                fields = sorted(node) if isinstance(node, ConfigDict) else []
                raise ValueError(
                    f"unknown field config.{name}: {section} has {', '.join(fields) or 'no fields'}"
                )
            node, section = node[part], f"{section}.{part}"


def fields_set_to_none(arguments: Sequence[str]) -> dict[str, str]:
    """The arguments ``--config.a.b=None`` for fields whose default is None, and their fields.

    A ConfigDict would take the word None for text, or would try to make a number of it.
    """
    found = {}
    for argument in arguments:
        if match := re.fullmatch(r"--?config\.([\w.]+)=None", argument):
            node: Any = Config()
            for part in match[1].split("."):
                node = getattr(node, part, "")
            if node is None:
                found[argument] = match[1]
    return found


def small_dequantizer(config: ConfigDict, *, num_steps: int) -> None:
    """Set a Flow++ dequantizer in ``config`` that a CPU trains in minutes."""
    config.dequantizer.model.update(filters=32, components=8, blocks=1)
    config.dequantizer.training.update(
        batch_size=64, num_steps=num_steps, log_every=20, checkpoint_every=num_steps // 2
    )
    # The unit of grad_clip is nats, so this clips the gradient of the loss in nats/dim at 1.
    grad_clip = float(math.prod(config.data.shape))
    config.dequantizer.optim.update(lr=2e-3, warmup=50, grad_clip=grad_clip)
