"""Is a continuous log p right? It is computed from exact fields of data whose density is known.

    x_t = alpha(t) x_0 + sigma(t) S z,     dx/dt = v(x, t),     x_1 ~ N(0, S^2 I)

    kind        alpha, sigma                     the field                v
    velocity    1 - t, t                         E[S z - x_0 | x_t]       the field
    score       VP: alpha^2 + sigma^2 = 1,       s = grad log p_t         -beta (x + S^2 s) / 2
    noise       beta = 0.1 + 19.9 t              e = E[z | x_t]           with s = -e / (sigma S)

S is 1 but for the wide prior. The checks, in worlds of 1, 2 and 16 dimensions:

    value         log p of examples is right; with random probes, its mean over seeds
    time          only if a value is wrong: whether it is right for data at t = 1
    normalised    exp(log p) integrates to 1 (quadrature in 1 and 2 dimensions)
    repeatable    the same seed gives the same numbers, bit by bit
    independent   log p of an example does not depend on its batch. A difference below the tolerance
                  is a ``note``: the steps of a solve depend on all examples of the batch
    float32       log p of float32 examples is right
    rescaled      log p(c x) of data c x is log p(x) - d log c
    spread        the variance falls at least as one over the number of probes

A number is right if it differs by at most ``tolerance`` nats, plus Student's quantile for ``ALPHA``
times the standard error over seeds.
"""

import dataclasses
import math
import sys
import time
from collections.abc import Callable
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from sbml.audit import oracle
from sbml.audit.suite import ALPHA, FAIL, NOTE, PASS, UNCLEAR, Finding, Report, jackknife, limit
from sbml.core.door import checked
from sbml.core.scalars import Positive, at_least, one_of
from sbml.core.types import full_precision
from sbml.sdes import SDES

KINDS = "velocity", "score", "noise"
COARSE = 1.0  # nats


@dataclasses.dataclass(frozen=True, eq=False)
class Field:
    """The field of a world at ``x (*b, d)`` and a time that is a scalar or has the shape ``(*b)``,
    both of NumPy, JAX or PyTorch, by which it can be differentiated.

    Attributes:
      kind: ``velocity``, ``score`` or ``noise``.
      world: the data, a mixture of Gaussians.
      prior_std: S.
      reverse: whether the data are at t = 1, and the noise at t = 0.
    """

    kind: str
    world: oracle.Mixture
    prior_std: float = 1.0
    reverse: bool = False

    @full_precision
    def __call__(self, x: Any, t: Any) -> Any:
        with jax.numpy_rank_promotion("allow"):
            s, noise, x_0 = self._terms(x, 1 - t if self.reverse else t)[1:]
        flow = noise * self.prior_std - x_0
        return {"velocity": -flow if self.reverse else flow, "score": s, "noise": noise}[self.kind]

    def log_prob(self, x: np.ndarray) -> np.ndarray:
        """log p of the data ``x (*b, d)``, ``(*b)``."""
        return np.asarray(self._terms(x, 0.0)[0])

    def _terms(self, x: Any, t: Any) -> tuple[Any, Any, Any, Any]:
        """log p_t(x), its gradient, E[z | x] and E[x_0 | x]."""
        xp: Any = jnp if isinstance(x, jax.Array) or isinstance(t, jax.Array) else np
        if type(x).__module__.partition(".")[0] == "torch":
            xp = sys.modules["torch"]
        parts, weights = self.world.parts, np.log(np.asarray(self.world.weights, float))
        given = t, weights, parts.mean, parts.eigenvalues, parts.basis
        own = (each if xp is jnp or each is t else np.asarray(each, float) for each in given)
        t, log_w, mean, values, basis = (xp.asarray(each, dtype=x.dtype) for each in own)
        a, sigma = 1 - t, t
        if self.kind != "velocity":
            log_a = -0.25 * 19.9 * t**2 - 0.05 * t
            a, sigma = xp.exp(log_a), xp.sqrt(-xp.expm1(2 * log_a))
        width = self.prior_std * sigma[..., None]
        a = a[..., None, None]
        u = xp.einsum("...kd,kde->...ke", x[..., None, :] - a * mean, basis)
        v = a**2 * values + width[..., None] ** 2
        joint = log_w - 0.5 * (u**2 / v + xp.log(2 * math.pi * v)).sum(-1)
        top = xp.amax(joint, -1)[..., None]
        share = xp.exp(joint - top)
        log_p = top[..., 0] + xp.log(share.sum(-1))
        share = (share / share.sum(-1)[..., None])[..., None]

        def mixed(u: Any) -> Any:
            return (share * xp.einsum("...ke,kde->...kd", u, basis)).sum(-2)

        s = -mixed(u / v)
        return log_p, s, -width * s, (share * mean).sum(-2) + mixed(a * values * u / v)


