"""Linear diffusion SDEs  dx = f(t) x dt + g(t) dw  on t in [0, 1].

The transition kernel is p(x_t | x_0) = N(alpha(t) x_0, sigma(t)^2 I) with

    alpha' = f alpha,      (sigma^2)' = 2 f sigma^2 + g^2.

With the log signal-to-noise ratio lambda(t) = 2 log(alpha / sigma), g^2 / sigma^2 = -dlambda/dt
holds exactly. So the importance distribution of maximum likelihood, whose density p(t) is
proportional to g^2 / sigma^2, is *uniform in log-SNR*, and sampling from it needs only lambda(t)
and its inverse.

A new SDE is a frozen dataclass with two methods, ``mean_coef`` (alpha) and ``std`` (sigma);
everything else is derived from them (:class:`SDE`). ``Schedule(alpha, sigma)`` makes an SDE from
two functions. ``SDES`` has the names in configs. The file ``base`` has what all SDEs share.
``linear_beta`` (VP, subVP), ``exploding`` (VE), ``interpolating`` (rectified flow, cosine) and
``vdm`` have closed forms, ``table`` has the schedules of discrete-time models, and ``rescaled`` is
for models of data in other units.

Every closed form keeps its relative accuracy in float32 down to t = 1e-6, where the textbook
formulas (1 - exp(-B), log(1 + e^l)) lose up to a third of the value. An exception is ``time`` of
the SDEs whose log-SNR hardly changes near t = 0 (VE, those of ``vdm`` and ``table``): its absolute
accuracy is 1e-7.

Reference: Song et al., "Score-Based Generative Modeling through SDEs", ICLR 2021, appendices B-C.

May import: core.
"""

from sbml.core.registry import Registry, subclass
from sbml.sdes.base import SDE as SDE
from sbml.sdes.base import Kernel as Kernel
from sbml.sdes.base import Levels as Levels
from sbml.sdes.base import Schedule as Schedule
from sbml.sdes.exploding import EDM as EDM
from sbml.sdes.exploding import VE as VE
from sbml.sdes.exploding import LinearVE as LinearVE
from sbml.sdes.interpolating import Cosine as Cosine
from sbml.sdes.interpolating import RectifiedFlow as RectifiedFlow
from sbml.sdes.linear_beta import VP as VP
from sbml.sdes.linear_beta import SubVP as SubVP
from sbml.sdes.rescaled import Rescaled as Rescaled
from sbml.sdes.table import AlphaBarTable as AlphaBarTable
from sbml.sdes.table import BetaSchedule as BetaSchedule
from sbml.sdes.vdm import LinearGamma as LinearGamma
from sbml.sdes.vdm import MonotoneGamma as MonotoneGamma

SDES = Registry(
    "SDE",
    {
        "ve": "sbml.sdes.exploding:VE",
        "linear_ve": "sbml.sdes.exploding:LinearVE",
        "rectified_flow": "sbml.sdes.interpolating:RectifiedFlow",
        "cosine_vp": "sbml.sdes.interpolating:Cosine",
        "vp": "sbml.sdes.linear_beta:VP",
        "subvp": "sbml.sdes.linear_beta:SubVP",
        "edm": "sbml.sdes.exploding:EDM",
        "linear_gamma": "sbml.sdes.vdm:LinearGamma",
        "beta_schedule": "sbml.sdes.table:BetaSchedule",
    },
    subclass(SDE),
)
