"""``config.optim`` and ``config.dequantizer.optim``: the paper's Adam."""

import dataclasses
from typing import ClassVar

import optax

from sbml.experiment.fields import Section, choice, integer, real
from sbml.runtime import optim


@dataclasses.dataclass(frozen=True)
class Optim(Section):
    """The optimizer of the score, and the average of its parameters.

    An update of Adam is about as large as the learning rate, for each parameter: of rates above 1
    nothing can be learned.

    Raises:
      ValueError: naming a field, its value and what it may be.
    """

    section: ClassVar[str] = "optim"

    lr: float = real(2e-4, above=0, most=1)  # largest learning rate
    warmup: int = integer(5_000)  # steps in which the rate rises from 0
    schedule: str = choice("constant", optim.SCHEDULES)  # or cosine, to zero at num_steps
    beta1: float = real(0.9, least=0, below=1)
    beta2: float = real(0.999, least=0, below=1)
    eps: float = real(1e-8, above=0, most=1)  # beside the root of the second moment
    weight_decay: float = real(0.0, least=0, most=10)  # decoupled: times the rate, a step; 0: off
    # global norm, in the unit of the paper's loss, a sum over the image; 0: off
    grad_clip: float = real(1.0, least=0, most=1e9)
    ema: float = real(0.9999, least=0, below=1)  # decay of the parameters' average, a step

    def transformation(self, num_steps: int, unit: float) -> optax.GradientTransformation:
        """The optimizer of a run of ``num_steps``.

        ``unit`` is what our loss is where the paper's is 1: clipping at ``grad_clip`` is then
        theirs.
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

    ema: float = real(0.99, least=0, below=1)  # decay of the parameters' average, a step
