"""The layers that the networks of images ``ncsnpp``, ``unet2d`` and ``vdm`` are built from.

    block(x)       (x + conv(dropout(act(norm(h))))) / scale,
                   h = conv(resample(act(norm(x)))) + dense(act(cond))     cond: the noise level
    attention(x)   (x + W softmax(q kᵀ / √d) v) / scale,              q, k, v: affine in norm(x)

These two are ``ResidualBlock`` and ``Attention``. A network makes a subclass that gives the
parameters the names of its published checkpoints, and replaces an affine map where these have one
of another kind. Two sets of sinusoids show numbers to a network: those of the input's values show
its digits (``input_features``; the option ``fourier``), those of the label the noise level
(``embed``; ``embedding_type`` and ``fourier_scale``).

Every layer works on images ``(n, h, w, c)`` in the dtype of its input; parameters are float32.
Class names, names and the order of calls must not change: Linen derives from them the names and the
initial values of parameters.

References: Ho et al. 2020 (DDPM), Brock et al. 2019 (BigGAN blocks), Karras et al. 2020 (FIR
resampling), Zhang 2019 (why to filter before striding), Tancik et al. 2020 (Fourier features of
the label), Song et al. 2021a (NCSN++, DDPM++), Kingma et al. 2021 (VDM, section 4.5: Fourier
features of the input), Dhariwal and Nichol 2021 (heads, "scale_shift").
"""

import math
from collections.abc import Callable, Sequence
from typing import Annotated, ClassVar, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Float, Num

from sbml.core.door import condition, typed
from sbml.core.platform import one_cpu
from sbml.core.scalars import Count, at_least, between, one_of
from sbml.core.types import AnyArray, Array, Key, at_least_float32

Map = Callable[[Array], Array]
ZEROS = nn.initializers.zeros

Images = Float[AnyArray, "n h w c"]
Labels = Float[AnyArray, "n"]
Numbers = Num[AnyArray, "n"]

# With more residual blocks, JAX traces a network for longer than ten seconds.
Depth = Annotated[int, between(0, 500)]
PerLevel = Annotated[int, between(1, 100)]  # blocks at one resolution
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
    return _materialise(*primals), _ONCE.bind(*primals, *tangents)


def _once(x: Array, dx: Array) -> Array:
    """``dx`` through a conditional. XLA removes a conditional whose condition is constant, so the
    condition depends on ``x``: if the first entry of ``x`` is NaN, the result is NaN too."""
    nan = jnp.isnan(x[(0,) * x.ndim])
    return lax.cond(nan, lambda dx: jnp.nan * dx, lambda dx: dx, dx)


def _once_of_a_batch(args: Sequence[Array], dims: Sequence[int | None]) -> tuple[Array, int | None]:
    x, dx = (a if d is None else jnp.moveaxis(a, d, 0) for a, d in zip(args, dims, strict=True))
    return _ONCE.bind(x, dx), None if dims[1] is None else 0


# A primitive of its own, because ``vmap`` would turn the conditional into a selection between the
# two branches, which JAX cannot differentiate in reverse mode. Here it stays a conditional.
_ONCE = Primitive("once")
_ONCE.def_impl(_once)
_ONCE.def_abstract_eval(lambda x, dx: dx)
mlir.register_lowering(_ONCE, mlir.lower_fun(_once, multiple_results=False))
batching.primitive_batchers[_ONCE] = _once_of_a_batch
ad.defjvp(_ONCE, None, lambda tangent, x, dx: _ONCE.bind(x, tangent))
ad.primitive_transposes[_ONCE] = lambda ct, x, dx: (
    None,
    ct if isinstance(ct, ad.Zero) else _ONCE.bind(x, ct),
)


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


def convolution(
    x: Array, kernel: Array, bias: Array, stride: int = 1, padding: Padding = "SAME"
) -> Array:
    """``x (n, h, w, c)`` convolved with ``kernel (k, k, c, c_out)``, plus ``bias (c_out,)``; "SAME"
    pads with zeros. With one tap and stride 1 this is one matrix product for all pixels."""
    kernel, bias = kernel.astype(x.dtype), bias.astype(x.dtype).reshape(1, 1, 1, -1)
    if kernel.shape[:2] == (1, 1) and stride == 1:
        return (x.reshape(-1, x.shape[-1]) @ kernel[0, 0]).reshape(*x.shape[:-1], -1) + bias
    axes = ("NHWC", "HWIO", "NHWC")
    y = lax.conv_general_dilated(x, kernel, (stride, stride), padding, dimension_numbers=axes)
    return y + bias


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
        kernel = self.param("kernel", fan_avg(self.init_scale), shape)
        bias = self.param("bias", ZEROS, (self.features,))
        return convolution(x, kernel, bias, self.stride, self.padding)


