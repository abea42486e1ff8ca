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
from sbml.sdes import RectifiedFlow

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

    def part(d: int, seed: int, spread: float) -> oracle.Gaussian:
        found = oracle.gaussian(RectifiedFlow(), d, seed)
        deviations = jnp.linspace(0.3, 0.8, d)
        return dataclasses.replace(found, mean=spread * found.mean, eigenvalues=deviations**2)

    found = {}
    for d in (1, 2, 16):
        gaussian = oracle.as_mixture(part(d, 0, 1.0))
        three = [part(d, seed, 3.0) for seed in (1, 2, 3)]
        mixture = dataclasses.replace(
            gaussian, parts=jax.tree.map(lambda *each: jnp.stack(each), *three)
        )
        tails = oracle.heavy_tails(RectifiedFlow(), d)
        each = {"gaussian": gaussian, "mixture": mixture, "heavy tails": tails}
        if kind != "velocity":  # VP keeps 0.7% of the mean at t = 1, which no code of VP sees.
            for name, world in each.items():
                each[name] = world.affine(np.eye(d), -world.weights @ world.parts.mean)
        found |= {f"{name} {d}": Field(kind, world) for name, world in each.items()}
        found[f"wide prior {d}"] = Field(kind, each["gaussian"], 2.0)
    return found


@checked
def density(
    make: Callable[..., Callable[..., Any]],
    kind: Annotated[str, one_of(*KINDS)] = "velocity",
    *,
    probes: tuple[int, int] | None = None,
    reverse: bool = False,
    tolerance: Positive = 0.01,
    examples: Annotated[int, at_least(3)] = 8,
    calls: Annotated[int, at_least(8)] = 32,
    seed: int = 0,
) -> Report:
    """Check a function that computes log p of continuous data from a field.

    Args:
      make: a function of (field, shape) that gives log_prob, a function of a batch ``(n, *shape)``
        of NumPy that gives ``(n,)`` numbers in nats, of NumPy, JAX or PyTorch. The :class:`Field`
        also says its ``prior_std``. With ``probes``, make(field, shape, probes=k, seed=i).
      kind: what the field is, see the top of this page.
      probes: a smaller and a larger number of random probes; None for an exact log p.
      reverse: whether time runs from noise at t = 0 to data at t = 1. beta is then that of 1 - t.
      tolerance: the largest error in nats that is right.
      examples: the number of examples in each world.
      calls: the number of seeds over which a mean is taken, with ``probes``.
      seed: of the examples.

    Raises:
      ValueError: log_prob does not return one number for each example.
    """
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
                raise ValueError(
                    f"log_prob returned shape {found[-1].shape} for {len(x)} examples: return one "
                    "number for each, (n,)"
                )
        return np.stack(found)

    def put(check: str, name: str, ok: Any, words: str, value: Any = math.nan, by: Any = 0) -> None:
        verdict = FAIL if not ok else UNCLEAR if by > COARSE else PASS
        findings.append(Finding(check, name, verdict, float(value), float(by), words))

    def right(check: str, name: str, gap: np.ndarray, words: str, rounding: float = 1.0) -> bool:
        """The mean of ``gap (calls, n)`` over the calls, where it exceeds its tolerance most."""
        mean, n = np.abs(gap.mean(0)), len(gap)
        by = tolerance + (limit(gap.std(0, ddof=1) / n**0.5, n) if n > 1 else 0 * mean)
        i = int(np.argmax(np.where(np.isnan(mean), np.inf, mean - by)))
        ok = bool(mean[i] <= by[i])
        put(check, name, ok, f"{words} {mean[i]:.2g} nats, at most {by[i]:.2g}", mean[i], by[i])
        if ok and mean[i] > by[i] - tolerance + rounding:
            findings[-1] = dataclasses.replace(findings[-1], verdict=NOTE)
        return ok

    for name, field in named.items():
        x = field.world.sample(seed, examples)
        gap = numbers(field, x) - field.log_prob(x)
        if not right("value", name, gap, "an error of") and name == "gaussian 1":
            other = dataclasses.replace(field, reverse=not reverse)
            off = np.abs((numbers(other, x) - field.log_prob(x)).mean(0)).max() > tolerance
            words = f"log p is {'wrong' if off else 'right'} with reverse={not reverse}"
            put("time", name, off, words)
    for d in (1, 2):
        name, side = f"mixture {d}", np.linspace(-6, 6, {1: 97, 2: 25}[d])
        field = named[name]
        some = field.world.sample(seed, 4000)
        root = np.linalg.cholesky(np.atleast_2d(np.cov(some.T)))
        z = np.stack(np.meshgrid(*[side] * d, indexing="ij"), -1).reshape(-1, d)
        cell = d * math.log(side[1] - side[0]) + np.linalg.slogdet(root)[1]
        nats = -cell - numbers(field, some.mean(0) + z @ root.T)
        total, stderr = jackknife(nats) if probes else (np.exp(-nats).sum(), 0.0)
        by = tolerance + limit(stderr, calls)
        words = f"the density integrates to {total:.4g} +- {by:.2g}"
        put("normalised", name, abs(total - 1) <= by, words, total, by)
    name = "gaussian 16"
    field = named[name]
    x = field.world.sample(seed, examples)
    usual = numbers(field, x)
    agree = usual.tobytes() == numbers(field, x).tobytes()
    put("repeatable", name, agree, f"two calls with one seed {'agree' if agree else 'differ'}")
    others = x[:1], np.concatenate([x[:1], 3 * x[1:]])
    gap = np.stack([numbers(field, batch)[:, 0] - usual[:, 0] for batch in others], 1)
    digits = 1e-10 if np.any(usual != usual.astype(np.float32)) else 1e-5  # of float64 or float32
    rounding = digits * (1 + np.abs(usual).max())
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
