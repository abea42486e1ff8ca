"""From the output F of a network to a score, by one table for foreign networks and our own.

With x_t = alpha x_0 + sigma e, the score is -e / sigma. F ~ y means that the network is trained to
predict y. Let d be the data's standard deviation, v = alpha^2 d^2 + sigma^2 and u = x_t / sqrt(v):

    kind             F ~ y                  e                                               input
    noise            e                      F                                               x_t
    score            -e / sigma             -sigma F                                        x_t
    scaled_score     -e                     -F                                              x_t
    preconditioned                          sigma / v x_t + alpha d / sqrt(v) F             u
    residual         e - x_t                x_t + F                                         x_t
    x0               x_0                    (x_t - alpha F) / sigma                         x_t, u
    velocity         alpha e - sigma x_0    (sigma x_t + alpha F) / (alpha^2 + sigma^2)     x_t, u
    flow             e - x_0                (x_t + alpha F) / (alpha + sigma)               x_t
    edm                                     sigma / v x_t - alpha d / sqrt(v) F             u
    levels           weights of levels      (x_t - alpha x^) / sigma, x^ by Bayes' rule     u

The input u has unit variance at every noise level. For ``x0`` and ``velocity``, u is the input of
networks of this package (:class:`Adapter`), and x_t that of others
(:func:`sbml.score.from_prediction`).
Song et al. have ``noise`` (VP and subVP), ``score`` and ``scaled_score`` (VE without and with
model.scale_by_sigma), and VDM has ``residual``. ``edm`` is the form of Karras et al., and
``preconditioned`` the same with the opposite sign: its first term is the best linear denoiser of
white data, and the target of F has unit variance. Without such a term, a network's prediction for
an unusual test image can be far too large. ``levels`` is described in ``sbml.integers``.

*No signal.* Where alpha = 0, x_t is pure noise. For three kinds the table has a formula of x_0
without a division by alpha:

    x0               x_0 = F
    velocity         x_0 = (alpha x_t - sigma F) / (alpha^2 + sigma^2)
    flow             x_0 = (x_t - sigma F) / (alpha + sigma)

If alpha(T) = 0, as for ``RectifiedFlow`` and ``Cosine``, the scores of these kinds have
``predictions`` (``sbml.types``). Their probability-flow ODE runs up to T and its prior is exact, if
the slope of alpha at T is finite and not 0. The ODE of any other kind or schedule ends at the SDE's
``largest_time``, where alpha / sigma = 1e-3, and the remaining signal is neglected. For data of
mean m, the mean of log p is then too small by 1e-6 |m|^2 / 2 nats, and log p of one example has an
error of about 1e-3 |m| nats of either sign.

*Labels.* The second input of a foreign network is t, or log(sigma / alpha) / 4 for ``edm``. For
networks of this package it is one of these, where lambda is the log-SNR:

    time             999 t (Song et al.), or another multiple of t; it hardly changes below
                     t = 1e-3, where for ``VP`` a fifth of the importance-sampled times lie
    log_snr          lambda(eps) - lambda(t)
    sigma            sigma(t), for Fourier embeddings of log sigma
    scaled_log_snr   1000 (l_1 - lambda(t)) / (l_1 - l_0), where l_0 < l_1 are two fixed numbers,
                     which may differ from the ends of lambda (VDM)
    c_noise          log(sigma / alpha) / 4 (EDM)

If alpha(T) = 0, lambda(T) is -infinity. Here lambda is therefore constant from ``largest_time`` on;
the times of training end there. Embeddings have frequencies of up to one radian for each unit of
the label. If a label changes much faster than the log-SNR, so does the network's output, and the
probability-flow ODE becomes stiff.

References: Salimans & Ho 2022 (velocity); Lipman et al. 2023 and Liu et al. 2023 (flow matching);
Karras et al. 2022 (EDM).
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Annotated, ClassVar, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float, Integer

from sbml.core import pytrees, scalars
from sbml.core.door import checked, condition, typed
from sbml.core.registry import Registry
from sbml.core.scalars import Number, Positive, one_of, positive
from sbml.core.types import (
    Array,
    Batch,
    Example,
    Key,
    Pixels,
    PyTree,
    Real,
    Scalar,
    Vector,
    check_function,
    of_shape,
)
from sbml.score import integers
from sbml.sdes import SDE, Kernel

Network = Callable[..., Array]  # of x_t and t, of one example or of a batch
Pair = Callable[[Example, Scalar], tuple[Example, ...]]  # of x and t: x_0 and e
# The class of an example, or of each example of a batch.
Condition = Integer[Array, "..."] | Float[Array, "..."] | int


class OfData(NamedTuple):
    """What the formulas use of the data: d and, for ``levels``, two fields of :class:`Adapter`."""

    std: Number
    levels: int = 0
    kind: str = "uniform"


Formula = Callable[[Real, Real, Real, Real, OfData], Real]  # of F, x_t, alpha, sigma and the data
X, U = "x_t", "x_t / sqrt(v)"  # the inputs


@dataclasses.dataclass(frozen=True)
class Prediction:
    """A row of the table; an input is None if there are no such networks."""

    noise: Formula
    denoised: Formula | None = None  # x_0, if it does not divide by alpha
    foreign: str | None = X  # the input of a foreign network
    ours: str | None = X  # the input of a network of this package
    label: Callable[[Kernel, Scalar], Scalar] = lambda sde, t: t  # of a foreign network


def _preconditioned(f: Real, x: Real, alpha: Real, sigma: Real, data: OfData) -> Real:
    v = (alpha * data.std) ** 2 + sigma**2
    return sigma / v * x + alpha * data.std / jnp.sqrt(v) * f


def _of_levels(f: Real, x: Real, alpha: Real, sigma: Real, data: OfData) -> Real:
    y, rho = x / alpha, sigma / alpha  # y = x_0 + rho e
    return (y - integers.posterior_mean(f, y, rho, data.levels, data.kind)) / rho


LEVELS = "levels"
KINDS = {
    "noise": Prediction(lambda f, x, a, s, data: f),
    "score": Prediction(lambda f, x, a, s, data: -s * f),
    "scaled_score": Prediction(lambda f, x, a, s, data: -f),
    "preconditioned": Prediction(_preconditioned, foreign=U, ours=U),
    "residual": Prediction(lambda f, x, a, s, data: x + f),
    "x0": Prediction(lambda f, x, a, s, data: (x - a * f) / s, lambda f, *_: f, ours=U),
    "velocity": Prediction(
        lambda f, x, a, s, data: (s * x + a * f) / (a**2 + s**2),
        lambda f, x, a, s, data: (a * x - s * f) / (a**2 + s**2),
        ours=U,
    ),
    "flow": Prediction(
        lambda f, x, a, s, data: (x + a * f) / (a + s),
        lambda f, x, a, s, data: (x - s * f) / (a + s),
    ),
    "edm": Prediction(
        lambda f, x, a, s, data: _preconditioned(-f, x, a, s, data),
        foreign=U,
        ours=U,
        label=lambda sde, t: 0.25 * jnp.log(sde.std(t) / sde.mean_coef(t)),
    ),
    LEVELS: Prediction(_of_levels, foreign=None, ours=U),
}
FOREIGN = tuple(kind for kind, entry in KINDS.items() if entry.foreign)
PREDICTIONS = Registry("prediction", KINDS, Prediction)
# Those of the networks of this package, to which users can add their own.
PARAMETERIZATIONS = Registry(
    "parameterization", {k: v for k, v in KINDS.items() if v.ours}, Prediction
)
KIND = condition(f"among {', '.join(PARAMETERIZATIONS)}", PARAMETERIZATIONS.__contains__)
LABELS = ("time", "log_snr", "sigma", "scaled_log_snr", "c_noise")
LogSnrRange = Annotated[
    tuple[float, float], condition("of which the first is smaller", lambda ends: ends[0] < ends[1])
]


def _input(which: str | None, sde: Kernel, data_std: Number, x: Batch, t: Vector) -> Batch:
    """The network's input for ``x (n, *s)`` at ``t (n,)``."""
    alpha, sigma = sde.of_network.mean_coef(t), sde.of_network.std(t)
    x = sde.to_network(x, _like(alpha, x))
    if which == X:
        return x
    return _like(1 / jnp.sqrt((alpha * data_std) ** 2 + sigma**2), x) * x


