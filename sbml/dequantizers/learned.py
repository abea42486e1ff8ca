"""A learned decoder: P(k | x_eps) is the integer denoiser's own prediction (``sbml.integers``).

    -log P(k) <= prior + diffusion + E[-log p(k | x_eps)],    x_eps = alpha c_k + sigma z

The categorical decoder uses the likelihood of the noise alone. This decoder multiplies that
likelihood by a weight for each level, which the network computes from all entries of x_eps. It
needs a score with ``score.parameterization=levels`` that was trained on bin centres.
"""

import dataclasses
from typing import Any, ClassVar

from sbml import discrete
from sbml.bound import Bound
from sbml.sdes import SDE
from sbml.types import Key, PixelBatch, Pixels, Score


@dataclasses.dataclass(frozen=True)
class Model:
    """A decoder without parameters of its own: it uses those of the score."""

    at_noise: ClassVar[bool] = True
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
        """The bound on -log P(pixels) with the score's decoder, in nats: ``discrete.elbo``.

        Raises:
          ValueError: the score has no decoder.
        """
        if not hasattr(score, "decoder_nats"):
            raise ValueError(
                "the score has no method decoder_nats(y, t, pixels), which the learned decoder "
                "needs: train an integer denoiser (score.parameterization=levels)"
            )
        noise = discrete.Categorical(levels, score.decoder_nats)
        return discrete.elbo(score, sde, pixels, key, noise=noise, **draws)
