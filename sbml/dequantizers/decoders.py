"""Decoders p(k | x_eps) of the level k, where x_eps = alpha c_k + sigma z is a noisy bin centre.

    -log P(k) <= prior + diffusion + E[-log p(k | x_eps)]          (``sbml.discrete``)

They give no density of real numbers, only this evidence bound for integers. The categorical decoder
is Bayes' rule for the noise alone,

    p(k | x_eps) = N(x_eps; alpha c_k, sigma^2) / sum_j N(x_eps; alpha c_j, sigma^2).

The learned decoder is the integer denoiser's own prediction (``sbml.integers``). It multiplies this
likelihood by a weight for each level, which the network computes from all entries of x_eps.

Reference: Kingma et al., VDM, 2021, section 3.3.
"""

import dataclasses
from typing import ClassVar

from sbml.core.types import Score, optional
from sbml.dequantizers.base import AtNoise
from sbml.likelihood import discrete


@dataclasses.dataclass(frozen=True)
class Categorical(AtNoise):
    """The categorical decoder, which has nothing to learn."""

    def noise(self, score: Score, levels: int) -> discrete.Categorical:
        """Normal noise, and the decoder of Bayes' rule."""
        return discrete.Categorical(levels)


@dataclasses.dataclass(frozen=True)
class Learned(AtNoise):
    """The decoder without parameters of its own: it uses those of the score."""

    calls: ClassVar[int] = 1

    @classmethod
    def misfit(cls, shape: tuple[int, ...], parameterization: str, dequantization: str) -> str:
        """The reason why the score has no decoder, or ""."""
        if (parameterization, dequantization) == ("levels", "centre"):
            return ""
        return (
            f"score.parameterization={parameterization}, data.dequantization={dequantization}: "
            "only an integer denoiser of bin centres has a learned decoder; set "
            "--config.score.parameterization=levels --config.data.dequantization=centre, or choose "
            "another dequantizer"
        )

    def noise(self, score: Score, levels: int) -> discrete.Categorical:
        """Normal noise, and the decoder of the score."""
        decoder = optional(score, "decoder_nats")
        if decoder is None:
            raise ValueError(
                "the score has no learned decoder, decoder_nats(y, t, pixels): train with "
                "score.parameterization=levels and data.dequantization=centre, or evaluate another "
                "dequantizer"
            )
        return discrete.Categorical(levels, decoder)
