"""The process of x when a model was trained on other units, y = scale x + shift.

    y_t = alpha y + sigma z,      x_t = (y_t - alpha shift) / scale = alpha x + (sigma / scale) z

The noise z is the same in both, so a network's noise prediction needs no change; only its input is
y_t. Pixels 2 k / 255 - 1, as in diffusers' DDPM models, are 256/255 times the bin centres
(2 k + 1) / 256 - 1 of this package, and pixels k / 255 are 256/510 times these, plus 1/2.
"""

import dataclasses
import math
from typing import Annotated

from sbml.core.door import typed
from sbml.core.pytrees import static
from sbml.core.scalars import Number, Positive, finite
from sbml.core.types import Elementwise, Numbers
from sbml.sdes.base import SDE, Kernel, Levels


@typed
@dataclasses.dataclass(frozen=True)
class Rescaled(SDE):
    """The process of x, from the process ``of`` of y = ``scale`` x + ``shift``.

    A score that is made for it (``from_prediction``, ``Adapter``) gives its network y_t.

    Attributes:
      of: the process that the model was trained on.
      scale: a positive number.
      shift: a finite number.
    """

    of: SDE
    scale: Positive = dataclasses.field(metadata={"static": True})
    shift: Annotated[float, finite] = static(0.0)

    @property
    def of_network(self) -> Kernel:
        return self.of

    def to_network(self, x: Numbers, alpha: Numbers) -> Numbers:
        return self.scale * x + alpha * self.shift

    def from_network(self, y: Numbers) -> Numbers:
        return (y - self.shift) / self.scale

    @property
    def smallest_time(self) -> float:  # type: ignore[override]
        return self.of.smallest_time

    def mean_coef(self, t: Elementwise) -> Elementwise:
        return self.of.mean_coef(t)

    def std(self, t: Elementwise) -> Elementwise:
        return self.of.std(t) / self.scale

    def log_snr(self, t: Elementwise) -> Elementwise:
        return self.of.log_snr(t) + 2 * math.log(self.scale)

    def rate(self, t: Elementwise) -> Elementwise:
        return self.of.rate(t)

    def drift_coef(self, t: Elementwise) -> Elementwise:
        return self.of.drift_coef(t)

    def diffusion(self, t: Elementwise) -> Elementwise:
        return self.of.diffusion(t) / self.scale

    def time(self, log_snr: Elementwise) -> Elementwise:
        return self.of.time(log_snr - 2 * math.log(self.scale))

    def slopes(self, t: Elementwise) -> tuple[Elementwise, Elementwise]:
        mean_slope, std_slope = self.of.slopes(t)
        return mean_slope, std_slope / self.scale

    @property
    def largest_time(self) -> Number:
        return self.of.largest_time

    @property
    def last_regular_time(self) -> Number:
        return self.of.last_regular_time

    def levels(self, n: int) -> Levels:
        raise ValueError(
            "the noise levels of DDPM and SMLD are for data of this package, not for those of a "
            f"network with scale={self.scale:g}, shift={self.shift:g}: train with scale=1, shift=0"
        )

    @property
    def prior_std(self) -> Number:
        """That of y, divided by the scale; the mean stays 0."""
        return self.of.prior_std / self.scale