def worlds(kind: str) -> dict[str, Field]:
    """The fields by name, with the number of dimensions at the end of the name."""

    def field(world: oracle.Mixture, std: float = 1.0, spread: float = 1.0) -> Field:
        """With moderate deviations, so that no solver finds the flow stiff."""
        mean, values = world.parts.mean, world.parts.eigenvalues
        values = jnp.broadcast_to(jnp.linspace(0.3, 0.8, values.shape[1]) ** 2, values.shape)
        if kind != "velocity":  # VP keeps 0.7% of the mean at t = 1, which no code of VP sees.
            mean = mean - (world.weights @ mean)[None]
        parts = dataclasses.replace(world.parts, mean=spread * mean, eigenvalues=values)
        return Field(kind, dataclasses.replace(world, parts=parts), std)

    found, sde = dict[str, Field](), SDES["rectified_flow"]()
    for d in (1, 2, 16):
        gaussian = oracle.as_mixture(oracle.gaussian(sde, d))
        found[f"gaussian {d}"] = field(gaussian)
        found[f"mixture {d}"] = field(oracle.mixture(sde, d), spread=3.0)
        found[f"heavy tails {d}"] = Field(kind, oracle.heavy_tails(sde, d))
        found[f"wide prior {d}"] = field(gaussian, 2.0)
    return found