def _like(c: Real, x: Real) -> Real:
    """``c ()`` or ``(n,)`` with axes of 1, to be multiplied with ``x (*s)`` or ``(n, *s)``."""
    return jnp.asarray(c).reshape(*jnp.shape(c), *(1,) * (x.ndim - jnp.ndim(c)))


@pytrees.register
@dataclasses.dataclass(frozen=True)
class NetworkScore:
    """The score -e / sigma of a network: ``__call__`` for one example, ``batch`` for many.

    It is a pytree. A key turns dropout on.

    Attributes:
      how: the network and its row of the table, :class:`Foreign` or :class:`Adapter`.
      params: the parameters of the adapter's network; None for a foreign network.
      condition: the condition of a conditional network, or None; for ``batch`` of an adapter also
        one of each example.
    """

    how: "Foreign | Adapter"
    params: PyTree = None
    condition: PyTree = None

    def given(self, condition: PyTree) -> "NetworkScore":
        """The score under ``condition``."""
        return dataclasses.replace(self, condition=condition)

    @checked
    def __call__(self, x: Example, t: Scalar, key: Key | None = None) -> Example:
        """grad_x log p_t(x) of one example, shape ``(*s)``."""
        return self.batch(x[None], jnp.asarray(t)[None], key)[0]

    def batch(self, x: Batch, t: Vector, key: Key | None) -> Batch:
        """Scores of ``x (n, *s)`` at ``t (n,)``; one key for the whole batch."""
        (noise,) = self._of(x, t, key, PREDICTIONS[self.how.parameterization].noise)
        return -noise / _like(self.sde.std(t), x)

    @property
    def sde(self) -> Kernel:
        """The forward process."""
        return self.how.sde

    @property
    def predictions(self) -> Pair | None:
        """E[x_0 | x_t] and E[e | x_t] of one example by one call of the network; None if x_0
        divides by alpha, or if the score is enough for the ODE."""
        entry, is_adapter = PREDICTIONS[self.how.parameterization], isinstance(self.how, Adapter)
        # The ODE always takes the predictions of a foreign network.
        if entry.denoised is None or (is_adapter and not _vanishes(self.sde)):
            return None
        both = entry.denoised, entry.noise

        def one(x: Example, t: Scalar) -> tuple[Example, Example]:
            x_0, noise = self._of(x[None], jnp.asarray(t)[None], None, *both)
            return self.sde.from_network(x_0[0]), noise[0]

        return one

    @property
    def decoder_nats(self) -> Callable[[Example, Scalar, Pixels], Scalar] | None:
        """-log p(pixels | x_t) of one example, x_t = alpha y, as a function of y, t and the pixels:
        nats, a scalar. None unless the network is an integer denoiser of bin centres."""
        return self._decoder(integers.decoder_nats)

    @property
    def decoder_log_p(self) -> Callable[[Example, Scalar], Array] | None:
        """log p(k | x_t) of all levels k in nats, ``(*s, levels)``, as :attr:`decoder_nats`."""
        return self._decoder(integers.decoder_log_p)

    def _decoder(self, formula: Callable[..., Array]) -> Callable[..., Array] | None:
        """``formula`` of the network's outputs for x_t = alpha y; None without a decoder."""
        if (self.how.parameterization, self.how.data) != (LEVELS, "centre"):
            return None

        def at(y: Example, t: Scalar, *pixels: Pixels) -> Array:
            alpha = self.sde.mean_coef(t)
            x = (alpha * y)[None]
            (out,) = self.how.outputs(self.params, x, t[None], self.condition, None)
            return formula(out, y, self.sde.std(t) / alpha, *pixels, self.how.levels)

        return at

    def _of(self, x: Batch, t: Vector, key: Key | None, *formulas: Formula) -> tuple[Batch, ...]:
        """The value of each formula, ``(n, *s)``, by one call of the network."""
        f = self.how.outputs(self.params, x, t, self.condition, key)
        data = OfData(self.how.data_std, self.how.levels, self.how.data)
        sde = self.sde.of_network
        alpha, sigma = _like(sde.mean_coef(t), x), _like(sde.std(t), x)
        x = self.sde.to_network(x, alpha)
        return tuple(formula(f, x, alpha, sigma, data) for formula in formulas)


