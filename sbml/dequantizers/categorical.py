"""Categorical decoding: Bayes' rule gives the level from a bin centre with noise of time eps.

    P(k | x_eps) = N(x_eps; alpha c_k, sigma^2) / sum_j N(x_eps; alpha c_j, sigma^2),

where c_k is the centre of the bin of level k. This decoder gives no density of real numbers, only
an evidence bound on -log P(k) for integers (``sbml.discrete``). It fits a model that was trained on
bin centres (``data.dequantization=centre``).

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
        """The bound on -log P(pixels) with this decoder, in nats: ``discrete.elbo``."""
        return discrete.elbo(score, sde, pixels, key, noise=discrete.Categorical(levels), **draws)
