"""The networks that can learn a score, by name.

A network is a Linen module. Its dataclass fields are plain values with defaults, and its call is

    Model(**fields)(x, label, *, train) -> Array (n, *s), float32

for ``x (n, *s)`` in [-1, 1] and ``label (n,)``, one number per example that gives its noise level.
Dropout draws from the rng collection "dropout", only if ``train``. A network that can be
class-conditional has a field ``classes`` and takes ``condition (n,)``, the class of each example.
Files whose names begin with an underscore hold parts of networks.

May import: core.
"""

from flax import linen as nn

from sbml.core.registry import Registry, subclass
from sbml.networks._layers import frequencies as frequencies

NETWORKS = Registry(
    "network",
    {
        "mlp": "sbml.networks.mlp:Model",
        "ncsnpp": "sbml.networks.ncsnpp:Model",
        "unet2d": "sbml.networks.unet2d:Model",
        "vdm": "sbml.networks.vdm:Model",
    },
    subclass(nn.Module),
)