@pytrees.register
@dataclasses.dataclass(frozen=True)
class Foreign:
    """A network that predicts ``parameterization``: see :func:`from_prediction`.

    It is a pytree. Its leaves are the numbers of the SDE, ``data_std`` and, if the network is a
    pytree, the network's parameters.
    """

    network: Network
    parameterization: str
    sde: Kernel
    data_std: Number
    batched: bool = False

    levels: ClassVar[int] = 0
    data: ClassVar[str] = "uniform"

    def outputs(
        self, params: None, x: Batch, t: Vector, condition: PyTree, key: Key | None
    ) -> Batch:
        """F, ``(n, *s)``."""
        entry = PREDICTIONS[self.parameterization]
        seen = _input(entry.foreign, self.sde, self.data_std, x, t)
        told = jnp.asarray(entry.label(self.sde.of_network, t))
        if len(x) > 1:
            one = functools.partial(self._of_one, condition)
            return jax.vmap(one)(seen, told)
        return self._of_one(condition, seen[0], told[0])[None]

    def _of_one(self, condition: PyTree, x: Example, t: Scalar) -> Example:
        arguments = (x, t) if condition is None else (x, t, condition)
        if self.batched:
            return of_shape(self._in_batch_of_one(*arguments), x)
        try:
            return of_shape(self.network(*arguments), x)
        except Exception as error:
            if self._takes_batches(*arguments):
                raise ValueError(
                    f"the network fails for one example of shape {x.shape}, and not for a batch of "
                    "one: give from_prediction(..., batched=True)"
                ) from error
            raise

    def _in_batch_of_one(self, *arguments: PyTree) -> Array:
        result: Array = self.network(*jax.tree.map(lambda a: jnp.asarray(a)[None], arguments))[0]
        return result

    def _takes_batches(self, *arguments: PyTree) -> bool:
        try:
            shape = jax.eval_shape(self._in_batch_of_one, *arguments).shape
            return bool(shape == jnp.shape(arguments[0]))
        except Exception:
            return False


