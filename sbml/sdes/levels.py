"""The noise levels of a discrete-time model, such as DDPM or SMLD.

x_i = alpha_i x_0 + sigma_i z,      t_i = i / (n - 1),      i = 0, ..., n - 1
"""

import dataclasses
import math

import jax.numpy as jnp

from sbml import scalars
from sbml.sdes._kernel import Kernel
from sbml.types import Elementwise


@dataclasses.dataclass(frozen=True)
class Levels(Kernel):
    """Finitely many noise levels: level i of n has the time t_i = i / (n - 1) in [0, T].

    At any other time, which the discrete-time losses do not use, the nearest level applies. With
    ``losses.dsm`` in its original weighting and uniform i, the losses are those of DDPM and SMLD.

    Attributes:
      mean_coefs: alpha_i of the n levels, at least 0.
      stds: sigma_i of the n levels, positive.

    Raises:
      ValueError: for fewer than two levels, tuples of unequal length, or numbers that are not
        finite, negative alpha_i or sigma_i that are not positive.
    """

    mean_coefs: tuple[float, ...] = dataclasses.field(metadata={"static": True})
    stds: tuple[float, ...] = dataclasses.field(metadata={"static": True})

    def __post_init__(self) -> None:
        if len(self.stds) < 2:
            raise ValueError(f"{len(self.stds)} noise levels: need at least two")
        if len(self.mean_coefs) != len(self.stds):
            raise ValueError(
                f"{len(self.mean_coefs)} mean_coefs for {len(self.stds)} stds: give one of each "
                "for every level"
            )
        scalars.check_range(self.stds, "stds")
        finite = all(map(math.isfinite, (*self.mean_coefs, *self.stds)))
        if not finite or min(self.mean_coefs) < 0 or min(self.stds) <= 0:
            raise ValueError(
                f"mean_coefs={self.mean_coefs}, stds={self.stds}: need finite numbers, mean_coefs "
                "of at least 0 and positive stds"
            )

    def mean_coef(self, t: Elementwise) -> Elementwise:
        return self._at(self.mean_coefs, t)

    def std(self, t: Elementwise) -> Elementwise:
        return self._at(self.stds, t)

    def rate(self, t: Elementwise) -> Elementwise:
        raise ValueError(
            "discrete noise levels have no likelihood weighting: choose the original weighting"
        )

    def _at(self, values: tuple[float, ...], t: Elementwise) -> Elementwise:
        t, last = jnp.asarray(t), len(values) - 1
        return jnp.asarray(values, t.dtype)[jnp.round(t * last).astype(jnp.int32)]
