"""``config.sampling``: how samples are drawn."""

import dataclasses
from typing import ClassVar

from sbml import samplers
from sbml.experiment.fields import choice, flag, integer, named, real
from sbml.experiment.solving import Solving, method, tolerance
from sbml.samplers import Sampler


@dataclasses.dataclass(frozen=True)
class Sampling(Solving):
    """The samples of a run.

    Raises:
      ValueError: naming a field, its value and what it may be.
    """

    section: ClassVar[str] = "sampling"

    num_images: int = integer(64, least=1)
    batch_size: int = integer(64, least=1)
    seed: int = integer(0, below=2**32)
    # None: 1e-3, or training's if larger
    smallest_time: float | None = real(None, least=0, below=1)
    denoise_last: bool = flag(True)
    sampler: str = choice("ode", samplers.SAMPLERS)
    method: str = method("dopri5")  # of ode
    rtol: float = tolerance(1e-3)  # of ode
    atol: float = tolerance(1e-3)  # of ode, for data in [-1, 1]
    fixed_steps: int = integer(0)  # of ode; 0: step control
    steps: int | None = integer(None, least=1)  # of all other samplers; None: 500
    # of the times of steps; empty: the sampler's own
    spacing: str = choice("", samplers.SPACINGS)
    eta: float = real(0.0, least=0, most=1)  # of ddim: share of fresh noise
    corrector: str = choice("none", samplers.CORRECTORS)  # after every step
    corrector_steps: int = integer(1, least=1)  # of the corrector, after every step
    snr: float = real(0.16, above=0, most=1)  # of a corrector's step: noise to score
    frames: int = integer(8, below=2**16)  # of the strip from noise to image

    def check(self) -> None:
        """A sampler ignores no field that was set."""
        known = {f.name for f in dataclasses.fields(samplers.SAMPLERS[self.sampler])}
        asked = {
            "corrector": ("corrector", self.corrector != "none"),
            "spacing": ("spacing", bool(self.spacing)),
            "eta": ("eta", self.eta > 0),
            "fixed_steps": ("solver", self.fixed_steps > 0),
            "steps": ("steps", self.steps is not None),
        }
        for field, (option, given) in asked.items():
            if given and option not in known:
                raise ValueError(
                    f"sampling.{field}={getattr(self, field)}: sampler {self.sampler} takes no "
                    f"{field} (docs/samplers.md)"
                )

    def build(self) -> Sampler:
        """The sampler, from those fields that it has."""
        kind, follows = samplers.SAMPLERS[self.sampler], samplers.CORRECTORS[self.corrector]
        options = {"steps": self.corrector_steps, "snr": self.snr}
        known = {f.name for f in dataclasses.fields(kind)}
        with named(self.section):
            fields = {
                "solver": self.solver(),
                "steps": 500 if self.steps is None else self.steps,
                "eta": self.eta,
                "corrector": follows() if self.corrector == "none" else follows(**options),
                **({"spacing": self.spacing} if self.spacing else {}),
            }
            return kind(**{field: value for field, value in fields.items() if field in known})
