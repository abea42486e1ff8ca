"""Layers of the score networks: normalisation, convolution, resampling, and two sets of sinusoids.

Sinusoids of the input's values show its digits (``input_features``; the option ``fourier``).
Sinusoids of the label show the noise level (``embed``; ``embedding_type`` and ``fourier_scale``).

Every layer works on images ``(n, h, w, c)`` in the dtype of its input; parameters are float32.
Class names and the order of calls must not change: Linen derives the parameters' names from them,
and these are the names in Song et al.'s JAX checkpoints.

References: Ho et al. 2020 (DDPM), Brock et al. 2019 (BigGAN blocks), Karras et al. 2020 (FIR
resampling), Zhang 2019 (why to filter before striding), Tancik et al. 2020 (Fourier features of
the label), Song et al. 2021a (NCSN++, DDPM++), Kingma et al. 2021 (VDM, section 4.5: Fourier
features of the input).
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax
from jaxtyping import Float, Num

from sbml.door import condition, typed
from sbml.platform import one_cpu
from sbml.scalars import Count, at_least, one_of
from sbml.types import AnyArray, Array, Key

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "swish": nn.swish,
    "elu": nn.elu,
    "relu": nn.relu,
    "lrelu": partial(nn.leaky_relu, negative_slope=0.2),
}

Images = Float[AnyArray, "n h w c"]
Labels = Float[AnyArray, "n"]
Numbers = Num[AnyArray, "n"]

Classes = Annotated[int, at_least(0)]  # their number; 0 for a network without a class

# "SAME", "VALID", or how many zeros are before and after the height, and the width.
Padding = str | tuple[tuple[int, int], tuple[int, int]]

# The fields that several networks have.
Rate = Annotated[float, condition("in [0, 1)", lambda value: 0 <= value < 1)]
EmbeddingType = Annotated[str, one_of("positional", "fourier", "fourier_linear")]
Precision = Annotated[str, one_of("float32", "bfloat16")]
Frequencies = Annotated[
    tuple[float, ...], condition("of frequencies above 0", lambda value: all(f > 0 for f in value))
]


# ---- features of the input ----------------------------------------------------------------------


@typed
def frequencies(
    levels: Annotated[int, at_least(2)], count: Count = 2, scale: float = 1.0
) -> tuple[float, ...]:
    """Frequencies ``scale`` L / 2^j for j = count - 1 ... 0, in rising order, for ``fourier``.

    The bin of the integer k, one of L levels, has its centre at x = (2 k + 1) / L - 1; neighbouring
    centres are 2 / L apart. A feature of frequency L repeats in every bin and shows where x lies
    inside its bin. A feature of frequency L / 2 repeats in every second bin and distinguishes even
    k from odd k, and so on: frequency L / 2^j shows the j-th bit of k. A network that must predict
    noise far smaller than a bin needs these digits, but x itself hardly shows them.

    The two frequencies for 256 levels are (128, 256), that is, VDM's sin(2 pi 2^n x) for n = 6, 7.
    If the network sees x / d in place of x, as with the parameterization "preconditioned" at small
    noise, give the data's standard deviation d as the ``scale``.
    """
    return tuple(scale * levels / 2**j for j in reversed(range(count)))


def input_features(x: Array, fourier: tuple[float, ...]) -> Array:
    """[x, sin(pi f x) for every f, cos(pi f x) for every f] for the frequencies f in ``fourier``.

    ``x (..., c)`` becomes ``(..., c (1 + 2 k))`` with k frequencies. Among the sines, and among the
    cosines, those of one channel stand together, in the order of the frequencies. The arithmetic
    is in the dtype of ``x``: the angles are large, so convert to bfloat16 after this function and
    not before it.
    """
    if not fourier:
        return x
    scale = math.pi * jnp.asarray(fourier, x.dtype).reshape((1,) * x.ndim + (-1,))
    angle = (x[..., None] * scale).reshape(*x.shape[:-1], -1)
    return jnp.concatenate([x, jnp.sin(angle), jnp.cos(angle)], axis=-1)


# ---- convolution and normalisation --------------------------------------------------------------


def materialise(x: Array) -> Array:
    """Return ``x`` unchanged; on one CPU its gradient is computed once for all that read it.

    On CPU, XLA computes a cheap result again in each operation that reads it. The gradient at a
    residual sum follows cheaply from the gradient at the next sum, so XLA would recompute, in the
    gradient of every block, the gradients at all sums between that block and the output. XLA
    recomputes nothing across a conditional, so the gradient is passed through one. Without it a
    training step of a network for 32x32 photos takes 1.9 times as long
    (docs/benchmarks/training_step.md).
    """
    return _materialise(x) if one_cpu() else x


@jax.custom_jvp
def _materialise(x: Array) -> Array:
    return x


@_materialise.defjvp
def _(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    """XLA removes a conditional whose condition is constant, so the condition depends on ``x``. It
    changes the gradient only if the first entry of ``x`` is NaN: then the gradient is NaN too."""
    (x,), (dx,) = primals, tangents
    nan = jnp.isnan(x[(0,) * x.ndim])
    return _materialise(x), lax.cond(nan, lambda dx: jnp.nan * dx, lambda dx: dx, dx)


def fan_avg(scale: float = 1.0) -> nn.initializers.Initializer:
    """Uniform initialiser of variance ``scale / fan_avg``; a scale of 0 is replaced by 1e-10."""
    return nn.initializers.variance_scaling(scale or 1e-10, "fan_avg", "uniform")


def dropout(key: Key, x: Array, rate: float) -> Array:
    """Set each element of ``x`` to 0 with probability ``rate`` and scale the rest: E[result] = x.

    One random 32-bit word decides two elements, which halves the number of words to draw. The rate
    is therefore rounded to a multiple of 2^-16, and the scale is that of the rounded rate.
    """
    channels = x.shape[-1]
    threshold = max(1, round((1 - rate) * 2**16))
    words = jax.random.bits(key, (*x.shape[:-1], -(-channels // 2)), jnp.uint32)
    halves = jnp.concatenate([words & 0xFFFF, words >> 16], axis=-1)[..., :channels]
    return jnp.where(halves < threshold, x * (2**16 / threshold), 0).astype(x.dtype)


def convolution(x: Array, kernel: Array, stride: int = 1, padding: Padding = "SAME") -> Array:
    """Convolve ``x (n, h, w, c)`` with ``kernel (k, k, c, c_out)``; "SAME" pads with zeros."""
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def pixelwise(x: Array, w: Array) -> Array:
    """``x w`` at every pixel, as one matrix product."""
    return (x.reshape(-1, x.shape[-1]) @ w).reshape(*x.shape[:-1], -1)


def add_bias(x: Array, bias: Array) -> Array:
    """``x (n, h, w, c) + bias (c,)``."""
    return x + bias.reshape(1, 1, 1, -1)


class Conv(nn.Module):
    """A ``size x size`` convolution with bias; it divides the image's height and width by
    ``stride``."""

    features: int
    size: int = 3
    stride: int = 1
    init_scale: float = 1.0
    padding: Padding = "SAME"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = self.param("kernel", fan_avg(self.init_scale), shape).astype(x.dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.features,)).astype(x.dtype)
        if self.size == self.stride == 1:
            return add_bias(pixelwise(x, kernel[0, 0]), bias)
        return add_bias(convolution(x, kernel, self.stride, self.padding), bias)


def dense(x: Array, features: int) -> Array:
    """An affine map of ``x (n, c)`` to ``(n, features)``."""
    return nn.Dense(features, dtype=x.dtype, kernel_init=fan_avg())(x)


class GroupNorm(nn.Module):
    """Group normalisation (Wu & He 2018) with min(c // 4, 32) groups of channels.

    y = (x - mean) / sqrt(variance + epsilon) * scale + bias = a x + b, where mean and variance are
    those of all pixels and channels of a group. They are averages of statistics per channel, so
    that one multiplication and one addition per entry remain: this costs half as much as to
    normalise group by group. Statistics are float32 whatever the dtype of ``x``. The variance of a
    group is the mean of its channels' variances plus the variance of its channels' means, so that
    channels with different means do not make it lose digits.
    """

    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c = x.shape[-1]
        groups = min(c // 4, 32)
        if groups == 0 or c % groups:
            raise ValueError(
                f"GroupNorm needs min(c // 4, 32) groups of equal size and got c={c} channels: "
                "choose nf and ch_mult so that every width, and every sum of two widths that the "
                "decoder joins, is a multiple of its number of groups. If nf is a multiple of 32, "
                "this always holds."
            )
        scale = self.param("scale", nn.initializers.ones, (c,)).reshape(1, c)
        bias = self.param("bias", nn.initializers.zeros, (c,)).reshape(1, c)
        x32 = x.astype(jnp.float32)
        mean, mean_square = x32.mean((1, 2)), jnp.square(x32).mean((1, 2))
        channel_var = jnp.maximum(mean_square - jnp.square(mean), 0.0)
        group_mean = _group_means(mean, groups)
        group_var = _group_means(channel_var + jnp.square(mean - group_mean), groups)
        a = lax.rsqrt(group_var + self.epsilon) * scale
        b = bias - group_mean * a
        return materialise(x32 * a[:, None, None] + b[:, None, None]).astype(x.dtype)


def _group_means(v: Array, groups: int) -> Array:
    """The mean of each channel's group, from ``(n, c)`` to ``(n, c)``."""
    n, c = v.shape
    return jnp.repeat(v.reshape(n, groups, -1).mean(-1), c // groups, axis=-1)


class NIN(nn.Module):
    """Network in network (Lin et al. 2014): the same affine map ``x W + b`` at every pixel."""

    features: int
    init_scale: float = 0.1

    @nn.compact
    def __call__(self, x: Array) -> Array:
        w = self.param("W", fan_avg(self.init_scale), (x.shape[-1], self.features))
        b = self.param("b", nn.initializers.zeros, (self.features,))
        return add_bias(pixelwise(x, w.astype(x.dtype)), b.astype(x.dtype))


def attention(query: Array, key: Array, value: Array) -> Array:
    """softmax(q kᵀ / √c) v with one head, of arrays ``(n, positions, c)``.

    The softmax has at least float32. On CPU this costs half as much as
    ``jax.nn.dot_product_attention``, gradient included.
    """
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    scaled = query * query.shape[-1] ** -0.5
    logits = jnp.einsum("nqc,nkc->nqk", scaled, key, preferred_element_type=dtype)
    return jnp.einsum("nqk,nkc->nqc", nn.softmax(logits).astype(value.dtype), value)


# ---- embedding of the label ---------------------------------------------------------------------


def positional(label: Array, size: int, shift: int = 1) -> Array:
    """Sines, then cosines of ``label (n,)`` with periods from 2 pi to 20000 pi: ``(n, size)``, in
    the dtype of the label. With ``shift`` 0, in place of 1, the largest period is not reached."""
    half = size // 2
    frequency = jnp.exp(-math.log(10000) / (half - shift) * jnp.arange(half, dtype=label.dtype))
    angle = label[:, None] * frequency[None]
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


class GaussianFourierProjection(nn.Module):
    """Random Fourier features sin(2 pi W x), cos(2 pi W x), fixed W ~ N(0, scale²): (n, 2 size).

    W is one of the parameters because the checkpoints hold it there, but its gradient is zero.
    """

    size: int
    scale: float = 16.0

    @nn.compact
    def __call__(self, x: Array) -> Array:
        w = self.param("W", nn.initializers.normal(self.scale), (self.size,))
        angle = 2 * jnp.pi * x[:, None] * lax.stop_gradient(w)[None]
        return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


def embed(label: Array, size: int, kind: str, fourier_scale: float) -> Array:
    """Features of ``label (n,)`` in float32; ``kind`` is an :data:`EmbeddingType`.

    ``positional`` and ``fourier_linear`` embed the label itself, ``fourier`` embeds its logarithm.
    """
    label = label.astype(jnp.float32)
    if kind == "positional":
        return positional(label, size)
    argument = jnp.log(label) if kind == "fourier" else label
    return GaussianFourierProjection(size, fourier_scale)(argument)


def with_class(features: Array, classes: int, condition: Array | None) -> Array:
    """``features (n, c)`` plus an embedding of the class ``condition (n,)`` of each row; unchanged
    if the network has no ``classes``.

    Raises:
      ValueError: a network with classes gets none.
    """
    if not classes:
        return features
    if condition is None:
        raise ValueError(
            f"the network has classes={classes} and got no class: give the score a condition, a "
            f"number from 0 to {classes - 1}"
        )
    embedding = nn.Embed(classes, features.shape[-1], dtype=features.dtype, name="classes")
    return features + embedding(condition.astype(jnp.int32))


# ---- resampling by a factor of two --------------------------------------------------------------


def upfirdn(
    x: Array, kernel: Sequence[float], *, up: int = 1, down: int = 1, pad: tuple[int, int]
) -> Array:
    """Upsample with zeros, convolve with the FIR ``kernel``, and keep every ``down``-th pixel.

    y[m] = Σ_j kernel[j] v[m down + K - 1 - j], along the height and then along the width, where v
    is ``x`` with ``up - 1`` zeros after each pixel, ``pad[0]`` zeros before the first pixel and
    ``pad[1]`` zeros after the last. The K taps are scaled to the sum ``up``, so that a constant
    image keeps its value away from the border.
    """
    taps = up * np.asarray(kernel, float) / np.sum(kernel)
    for axis in (1, 2):
        edges = [(0, 0, 0)] * x.ndim
        edges[axis] = (pad[0], pad[1] + up - 1, up - 1)
        v = lax.pad(x, jnp.zeros((), x.dtype), edges)
        stop = v.shape[axis] - len(taps) + 1
        terms = [
            float(tap) * lax.slice_in_dim(v, start, stop + start, down, axis)
            for start, tap in enumerate(taps[::-1])
        ]
        x = sum(terms[1:], terms[0])
    return x


def upsample(x: Array, fir_kernel: Sequence[float] | None, *, border: int = 0) -> Array:
    """``x`` at twice its height and width, by nearest neighbours (``None``) or by FIR interpolation
    with ``border`` more pixels on each side."""
    if fir_kernel is None:
        return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
    k = len(fir_kernel)
    return upfirdn(x, fir_kernel, up=2, pad=((k - 1) // 2 + 1 + border, (k - 2) // 2 + border))


def downsample(x: Array, fir_kernel: Sequence[float] | None) -> Array:
    """``x`` at half its height and width: means of 2x2 pixels (``None``), or every second pixel
    after the FIR filter."""
    if fir_kernel is None:
        n, h, w, c = x.shape
        return x.reshape(n, h // 2, 2, w // 2, 2, c).mean((2, 4))
    k = len(fir_kernel)
    return upfirdn(x, fir_kernel, down=2, pad=((k - 1) // 2, (k - 2) // 2))


class Conv2d(nn.Module):
    """3x3 convolution combined with FIR resampling by two (Karras et al. 2020).

    This differs from a resampling followed by a convolution with zero padding: here the convolution
    reads the filter's result one pixel beyond the border, where it is not zero.
    """

    features: int
    fir_kernel: tuple[float, ...]
    up: bool

    @nn.compact
    def __call__(self, x: Array) -> Array:
        weight = self.param("weight", fan_avg(), (3, 3, x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        if self.up:
            x, stride = upsample(x, self.fir_kernel, border=1), 1
        else:
            k = len(self.fir_kernel)
            x, stride = upfirdn(x, self.fir_kernel, pad=((k + 1) // 2, k // 2)), 2
        y = convolution(x, weight.astype(x.dtype), stride, "VALID")
        return add_bias(y, bias.astype(x.dtype))


class _Resample(nn.Module):
    """Resampling by two. With ``with_conv`` it includes a 3x3 convolution to ``features`` channels;
    None means as many as the input has."""

    up: ClassVar[bool]
    with_conv: bool
    fir_kernel: tuple[float, ...] | None
    features: int | None = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        if not self.with_conv:
            return (upsample if self.up else downsample)(x, self.fir_kernel)
        features = self.features or x.shape[-1]
        if self.fir_kernel is not None:
            return Conv2d(features, self.fir_kernel, self.up)(x)
        return Conv(features)(upsample(x, None)) if self.up else Conv(features, stride=2)(x)


class Upsample(_Resample):
    """Doubles height and width."""

    up = True


class Downsample(_Resample):
    """Halves height and width; with a convolution and no filter, the convolution has stride 2."""

    up = False


def per_entry(out: Array, shape: tuple[int, ...], outputs: int) -> Array:
    """The last layer's ``out`` in the shape ``shape`` if ``outputs`` is 0, else with one more axis:
    ``(*shape, outputs)``."""
    return out.reshape((*shape, outputs) if outputs else shape)