@checked
def density(
    make: Callable[..., Callable[..., Any]],
    kind: Annotated[str, one_of(*KINDS)] = "velocity",
    *,
    probes: tuple[int, int] | None = None,
    reverse: bool = False,
    tolerance: Positive = 0.01,
    calls: Annotated[int, at_least(8)] = 32,
) -> Report:
    """Check a function that computes log p of continuous data from a field.

    Args:
      make: a function of (field, shape) that gives log_prob, a function of a batch ``(n, *shape)``
        of NumPy that gives ``(n,)`` numbers in nats, of NumPy, JAX or PyTorch. The
        :class:`~sbml.audit.continuous.Field` also says its ``prior_std``. With ``probes``,
        make(field, shape, probes=k, seed=i).
      kind: what the field is, see the top of this page.
      probes: a smaller and a larger number of random probes; None for an exact log p.
      reverse: whether time runs from noise at t = 0 to data at t = 1. beta is then that of 1 - t.
      tolerance: the largest error in nats that is right.
      calls: the number of seeds over which a mean is taken, with ``probes``.

    Raises:
      ValueError: log_prob does not return one number for each example, or ``probes`` do not grow.
    """
    if probes is not None and not 0 < probes[0] < probes[1]:
        raise ValueError(f"probes={probes}: give a smaller and a larger number, such as (1, 16)")
    start, findings = time.perf_counter(), list[Finding]()
    named = {k: dataclasses.replace(f, reverse=reverse) for k, f in worlds(kind).items()}

    def numbers(field: Field, x: np.ndarray, k: int = 1) -> np.ndarray:
        """log p ``(calls, n)``, of one call if there are no probes; ``k`` is the place in them."""
        found = []
        for i in range(calls if probes else 1):
            how = {"probes": probes[k], "seed": i} if probes else {}
            given = make(field, x.shape[1:], **how)(x)
            found.append(np.asarray(getattr(given, "detach", lambda g=given: g)(), float))
            if found[-1].shape != (len(x),):
                got = f"log_prob returned shape {found[-1].shape} for {len(x)} examples"
                raise ValueError(f"{got}: return one number for each, (n,)")
        return np.stack(found)

    def put(check: str, name: str, ok: Any, words: str, value: Any = math.nan, by: Any = 0) -> None:
        verdict = FAIL if not ok else UNCLEAR if by > COARSE else PASS
        findings.append(Finding(check, name, verdict, float(value), float(by), words))

    def right(check: str, name: str, gap: np.ndarray, words: str, rounding: float = 1.0) -> bool:
        """The mean of ``gap (calls, n)`` over the calls, where it exceeds its tolerance most."""
        mean, n = np.abs(gap.mean(0)), len(gap)
        by = tolerance + np.asarray(limit(gap.std(0, ddof=1) / n**0.5, n) if n > 1 else 0 * mean)
        i = int(np.argmax(np.where(np.isnan(mean), np.inf, mean - by)))
        ok = bool(mean[i] <= by[i])
        put(check, name, ok, f"{words} {mean[i]:.2g} nats, at most {by[i]:.2g}", mean[i], by[i])
        if ok and mean[i] > by[i] - tolerance + rounding:
            findings[-1] = dataclasses.replace(findings[-1], verdict=NOTE)
        return ok

    for name, field in named.items():
        x = field.world.sample(0, 8)
        gap = numbers(field, x) - field.log_prob(x)
        if not right("value", name, gap, "an error of") and name == "gaussian 1":
            other = dataclasses.replace(field, reverse=not reverse)
            off = np.abs((numbers(other, x) - field.log_prob(x)).mean(0)).max() > tolerance
            put("time", name, off, f"{'wrong' if off else 'right'} with reverse={not reverse}")
    for d in (1, 2):
        field, side = named[name := f"mixture {d}"], np.linspace(-5, 5, 33)
        z = np.stack(np.meshgrid(*[side] * d), -1).reshape(-1, d)
        nats = -d * math.log(side[1] - side[0]) - numbers(field, z)
        total, stderr = jackknife(nats) if probes else (np.exp(-nats).sum(), 0.0)
        by = tolerance + limit(stderr, calls)
        words = f"the density integrates to {total:.4g} +- {by:.2g}"
        put("normalised", name, abs(total - 1) <= by, words, total, by)
    field = named[name := "gaussian 16"]
    usual = numbers(field, x := field.world.sample(0, 8))
    agree = usual.tobytes() == numbers(field, x).tobytes()
    put("repeatable", name, agree, f"two calls with one seed {'agree' if agree else 'differ'}")
    others = x[:1], np.concatenate([x[:1], 3 * x[1:]])
    gap = np.stack([numbers(field, batch)[:, 0] - usual[:, 0] for batch in others], 1)
    rounding = 1e-10 if np.any(usual != usual.astype(np.float32)) else 1e-4  # of float64 or 32
    right("independent", name, gap, "alone or in another batch, log p differs by", rounding)
    low = x.astype(np.float32)
    right("float32", name, numbers(field, low) - field.log_prob(low.astype(float)), "an error of")
    scaled = dataclasses.replace(field, world=field.world.affine(2 * np.eye(16), np.zeros(16)))
    gap = numbers(scaled, 2 * x) + 16 * math.log(2) - usual
    right("rescaled", name, gap, "log p(2 x) + d log 2 differs from log p(x) by")
    if probes:
        few, many = (numbers(field, x, k).var(0, ddof=1).mean() for k in (0, 1))
        ratio = many * probes[1] / max(few * probes[0], 1e-12)
        most = stats.f.isf(ALPHA, calls - 1, calls - 1)
        words = f"the variance times the number of probes grows by {ratio:.2g}, at most {most:.2g}"
        put("spread", name, ratio <= most, words, ratio)
    called = getattr(make, "__name__", type(make).__name__)
    return Report(called, tuple(findings), time.perf_counter() - start)
