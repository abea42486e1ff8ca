"""Categorical decoding: noise around bin centres at eps, and Bayes' rule for the level.

    P(k | x_eps) ~ N(x_eps; alpha c_k, sigma^2) over the L levels, c_k the bins' centres

It has no density of the numbers, but a bound on -log P(k) of the integers (``sbml.discrete``). It
fits a model trained on bin centres (``data.dequantization=centre``).

Reference: Kingma et al., VDM, 2021, section 3.3.
"""

import dataclasses
from typing import Any, ClassVar

from sbml import discrete
from sbml.bound import Bound
from sbml.sdes import SDE
from sbml.types import Key, PixelBatch, Pixels, Score


@dataclasses.dataclass(frozen=True)
class Model:
    """A decoder with nothing to learn."""

    at_noise: ClassVar[bool] = True
    calls: ClassVar[int] = 0

    def init(self, key: Key, pixels: PixelBatch) -> Any:
        """No parameters."""
        return {}

    def bound(
        self,
        params: Any,
        score: Score,
        sde: SDE,
        pixels: Pixels,
        key: Key,
        levels: int,
        **draws: Any,
    ) -> Bound:
        """The bound on -log P(pixels) with its decoder: ``discrete.elbo``."""
        return discrete.elbo(score, sde, pixels, key, noise=discrete.Categorical(levels), **draws)
