"""Linear diffusion SDEs  dx = f(t) x dt + g(t) dw  on t in [0, 1].

The transition kernel is p(x_t | x_0) = N(alpha(t) x_0, sigma(t)^2 I) with

    alpha' = f alpha,      (sigma^2)' = 2 f sigma^2 + g^2.

With the log signal-to-noise ratio lambda(t) = 2 log(alpha / sigma), g^2 / sigma^2 = -dlambda/dt
holds exactly: the maximum-likelihood importance distribution p(t) ~ g^2 / sigma^2 is *uniform in
log-SNR*, so an SDE needs only lambda(t) and its inverse to sample from it.

A new SDE is a frozen dataclass with two methods, ``mean_coef`` (alpha) and ``std`` (sigma);
everything else follows from them (:class:`SDE`). ``Schedule(alpha, sigma)`` makes one of two
functions. A file here may export ``SDES``, the names by which configs know its classes. The file
``_kernel`` holds what all share; ``linear_beta`` (VP, subVP), ``exploding`` (VE), ``interpolating``
(rectified flow, cosine) and ``vdm`` the closed forms, ``table`` the schedule of a discrete-time
model.

Every closed form keeps its relative accuracy in float32 down to t = 1e-6, where the textbook ones
(1 - exp(-B), log(1 + e^l)) lose up to a third. (Of VE's ``time`` it is the absolute one, 1e-7: near
t = 0 its log-SNR is a number of 9 that hardly moves.)

Reference: Song et al., "Score-Based Generative Modeling through SDEs", ICLR 2021, appendices B-C.
"""

from importlib import import_module
from pkgutil import iter_modules

from sbml.sdes._kernel import SDE, Kernel
from sbml.sdes.exploding import EDM, VE, LinearVE
from sbml.sdes.interpolating import Cosine, RectifiedFlow
from sbml.sdes.levels import Levels
from sbml.sdes.linear_beta import VP, SubVP
from sbml.sdes.schedule import Schedule
from sbml.sdes.table import AlphaBarTable
from sbml.sdes.vdm import LinearGamma, MonotoneGamma

__all__ = [
    "EDM",
    "SDE",
    "SDES",
    "VE",
    "VP",
    "AlphaBarTable",
    "Cosine",
    "Kernel",
    "Levels",
    "LinearGamma",
    "LinearVE",
    "MonotoneGamma",
    "RectifiedFlow",
    "Schedule",
    "SubVP",
]

SDES: dict[str, type[SDE]] = {
    name: kind
    for found in iter_modules(__path__)
    for name, kind in getattr(import_module(f"{__name__}.{found.name}"), "SDES", {}).items()
}