def dense(
    x: Array,
    features: int,
    name: str | None = None,
    init: nn.initializers.Initializer | None = None,
) -> Array:
    """An affine map of ``x (..., c)`` to ``(..., features)``."""
    return nn.Dense(features, dtype=x.dtype, kernel_init=init or fan_avg(), name=name)(x)


class GroupNorm(nn.Module):
    """Group normalisation (Wu & He 2018).

    y = (x - mean) / sqrt(variance + epsilon) * scale + bias = a x + b, where mean and variance are
    those of all pixels and channels of a group. They are averages of statistics per channel, so
    that one multiplication and one addition per entry remain: this costs half as much as to
    normalise group by group. Statistics have at least float32 whatever the dtype of ``x``. The
    variance of a group is the mean of its channels' variances plus the variance of its channels'
    means, so that channels with different means do not make it lose digits.

    Attributes:
      groups: number of groups; 0 means min(c // 4, 32) of c channels.
    """

    groups: int = 0
    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c = x.shape[-1]
        groups = self.groups or min(c // 4, 32)
        if groups == 0 or c % groups:
            raise ValueError(
                f"{self.name} has {groups} groups for {c} channels: choose the widths of the "
                "network, and the numbers of groups if it has fields for them, so that the groups "
                "have equal size; widths that are multiples of 32 fit all default numbers of groups"
            )
        scale = self.param("scale", nn.initializers.ones, (c,)).reshape(1, c)
        bias = self.param("bias", ZEROS, (c,)).reshape(1, c)
        wide = at_least_float32(x)
        mean, mean_square = wide.mean((1, 2)), jnp.square(wide).mean((1, 2))
        channel_var = jnp.maximum(mean_square - jnp.square(mean), 0.0)
        group_mean = _group_means(mean, groups)
        group_var = _group_means(channel_var + jnp.square(mean - group_mean), groups)
        a = lax.rsqrt(group_var + self.epsilon) * scale
        b = bias - group_mean * a
        return materialise(wide * a[:, None, None] + b[:, None, None]).astype(x.dtype)


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
        b = self.param("b", ZEROS, (self.features,))
        return convolution(x, w[None, None], b)


def attention(query: Array, key: Array, value: Array) -> Array:
    """softmax(q kᵀ / √c) v with one head, of arrays ``(n, positions, c)``.

    The softmax has at least float32. On CPU this costs half as much as
    ``jax.nn.dot_product_attention``, gradient included.
    """
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    scaled = query * query.shape[-1] ** -0.5
    logits = jnp.einsum("nqc,nkc->nqk", scaled, key, preferred_element_type=dtype)
    return jnp.einsum("nqk,nkc->nqc", nn.softmax(logits).astype(value.dtype), value)


# ---- blocks -------------------------------------------------------------------------------------


def residual(x: Array, y: Array, scale: float) -> Array:
    """(x + y) / scale; with a scale of √2, a sum of signals of variance 1 has variance 1."""
    return materialise((x + y) / scale)


class ResidualBlock(nn.Module):
    """(x + conv(dropout(act(norm(h))))) / scale, h = conv(resample(act(norm(x)))) + project(cond).

    ``resample`` acts on ``x`` too. Where x has another shape than the result, it goes through the
    linear map ``shortcut``.

    Attributes:
      features: number of channels of the result; 0 means as many as ``x`` has.
      init_scale: variance scale of the second convolution; with 0 the block starts as the identity.
      resample: doubling or halving of images; None means neither.
      mapped: whether x goes through ``shortcut`` in any case.
      groups, epsilon: of the norms.
      scale_shift: ``project`` gives two vectors [a, b] = project(cond), which act after the second
        norm as (1 + a) norm(conv(...)) + b.
      names: of the modules in the order of their calls.
    """

    act: Map
    dropout: float
    features: int = 0
    scale: float = 1.0
    init_scale: float = 0.0
    resample: Map | None = None
    mapped: bool = False
    groups: tuple[int, int] = (0, 0)
    epsilon: float = 1e-6
    scale_shift: bool = False

    names: ClassVar[tuple[str, ...]] = (
        "GroupNorm_0",
        "Conv_0",
        "Dense_0",
        "GroupNorm_1",
        "Conv_1",
        "Conv_2",
    )

    @nn.nowrap
    def project(self, cond: Array, size: int, name: str) -> Array:
        return dense(self.act(cond), size, name)

    @nn.nowrap
    def shortcut(self, x: Array, features: int, name: str) -> Array:
        return Conv(features, 1, name=name)(x)

    @nn.compact
    def __call__(self, x: Array, cond: Array | None, train: bool) -> Array:
        features, resample = self.features or x.shape[-1], self.resample or (lambda h: h)
        norm1, conv1, shift, norm2, conv2, shortcut = self.names
        h = self.act(GroupNorm(self.groups[0], self.epsilon, name=norm1)(x))
        h = Conv(features, name=conv1)(resample(h))
        norm = GroupNorm(self.groups[1], self.epsilon, name=norm2)
        if cond is None:
            h = norm(h)
        elif self.scale_shift:
            both = self.project(cond, 2 * features, shift)[:, None, None, :]
            a, b = jnp.split(both, 2, axis=-1)
            h = norm(h) * (1 + a) + b
        else:
            h = norm(h + self.project(cond, features, shift)[:, None, None, :])
        h = self.act(h)
        if train and self.dropout:
            h = dropout(self.make_rng("dropout"), h, self.dropout)
        h = Conv(features, init_scale=self.init_scale, name=conv2)(h)
        x = resample(x)
        if self.mapped or x.shape != h.shape:
            x = self.shortcut(x, features, shortcut)
        return residual(x, h, self.scale)


Block = TypeVar("Block", bound=ResidualBlock)


def recomputed(block: type[Block], remat: bool) -> type[Block]:
    """``block``, or with ``remat`` the same block that is computed again for its gradient; the
    class keeps its name, because the parameters' names depend on it."""
    if not remat:
        return block
    again = nn.remat(block, static_argnums=(3,))  # train
    again.__name__ = block.__name__
    return again


class Attention(nn.Module):
    """(x + W [softmax(q kᵀ / √d) v for every head]) / scale, over all pixels of an image; q, k and
    v are affine in norm(x).

    Attributes:
      head_dim: number of channels d of every head; 0 means one head with all channels.
      groups, epsilon: of the norm; None means no norm.
      names: of the norm, the maps to q, k and v, and W.
    """

    scale: float = 1.0
    head_dim: int = 0
    groups: int | None = 0
    epsilon: float = 1e-6

    names: ClassVar[tuple[str, ...]]

    @nn.nowrap
    def affine(self, x: Array, name: str, last: bool) -> Array:
        """One of the four maps; W is the ``last``, with which attention starts as the identity."""
        return dense(x, x.shape[-1], name, ZEROS if last else None)

    @nn.compact
    def __call__(self, x: Array) -> Array:
        n, h, w, c = x.shape
        d = self.head_dim or c
        if c % d:
            raise ValueError(f"attention_head_dim={d}: give a divisor of {c} channels, or 0")
        norm, *inner, outer = self.names
        normed = x if self.groups is None else GroupNorm(self.groups, self.epsilon, name=norm)(x)

        def heads(name: str) -> Array:
            split = self.affine(normed, name, last=False).reshape(n, h * w, c // d, d)
            return split.swapaxes(1, 2).reshape(-1, h * w, d)

        mixed = attention(*map(heads, inner)).reshape(n, c // d, h * w, d).swapaxes(1, 2)
        return residual(x, self.affine(mixed.reshape(x.shape), outer, last=True), self.scale)


def head(
    h: Array,
    features: int,
    act: Map,
    outputs: int = 0,
    *,
    init_scale: float = 0.0,
    groups: int = 0,
    epsilon: float = 1e-6,
    names: tuple[str | None, str | None] = (None, None),
) -> Array:
    """conv(act(norm(h))). The means of a mixture over 256 levels need more digits than bfloat16
    has, so the convolution has at least float32 if the network has several ``outputs``."""
    h = act(GroupNorm(groups, epsilon, name=names[0])(h))
    h = at_least_float32(h) if outputs else h
    return Conv(features, init_scale=init_scale, name=names[1])(h)


def check_halvings(x: Array, levels: int, field: str) -> None:
    """Refuse images ``x`` that cannot be halved between the levels, of which ``field`` has one
    number each."""
    factor = 2 ** (levels - 1)
    if x.shape[1] % factor or x.shape[2] % factor:
        raise ValueError(
            f"images of {x.shape[1]}x{x.shape[2]} cannot be halved {levels - 1} times: crop or pad "
            f"height and width to a multiple of {factor}, or choose fewer levels than {field}"
        )


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
        bias = self.param("bias", ZEROS, (self.features,))
        if self.up:
            x, stride = upsample(x, self.fir_kernel, border=1), 1
        else:
            k = len(self.fir_kernel)
            x, stride = upfirdn(x, self.fir_kernel, pad=((k + 1) // 2, k // 2)), 2
        return convolution(x, weight, bias, stride, "VALID")


class _Resample(nn.Module):
    """Resampling by two. With ``with_conv`` it includes a 3x3 convolution to ``features`` channels;
    0 means as many as the input has. Without a filter, this convolution has the name ``conv`` and
    the ``padding``."""

    up: ClassVar[bool]
    with_conv: bool
    fir_kernel: tuple[float, ...] | None
    features: int = 0
    padding: Padding = "SAME"
    conv: str = "Conv_0"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        if not self.with_conv:
            return (upsample if self.up else downsample)(x, self.fir_kernel)
        features = self.features or x.shape[-1]
        if self.fir_kernel is not None:
            return Conv2d(features, self.fir_kernel, self.up)(x)
        stride, x = (1, upsample(x, None)) if self.up else (2, x)
        return Conv(features, 3, stride, padding=self.padding, name=self.conv)(x)


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
