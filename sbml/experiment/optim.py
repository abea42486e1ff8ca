"""``config.optim`` and ``config.dequantizer.optim``: the paper's Adam."""

import dataclasses
from typing import ClassVar

import optax
from absl import logging

from sbml.experiment.fields import Section, choice, integer, real
from sbml.runtime import optim

# The largest weight of the initial parameters in the average without a warning.
MOST_INITIAL = 0.2


@dataclasses.dataclass(frozen=True)
class Optim(Section):
    """The optimizer of the score, and the average of its parameters.

    Adam changes each parameter by about the learning rate in a step, so rates above 1 are of no use
    and not allowed.

    Raises:
      ValueError: a field is invalid; the message gives its name, value and range.
    """

    section: ClassVar[str] = "optim"

    lr: float = real(2e-4, above=0, most=1)  # largest learning rate
    warmup: int = integer(5_000)  # number of steps in which the rate rises from 0 to lr
    schedule: str = choice("constant", optim.SCHEDULES)  # cosine: falls to zero at num_steps
    beta1: float = real(0.9, least=0, below=1)
    beta2: float = real(0.999, least=0, below=1)
    eps: float = real(1e-8, least=1e-30, most=1)  # added to the root of the second moment
    # Decoupled: each step subtracts rate * weight_decay * parameter. 0: off.
    weight_decay: float = real(0.0, least=0, most=10)
    # Largest global norm of the gradient of the paper's loss, which is a mean over the dimensions
    # of an image for the score, and a sum for the dequantizer. 0: off.
    grad_clip: float = real(1.0, least=0, most=1e9)
    ema: float = real(0.9999, least=0, below=1)  # decay of the parameters' average per step

    def warn_if_short(self, num_steps: int) -> None:
        """Log warnings if a run of ``num_steps`` does not fit the warm-up or the average."""
        if num_steps <= self.warmup:
            logging.warning(
                "%s.warmup=%d in a run of %d steps: the learning rate only rises, to %g; set "
                "--config.%s.warmup=%d",
                *(self.section, self.warmup, num_steps, self.lr * num_steps / self.warmup),
                *(self.section, num_steps // 10),
            )
        if (initial := self.ema**num_steps) > MOST_INITIAL:
            logging.warning(
                "%s.ema=%g in a run of %d steps: initial values have a weight of %.0f%% in the "
                "averaged parameters, which are evaluated and sampled; set --config.%s.ema=%.7g",
                *(self.section, self.ema, num_steps, 100 * initial),
                *(self.section, max(0.0, 1 - 6.5 / num_steps)),
            )

    def transformation(self, num_steps: int, unit: float) -> optax.GradientTransformation:
        """The optimizer of a run of ``num_steps``.

        ``unit`` is the value of the loss here when the paper's loss is 1. The norm is clipped at
        ``grad_clip * unit``, which equals clipping the paper's gradient at ``grad_clip``.
        """
        return optim.adam(
            optim.learning_rate(self.lr, self.warmup, self.schedule, num_steps),
            beta1=self.beta1,
            beta2=self.beta2,
            eps=self.eps,
            weight_decay=self.weight_decay,
            grad_clip=self.grad_clip * unit,
        )


@dataclasses.dataclass(frozen=True)
class DequantizerOptim(Optim):
    """The optimizer of the dequantizer, with a faster average than the score's."""

    section: ClassVar[str] = "dequantizer.optim"

    ema: float = real(0.99, least=0, below=1)  # decay of the parameters' average per step
