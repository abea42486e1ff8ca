"""The flow of the Flow++ dequantizer, from Gaussian noise to the logits of u, given an image.

The noise is split into even and odd columns (a, b). These steps are repeated once per coupling:

    normalise     a <- scale a + bias, elementwise, and the same for b
    mix channels  a <- a W at every pixel, and the same for b, if the design mixes channels
    couple        b <- exp(s) logit F(b) + t, elementwise; s, t, F are functions of a and the image
    exchange      (a, b) <- (b, a)

Every layer maps the halves to the new halves and to the log-determinant in nats, which is a scalar
if it is the same for all images and else ``(n,)``.

Reference: Ho et al. 2019 (Flow++), sections 3.1 to 3.3.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from sbml.core.types import Array, Batch, Vector
from sbml.dequantizers import _flowpp_layers as layers
from sbml.dequantizers import _mixture_logistic as mixture_logistic

Pair = tuple[Array, Array]  # even columns and odd columns, (n, h, w / 2, c) each


def split(x: Array) -> Pair:
    """Even and odd columns of ``x (n, h, w, c)``."""
    return x[:, :, 0::2], x[:, :, 1::2]


def merge(halves: Pair) -> Array:
    """The inverse of ``split``."""
    even, odd = halves
    n, h, w, c = even.shape
    return jnp.stack([even, odd], axis=3).reshape(n, h, 2 * w, c)


def per_image(x: Batch) -> Vector:
    """Sum of ``x (n, ...)`` over all but the first axis."""
    return x.reshape(len(x), -1).sum(-1)


class ElementwiseAffine(nn.Module):
    """y = scale x + bias, with a scale and a bias for every pixel and channel.

    The initial parameters give every channel of y mean 0 and variance 1 over the batch used for
    initialisation.
    """

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, Array]:
        def at_every_pixel(values: Array) -> Array:
            return jnp.broadcast_to(values, x.shape[1:])

        floor = layers.VARIANCE_FLOOR
        scale = self.param("scale", lambda _: at_every_pixel(lax.rsqrt(x.var((0, 1, 2)) + floor)))
        y = scale[None] * x
        bias = self.param("bias", lambda _: at_every_pixel(-y.mean((0, 1, 2))))
        return y + bias[None], jnp.log(jnp.abs(scale)).sum()


class Norm(nn.Module):
    """Activation normalisation of both halves (Kingma & Dhariwal 2018, Glow)."""

    @nn.compact
    def __call__(self, halves: Pair) -> tuple[Pair, Array]:
        a, log_det_a = ElementwiseAffine(name="norm0")(halves[0])
        b, log_det_b = ElementwiseAffine(name="norm1")(halves[1])
        return (a, b), log_det_a + log_det_b


class Pointwise(nn.Module):
    """Invertible 1x1 convolution of both halves (Kingma & Dhariwal 2018, Glow)."""

    @nn.compact
    def __call__(self, halves: Pair) -> tuple[Pair, Array]:
        _, h, w, c = halves[0].shape
        rotation, dtype = nn.initializers.orthogonal(), halves[0].dtype
        weights = [self.param(name, rotation, (c, c), dtype) for name in ("W0", "W1")]
        log_det = h * w * sum(jnp.linalg.slogdet(weight)[1] for weight in weights)
        return (halves[0] @ weights[0], halves[1] @ weights[1]), log_det


class MixLogisticAttnCoupling(nn.Module):
    """(a, b) -> (exp(s) logit F(b) + t, a), with s, t and F functions of a and the context.

    F is a mixture of logistics. The halves exchange places. The log-determinant is ``(n,)``.
    """

    model: Any  # a ``variational.Model``

    @nn.compact
    def __call__(self, halves: Pair, *, context: Array, train: bool = False) -> tuple[Pair, Array]:
        a, b = halves
        per_channel = 2 + 3 * self.model.components
        network = layers.CouplingNetwork(self.model, a.shape[-1] * per_channel)
        nn.share_scope(self, network)
        out = network(a, context, train=train).reshape(*a.shape, per_channel)
        logits, means, log_scales = jnp.split(out[..., 2:], 3, axis=-1)
        log_scales = jnp.maximum(log_scales, mixture_logistic.LEAST_LOG_SCALE)
        mixture = mixture_logistic.Mixture(logits, means, log_scales)
        log_scale, shift = jnp.tanh(out[..., 0]), out[..., 1]
        y, log_slope = mixture_logistic.logit_cdf(b, mixture, self.model.clipped)
        log_det = per_image(log_slope + log_scale)
        return (jnp.exp(log_scale) * y + shift, a), log_det


class Flow(nn.Module):
    """The flow from noise ``(n, h, w, c)`` to the logits of u, given the image."""

    model: Any  # a ``variational.Model``

    @nn.compact
    def __call__(self, image: Array, x: Array, *, train: bool = False) -> tuple[Array, Array]:
        """The logits of the noise ``x``, and log |det d logits / d noise| ``(n,)`` in nats."""
        design = layers.DESIGNS[self.model.design]
        processor = layers.ContextProcessor(self.model, name=design.context)
        context = processor(jnp.concatenate(split(image), axis=-1), train=train)
        halves, log_det = split(x), jnp.zeros(len(x), x.dtype)
        for _ in range(design.couplings):
            coupling = partial(MixLogisticAttnCoupling(self.model), context=context, train=train)
            steps: list[Callable[[Pair], tuple[Pair, Array]]] = [
                Norm(),
                *([Pointwise()] if design.mixes_channels else []),
                coupling,
            ]
            for step in steps:
                halves, change = step(halves)
                log_det = log_det + change
        return merge(halves), log_det
