"""The base classes of dequantizers.

For any density p of x = 2 (pixels + u) / L - 1 and any q(u | pixels) on the bin [0, 1)^d,

    -log P(pixels) <= E_q [-log p(x) + log q(u | pixels)] + d log(L / 2).
"""

import abc
from typing import Any, ClassVar

from sbml.core.types import Key, PixelBatch, Pixels, PyTree, Score
from sbml.likelihood import discrete
from sbml.likelihood.bound import Bound
from sbml.sdes import SDE


class Dequantizer:
    """The base of dequantizers: frozen and hashable dataclasses that make integers continuous.

    It has one of these methods, or both:

        sample(params, pixels (*s), key) -> u, log_q  u (*s) in [0, 1), log q(u | pixels) in nats
        bound(params, score, sde, pixels (*s), key, levels, *, eps, u, reduction) -> bound.Bound
                                                      its own bound on -log P(pixels)

    The ODE estimator needs ``sample``. ``bound`` gives an evidence bound on the probability of the
    integers themselves, in nats. A dequantizer with parameters to learn also has ``sample_batch``,
    which is ``sample`` for a batch, and the field ``dropout``.

    Attributes:
      at_noise: False if x is data, which the density model takes unchanged; True if alpha(eps) x is
        a sample of the diffusion at its smallest time eps. The only evidence bound of a dequantizer
        with ``at_noise`` is its own.
      calls: the number of score evaluations that ``bound`` needs in addition to one for each time
        in ``u``.
    """

    at_noise: ClassVar[bool] = False
    calls: ClassVar[int] = 0

    def init(self, key: Key, pixels: PixelBatch) -> PyTree:
        """The initial parameters, from a batch ``pixels (n, *s)``: {} if there are none."""
        return {}

    @classmethod
    def misfit(cls, shape: tuple[int, ...], parameterization: str, dequantization: str) -> str:
        """The reason why it does not fit images of that shape or a score that was trained with
        those settings, or "" if it does."""
        return ""


def has_density(model: object) -> bool:
    """Whether ``model``, an instance or a class, turns integers into x with a density."""
    return hasattr(model, "sample")


def has_bound(model: object) -> bool:
    """Whether ``model``, an instance or a class, has its own evidence bound for the integers."""
    return hasattr(model, "bound")


def is_trained(model: object) -> bool:
    """Whether ``model``, an instance or a class, has parameters to train."""
    return hasattr(model, "sample_batch")


class AtNoise(Dequantizer, abc.ABC):
    """A dequantizer whose bound is that of ``sbml.discrete`` with a ``noise`` around bin centres.

    It fits a model that was trained on bin centres (``data.dequantization=centre``).
    """

    at_noise: ClassVar[bool] = True

    @abc.abstractmethod
    def noise(self, score: Score, levels: int) -> discrete.TruncatedNormal | discrete.Categorical:
        """The noise of integers with ``levels`` levels, and their decoder."""

    def bound(
        self,
        params: PyTree,
        score: Score,
        sde: SDE,
        pixels: Pixels,
        key: Key,
        levels: int,
        **how: Any,
    ) -> Bound:
        """The bound on -log P(pixels) in nats: ``discrete.elbo``, with its other arguments."""
        return discrete.elbo(score, sde, pixels, key, noise=self.noise(score, levels), **how)
