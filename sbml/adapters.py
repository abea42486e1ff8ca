"""From a Flax network to a score: score = -e / sigma, with e computed from the network's output.

The network F gets an input and a label of the time. A prediction of the noise e is computed from
its output by ``sbml.predictions``, for x = alpha x_0 + sigma e. The parameterizations, by their
names in a config, are

    noise            F predicts the noise (Song et al.'s VP and subVP)
    score            s = F (their VE without model.scale_by_sigma)
    scaled_score     s = F / sigma (their VE with model.scale_by_sigma)
    preconditioned   e = c_skip x + c_out F (Karras et al., EDM, NeurIPS 2022, for any linear SDE)
    residual         F predicts e - x (VDM)
    x0, velocity     F predicts x_0 or alpha e - sigma x_0
    levels           F gives weights of the levels, and Bayes' rule gives x_0 (``sbml.integers``)

The input of ``preconditioned``, ``x0``, ``velocity`` and ``levels`` is x / sqrt(v), which has unit
variance at every noise level: v = alpha^2 d^2 + sigma^2 for data of standard deviation d. The term
c_skip x of ``preconditioned`` is the noise prediction of the best linear denoiser of white data.
Without such a term, a network's prediction for an unusual test image can be far too large.

The labels of a time t are

    time             999 t (Song et al.); it hardly changes below t = 1e-3, where for ``VP`` a fifth
                     of the importance-sampled times lie
    log_snr          lambda(eps) - lambda(t)
    sigma            sigma(t), for Fourier embeddings of log sigma
    scaled_log_snr   1000 (l_1 - lambda(t)) / (l_1 - l_0), where l_0 < l_1 are two fixed numbers,
                     which may differ from the ends of lambda (VDM)

Embeddings have frequencies of up to one radian for each unit of the label. If a label changes much
faster than the log-SNR, so does the network's output, and the probability-flow ODE becomes stiff.

A function that is no Flax network becomes a score by ``from_prediction`` (``sbml.predictions``).
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float, Integer

from sbml import compiler, integers, scalars
from sbml.predictions import NOISE
from sbml.predictions import from_prediction as from_prediction
from sbml.sdes import SDE, Kernel
from sbml.types import Array, Batch, Example, Key, Pixels, Scalar, Vector, check_key

Condition = Integer[Array, ""] | Float[Array, ""] | int

LEVELS = "levels"
# All but ``levels`` are keys of ``predictions.NOISE``.
PARAMETERIZATIONS = (
    *("noise", "score", "scaled_score", "preconditioned", "residual", "x0", "velocity"),
    LEVELS,
)
SCALED = ("preconditioned", "x0", "velocity", LEVELS)  # The input of these is x / sqrt(v).
LABELS = ("time", "log_snr", "sigma", "scaled_log_snr")


@dataclasses.dataclass(frozen=True)
class Adapter:
    """``adapter(params)`` is a score (see ``sbml.types``) of the network ``model``.

    Attributes:
      model: a Linen module called as ``model(x (n, *s), label (n,), train=...)``.
      sde: the forward process, an SDE or the noise levels of a discrete-time one.
      parameterization: one of ``PARAMETERIZATIONS``.
      label: ``time``, ``log_snr``, ``sigma`` or ``scaled_log_snr``.
      data_std: d, the data's standard deviation in [-1, 1].
      eps: the smallest time, where the ``log_snr`` label is 0.
      labels: an SDE from which labels are computed, if it is not ``sde``. A network that is trained
        on the noise levels ``sde`` and evaluated with an SDE then gets the same label for the same
        log-SNR in both.
      log_snr_range: (l_0, l_1), for ``scaled_log_snr``; the default is VDM's.
      levels: the number of levels L, for the parameterization ``levels``. The model then gives
        ``integers.outputs(L)`` numbers for each entry of an example.
      data: for the parameterization ``levels``, ``centre`` if the data are bin centres, or
        ``uniform`` if they are spread evenly over their bins.

    Raises:
      ValueError: for an unknown parameterization or label, a ``data_std`` that is not positive and
        finite, l_0 >= l_1, or an ``eps`` outside the SDE's times; and with ``levels``, for too few
        levels, unknown ``data`` or a model with one output for each entry.
    """

    model: nn.Module
    sde: Kernel
    parameterization: str = "noise"
    label: str = "time"
    data_std: float = 0.5
    eps: float = 1e-5
    labels: SDE | None = None
    log_snr_range: tuple[float, float] = (-5.0, 13.3)
    levels: int = 0
    data: str = "uniform"

    def __post_init__(self) -> None:
        if self.parameterization not in PARAMETERIZATIONS:
            raise ValueError(
                f"unknown parameterization {self.parameterization!r}; "
                f"choose from {PARAMETERIZATIONS}"
            )
        if self.label not in LABELS:
            raise ValueError(f"unknown time label {self.label!r}; choose from {LABELS}")
        scalars.check_positive(self.data_std, "data_std", finite=True)
        if self.parameterization == LEVELS:
            if self.levels < 2 or self.data not in integers.DATA:
                raise ValueError(
                    f"levels={self.levels}, data={self.data!r}: an integer denoiser needs 2 levels "
                    f"or more, and data of {integers.DATA}"
                )
            if getattr(self.model, "outputs", None) is None:
                raise ValueError(
                    f"{type(self.model).__name__} has no field outputs: an integer denoiser needs "
                    "a network that gives several numbers for every entry"
                )
        least, largest = self.log_snr_range
        if not least < largest:
            raise ValueError(f"log_snr_range={self.log_snr_range}: the first must be the smaller")
        self.sde.check_time(self.eps)

    def init(self, key: Key, shape: tuple[int, ...]) -> Any:
        """Parameters for examples of shape ``shape``.

        Raises:
          ValueError: ``key`` is not one typed key.
        """
        check_key(key)
        return self.model.init(key, jnp.zeros((1, *shape)), jnp.ones((1,)), train=False)["params"]

    def __call__(self, params: Any, condition: Condition | None = None) -> "LinenScore":
        """The score; ``condition``, a scalar, is the class for a class-conditional model."""
        return LinenScore(self, params, condition)

    def time_label(self, t: Vector) -> Vector:
        """The labels ``(n,)`` that the network gets for the times ``t (n,)``."""
        sde = self.labels or self.sde
        if self.labels:
            t = self.labels.time(self.sde.log_snr(t))
        if self.label == "time":
            return 999.0 * t
        if self.label == "sigma":
            return sde.std(t)
        if self.label == "scaled_log_snr":
            least, largest = self.log_snr_range
            return 1000.0 * (largest - sde.log_snr(t)) / (largest - least)
        return sde.log_snr(jnp.asarray(self.eps, t.dtype)) - sde.log_snr(t)

    def network_input(self, x: Batch, t: Vector) -> Batch:
        """The network's input for ``x (n, *s)`` at ``t (n,)``."""
        if self.parameterization not in SCALED:
            return x
        v = (self.sde.mean_coef(t) * self.data_std) ** 2 + self.sde.std(t) ** 2
        return _per_example(1 / jnp.sqrt(v), x) * x

    def noise(self, out: Array, x: Batch, t: Vector) -> Batch:
        """E[e | x_t] from the network's outputs, ``(n, *s)``."""
        alpha, sigma = (_per_example(c, x) for c in (self.sde.mean_coef(t), self.sde.std(t)))
        if self.parameterization == LEVELS:
            y, rho = x / alpha, sigma / alpha
            x_0 = integers.posterior_mean(out, y, rho, self.levels, self.data)
            # y = x_0 + rho e has the same noise e as x.
            return NOISE["x0"](x_0, y, jnp.ones_like(alpha), rho, self.data_std)
        if out.shape != x.shape:
            raise ValueError(
                f"the network returned shape {out.shape} for an input of {x.shape}: it must return "
                "one number for each entry of the input"
            )
        return NOISE[self.parameterization](out, x, alpha, sigma, self.data_std)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LinenScore:
    """A score: ``__call__`` for one example, ``batch`` for many. A key turns dropout on."""

    adapter: Adapter = dataclasses.field(metadata={"static": True})
    params: Any
    condition: Condition | None = None

    def __call__(self, x: Example, t: Scalar, key: Key | None) -> Example:
        return self.batch(x[None], jnp.asarray(t)[None], key)[0]

    def batch(self, x: Batch, t: Vector, key: Key | None) -> Batch:
        """Scores of ``x (n, *s)`` at ``t (n,)``; one key for the whole batch."""
        noise = self.adapter.noise(self._network(x, t, key), x, t)
        return -noise / _per_example(self.adapter.sde.std(t), x)

    def decoder_nats(self, y: Example, t: Scalar, pixels: Pixels) -> Scalar:
        """-log p(pixels | x_t) of one example, x_t = alpha y: nats, a scalar.

        Raises:
          ValueError: the parameterization is not ``levels``, or the data are not bin centres.
        """
        a = self.adapter
        if a.parameterization != LEVELS or a.data != "centre":
            raise ValueError(
                f"a score with parameterization={a.parameterization!r} of data={a.data!r} has no "
                "learned decoder: train with score.parameterization=levels and "
                "data.dequantization=centre, or evaluate another dequantizer"
            )
        alpha = a.sde.mean_coef(t)
        out = self._network((alpha * y)[None], t[None], None)[0]
        return integers.decoder_nats(out, y, a.sde.std(t) / alpha, pixels, a.levels)

    def _network(self, x: Batch, t: Vector, key: Key | None) -> Array:
        """The output of F for its input and label, ``(n, *s)``, or with a last axis of outputs."""
        compiler.check()
        if key is not None:
            check_key(key)
        a = self.adapter
        options: dict[str, Any] = {}
        if self.condition is not None:
            options["condition"] = jnp.broadcast_to(self.condition, t.shape)
        out: Any = a.model.apply(
            {"params": self.params},
            a.network_input(x, t),
            a.time_label(t),
            train=key is not None,
            rngs=None if key is None else {"dropout": key},
            **options,
        )
        return out


def _per_example(c: Vector, x: Batch) -> Array:
    """``c (n,)`` with axes of 1, to be multiplied with ``x (n, *s)``."""
    return jnp.asarray(c).reshape(*jnp.shape(c), *(1,) * (x.ndim - 1))
