"""Dequantizers, by name, which make integers continuous.

For any density p of x = 2 (pixels + u) / L - 1 and any q(u | pixels) on the bin [0, 1)^d,

    -log P(pixels) <= E_q [-log p(x) + log q(u | pixels)] + d log(L / 2).

A dequantizer is a frozen and hashable dataclass with

    init(key, pixels (n, *s)) -> params           {} if there is nothing to learn
    at_noise: bool                                which distribution x belongs to, see below

and one of the next two methods, or both:

    sample(params, pixels (*s), key) -> u, log_q  u (*s) in [0, 1), log q(u | pixels) in nats
    bound(params, score, sde, pixels (*s), key, levels, *, eps, u, reduction) -> bound.Bound
                                                  its own bound on -log P(pixels)

The ODE estimator needs ``sample``. If ``at_noise`` is False, x is data, and the density
model takes it unchanged; if True, alpha(eps) x is a sample of the diffusion at its smallest time
eps.

``bound`` gives an evidence bound on the probability of the integers themselves: the three terms of
``sbml.bound.Bound`` in nats. A model with this method has an attribute ``calls``, the number of
score evaluations that the bound needs in addition to one for each time in ``u``. A dequantizer with
``at_noise`` has an evidence bound by this method only.

A dequantizer with parameters to learn also has ``sample_batch``, which is ``sample`` for a batch,
and ``dropout``. A dequantizer that does not fit every config has a class method

    misfit(shape, parameterization, dequantization) -> str

which returns the reason why it does not fit images of that shape or a score that was trained with
those settings, or "" if it does.
"""

from typing import Any

from sbml.registry import Registry

DEQUANTIZERS = Registry(
    "dequantizer",
    {
        "categorical": "sbml.dequantizers.categorical:Model",
        "learned": "sbml.dequantizers.learned:Model",
        "truncated_normal": "sbml.dequantizers.truncated_normal:Model",
        "uniform": "sbml.dequantizers.uniform:Model",
        "variational": "sbml.dequantizers.variational:Model",
    },
)


def has_density(model: Any) -> bool:
    """Whether ``model``, an instance or a class, turns integers into x with a density (``sample``).

    The ODE estimator needs this method.
    """
    return hasattr(model, "sample")


def has_bound(model: Any) -> bool:
    """Whether ``model``, an instance or a class, has its own evidence bound for the integers."""
    return hasattr(model, "bound")


def misfit(
    model: type[Any], shape: tuple[int, ...], parameterization: str, dequantization: str
) -> str:
    """The reason why the class ``model`` does not fit these settings, or "" if it does."""
    if not hasattr(model, "misfit"):
        return ""
    reason: str = model.misfit(shape, parameterization, dequantization)
    return reason


def is_trained(model: Any) -> bool:
    """Whether ``model``, an instance or a class, has parameters to train (``sample_batch``)."""
    return hasattr(model, "sample_batch")
