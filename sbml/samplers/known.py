"""Samples with a known part: inpainting and colourisation by the score alone.

After every step, the known part is replaced by a sample of the forward process from it at that
time:

    u = B^T x over the channels,   u <- m (alpha_t y + sigma_t z) + (1 - m) u,   x <- B u

with the known values y, their mask m, and an orthonormal B. The noise z is new in every step. The
unknown part follows the score, which depends on the known part. But the replacement does not depend
on the unknown part, so the distribution is p(unknown | known) only in the limit of many corrector
steps at each time.

Reference: Song et al., "Score-Based Generative Modeling through SDEs", ICLR 2021, appendix I.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Shaped

from sbml.core.door import checked
from sbml.core.scalars import Number, is_traced
from sbml.core.streams import stream
from sbml.core.types import AnyArray, Key, Scalar, Score, product
from sbml.samplers._grid import FixedSteps, denoise
from sbml.samplers.corrector import Corrector, NoCorrector
from sbml.sdes import SDE

Image = Float[AnyArray, "h w c"]
Mask = Shaped[AnyArray, "..."] | float
Basis = Float[AnyArray, "c c"]

# The first column gives grey, the mean over red, green and blue, up to a factor.
GREY_FIRST = np.linalg.qr(np.array([[1.0, 1, 0], [1, 0, 1], [1, 0, 0]]))[0]


@dataclasses.dataclass(frozen=True)
class KnownPart:
    """A corrector that replaces the known part after each step of another corrector.

    Attributes:
      x_0: ``(h, w, c)``, the image; its unknown part can have any values, with a ``basis`` any
        finite ones.
      mask: 1 for known and 0 for unknown values, in the basis of the channels; broadcastable to
        x_0.
      basis: ``(c, c)``, a basis of the channels in orthonormal columns; None for the channels
        themselves.
      corrector: the other corrector, which changes the whole image.
    """

    x_0: Image
    mask: Mask
    basis: Basis | None
    corrector: Corrector = NoCorrector()

    @property
    def nfe(self) -> int:
        """The number of network evaluations after each step of the sampler."""
        return self.corrector.nfe

    def replace_known(self, x: Image, known: Image) -> Image:
        """``x`` with its known part taken from the image ``known``."""
        mask = jnp.broadcast_to(self.mask, x.shape)
        if self.basis is None:
            return jnp.where(mask == 1, known, x)
        u = jnp.where(mask == 1, product(known, self.basis), product(x, self.basis))
        return product(u, self.basis.T)

    def __call__(self, score: Score, sde: SDE, x: Image, s: Scalar, t: Scalar, key: Key) -> Image:
        mean, std = sde.marginal(self.x_0, t)

        def noisy(key: Key) -> Image:
            return mean + std * jax.random.normal(stream(key, "known part"), x.shape, x.dtype)

        def one(x: Image, key: Key) -> tuple[Image, None]:
            x = single(score, sde, x, s, t, stream(key, "corrector"))
            return self.replace_known(x, noisy(key)), None

        x = self.replace_known(x, noisy(key))
        if not self.nfe:
            return x
        # Every corrector with steps is a dataclass.
        single: Corrector = dataclasses.replace(self.corrector, steps=1)  # type: ignore[type-var]
        return jax.lax.scan(one, x, jax.random.split(stream(key, "corrector"), self.nfe))[0]


@checked
def complete(
    score: Score,
    sde: SDE,
    x_0: Image,
    mask: Mask,
    key: Key,
    *,
    eps: Number,
    sampler: FixedSteps,
    basis: Basis | None = None,
) -> Image:
    """One image ``(h, w, c)`` that equals ``x_0`` exactly where ``mask`` is 1.

    Args:
      score, sde: the model.
      x_0, mask, basis: as in :class:`KnownPart`.
      key: for the random draws of the latent and all noise.
      eps: the smallest time, at which the image is denoised.
      sampler: any sampler with fixed steps. The steps of its corrector make the known and the
        unknown part consistent.

    Raises:
      ValueError: ``mask`` is not of 0 and 1 only, or eps is outside (0, T). A traced ``mask`` is
        not checked.
    """
    if not is_traced(mask) and not np.all(np.isin(np.asarray(mask), (0, 1))):
        raise ValueError(f"mask has values {np.unique(mask)}: give 1 for known, 0 for unknown")
    corrector = KnownPart(x_0, mask, basis, sampler.corrector)
    z = sde.prior_sample(stream(key, "latent"), x_0.shape).astype(x_0.dtype)
    key = stream(key, "sampler")
    x, _ = dataclasses.replace(sampler, corrector=corrector)(score, sde, z, key, eps=eps)
    return corrector.replace_known(denoise(score, sde, x, jnp.asarray(eps, x.dtype)), x_0)
