"""Dequantizers, by name, which make integers continuous.

:class:`sbml.dequantizers.base.Dequantizer` is their interface.

May import: core, likelihood, sdes.
"""

from sbml.core.registry import Registry, subclass
from sbml.dequantizers.base import Dequantizer as Dequantizer
from sbml.dequantizers.base import has_bound as has_bound
from sbml.dequantizers.base import has_density as has_density
from sbml.dequantizers.base import is_trained as is_trained

DEQUANTIZERS = Registry(
    "dequantizer",
    {
        "categorical": "sbml.dequantizers.decoders:Categorical",
        "learned": "sbml.dequantizers.decoders:Learned",
        "truncated_normal": "sbml.dequantizers.truncated_normal:Model",
        "uniform": "sbml.dequantizers.uniform:Model",
        "variational": "sbml.dequantizers.variational:Model",
    },
    subclass(Dequantizer),
)