@checked
def from_prediction(
    network: Network,
    kind: Annotated[str, one_of(*FOREIGN)],
    sde: Kernel,
    *,
    data_std: Annotated[Number, positive] = 0.5,
    batched: bool = False,
) -> NetworkScore:
    """The score (``sbml.types``) of a function that predicts ``kind``.

    Args:
      network: ``network(x_t, t)`` of one example ``(*s)`` and its time ``()``, shape ``(*s)``, or
        ``network(x_t, t, condition)`` of a conditional model. If a
        network was trained with another label than t, wrap it: ``lambda x, t: net(x, 1000 * t)``.
        For ``edm`` and ``preconditioned`` it gets the inputs that the module's docstring states.
      kind: the name of the prediction, one of those in the module's docstring except ``levels``.
      sde: the forward process that the network was trained on.
      data_std: the standard deviation d of the data, for ``edm`` and ``preconditioned``.
      batched: whether ``network`` takes batches, ``x_t (n, *s)`` and ``t (n,)``.
    """
    check_function(network, "network", "x", "t", optional="condition")
    if not scalars.is_traced(data_std):
        data_std = float(data_std)
    return NetworkScore(Foreign(network, kind, sde, data_std, batched))


@typed
@dataclasses.dataclass(frozen=True)
class Adapter:
    """``adapter(params)`` is a score (see ``sbml.types``) of the Linen network ``model``.

    Attributes:
      model: a Linen module called as ``model(x (n, *s), label (n,), train=...)``.
      sde: the forward process, an SDE or the noise levels of a discrete-time one.
      parameterization: one of ``PARAMETERIZATIONS``, the kinds of networks of this package.
      label: one of ``LABELS``.
      data_std: d, the data's standard deviation in [-1, 1].
      eps: the smallest time, where the ``log_snr`` label is 0.
      labels: an SDE from which labels are computed, if it is not ``sde``. A network that is trained
        on the noise levels ``sde`` and evaluated with an SDE then gets the same label for the same
        log-SNR in both.
      log_snr_range: (l_0, l_1), for ``scaled_log_snr``; the default is VDM's.
      time_scale: the label ``time`` is this number times t.
      levels: the number of levels L, for the parameterization ``levels``. The model then gives
        ``integers.outputs(L)`` numbers for each entry of an example.
      data: for the parameterization ``levels``, ``centre`` if the data are bin centres, or
        ``uniform`` if they are spread evenly over their bins.
    """

    model: nn.Module
    sde: Kernel
    parameterization: Annotated[str, KIND] = "noise"
    label: Annotated[str, one_of(*LABELS)] = "time"
    data_std: Positive = 0.5
    eps: float = 1e-5
    labels: SDE | None = None
    log_snr_range: LogSnrRange = (-5.0, 13.3)
    time_scale: Positive = 999.0
    levels: int = 0
    data: integers.Kind = "uniform"

    def __post_init__(self) -> None:
        if self.parameterization == LEVELS:
            if self.sde.of_network is not self.sde:
                raise ValueError(
                    f"sde={self.sde}: the levels of an integer denoiser are those of this "
                    "package's data; use no Rescaled process"
                )
            needed = integers.outputs(self.levels)
            if getattr(self.model, "outputs", None) is None:
                raise ValueError(
                    f"{type(self.model).__name__} has no field outputs: an integer denoiser needs "
                    f"a network that gives {needed} numbers for every entry"
                )
        self.sde.check_time(self.eps)

    def init(self, key: Key, shape: tuple[int, ...]) -> PyTree:
        """Parameters for examples of shape ``shape``."""
        x, label = jnp.zeros((1, *shape)), jnp.ones((1,))
        init = functools.partial(self.model.init, key, x, label, train=False)
        return (init(condition=jnp.zeros((1,))) if self.classes else init())["params"]

    @property
    def classes(self) -> int:
        """The number of classes of a network with a field ``classes`` whose call takes a
        ``condition``; 0 of any other."""
        takes = "condition" in inspect.signature(self.model.__call__).parameters
        return getattr(self.model, "classes", 0) if takes else 0

    def __call__(self, params: PyTree, condition: Condition | None = None) -> NetworkScore:
        """The score; ``condition``, a scalar, is the class for a class-conditional model."""
        return NetworkScore(self, params, condition)

    def outputs(
        self, params: PyTree, x: Batch, t: Vector, condition: Condition | None, key: Key | None
    ) -> Array:
        """F, ``(n, *s)``, or for ``levels`` with a last axis of outputs; a key turns dropout on."""
        apply = functools.partial(
            self.model.apply,
            {"params": params},
            self.network_input(x, t),
            self.time_label(t),
            train=key is not None,
            rngs=None if key is None else {"dropout": key},
        )
        given = None if condition is None else jnp.broadcast_to(condition, t.shape)
        f = cast(Array, apply() if given is None else apply(condition=given))
        return f if self.parameterization == LEVELS else of_shape(f, x)

    def time_label(self, t: Vector) -> Vector:
        """The labels ``(n,)`` that the network gets for the times ``t (n,)``."""
        sde = (self.labels or self.sde).of_network
        if self.labels:
            t = self.labels.time(self.sde.log_snr(t))
        if self.label == "time":
            return self.time_scale * t
        if self.label == "sigma":
            return sde.std(t)
        log_snr = sde.log_snr(jnp.minimum(t, sde.largest_time) if _vanishes(sde) else t)
        if self.label == "c_noise":
            return -0.125 * log_snr
        if self.label == "log_snr":
            return sde.log_snr(jnp.asarray(self.eps, t.dtype)) - log_snr
        least, largest = self.log_snr_range
        return 1000.0 * (largest - log_snr) / (largest - least)

    def network_input(self, x: Batch, t: Vector) -> Batch:
        """The network's input for ``x (n, *s)`` at ``t (n,)``."""
        which = PREDICTIONS[self.parameterization].ours
        return _input(which, self.sde, self.data_std, x, t)


def _vanishes(sde: Kernel) -> bool:
    """Whether alpha(T) = 0; False for an SDE whose numbers are traced."""
    return not scalars.is_traced(sde.largest_time) and bool(sde.largest_time < sde.T)
