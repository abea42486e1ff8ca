"""``config.optim`` and ``config.dequantizer.optim``: the paper's Adam."""

from typing import Annotated, ClassVar

import optax
from absl import logging

from sbml.experiment.fields import Natural, Section, among, field
from sbml.runtime import optim

# The program warns if the initial parameters weigh more than this in the averaged ones.
MOST_INITIAL = 0.2


class Optim(Section):
    """The optimizer of the score, and the average of its parameters.

    Adam changes each parameter by about the learning rate in a step, so rates above 1 are of no use
    and not allowed.
    """

    section: ClassVar[str] = "optim"

    lr: float = field(2e-4, "largest learning rate", gt=0, le=1)
    warmup: Natural = field(5_000, "number of steps in which the rate rises from 0 to lr")
    schedule: Annotated[str, among(optim.SCHEDULES)] = field(
        "constant", "the learning rate after the warm-up; cosine: it falls to zero at num_steps"
    )
    beta1: float = field(0.9, "decay of the gradient's average per step", ge=0, lt=1)
    beta2: float = field(0.999, "decay of the squared gradient's average per step", ge=0, lt=1)
    eps: float = field(1e-8, "added to the root of the second moment", ge=1e-30, le=1)
    weight_decay: float = field(
        0.0,
        "decoupled: each step subtracts rate * weight_decay * parameter; 0: off",
        ge=0,
        le=10,
    )
    grad_clip: float = field(
        1.0,
        "largest global norm of the gradient of the paper's loss, which is a mean over the "
        "dimensions of an image for the score, and a sum for the dequantizer; 0: off",
        ge=0,
        le=1e9,
    )
    ema: float = field(0.9999, "decay of the parameters' average per step", ge=0, lt=1)

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


class DequantizerOptim(Optim):
    """The optimizer of the dequantizer, with a faster average than the score's."""

    section: ClassVar[str] = "dequantizer.optim"

    ema: float = field(0.99, "decay of the parameters' average per step", ge=0, lt=1)
