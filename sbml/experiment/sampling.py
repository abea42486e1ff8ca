"""``config.sampling``: settings of the samples and their sampler."""

import dataclasses
from typing import ClassVar

from sbml import samplers
from sbml.experiment.fields import choice, flag, integer, real, section_errors
from sbml.experiment.solving import Solving, method, tolerance
from sbml.samplers import Sampler


@dataclasses.dataclass(frozen=True)
class Sampling(Solving):
    """Settings of a run's samples.

    Raises:
      ValueError: a field is invalid; the message gives its name, value and range.
    """

    section: ClassVar[str] = "sampling"

    num_images: int = integer(64, least=1)
    batch_size: int = integer(64, least=1)
    seed: int = integer(0, below=2**32)
    # Smallest time; None: 1e-3, or the smallest time of training if that is larger.
    smallest_time: float | None = real(None, least=0, below=1)
    denoise_last: bool = flag(True)  # replace x at the smallest time by its denoised value
    sampler: str = choice("ode", samplers.SAMPLERS)
    method: str = method("dopri5")  # solver of the sampler ode
    rtol: float = tolerance(1e-3)  # relative tolerance of ode
    atol: float = tolerance(1e-3)  # absolute tolerance of ode, for data in [-1, 1]
    fixed_steps: int = integer(0)  # number of steps of ode; 0: adaptive steps
    steps: int | None = integer(None, least=1)  # number of steps of other samplers; None: 500
    # Spacing of the times of the steps; empty: the default of the sampler.
    spacing: str = choice("", samplers.SPACINGS)
    eta: float = real(0.0, least=0, most=1)  # share of fresh noise in the steps of ddim
    corrector: str = choice("none", samplers.CORRECTORS)  # corrector after every step
    corrector_steps: int = integer(1, least=1)  # number of its steps after every step
    snr: float = real(0.16, above=0, most=1)  # ratio of noise to score in a corrector's step
    frames: int = integer(8, below=2**16)  # number of frames of the strip from noise to image

    def check(self) -> None:
        """Check that the sampler uses the corrector, spacing, eta and number of steps that are set.

        The other fields have values in all configs, and are ignored by samplers without them.
        """
        options = {f.name for f in dataclasses.fields(samplers.SAMPLERS[self.sampler])}
        settings = {
            "corrector": ("corrector", self.corrector != "none"),
            "spacing": ("spacing", bool(self.spacing)),
            "eta": ("eta", self.eta > 0),
            "fixed_steps": ("solver", self.fixed_steps > 0),
            "steps": ("steps", self.steps is not None),
        }
        for field, (option, is_set) in settings.items():
            if is_set and option not in options:
                default = getattr(type(self)(), field)
                raise ValueError(
                    f"sampling.{field}={getattr(self, field)}: sampler {self.sampler} takes no "
                    f"{field}; set its default (--config.sampling.{field}={default}) or choose "
                    "another sampler (docs/samplers.md)"
                )

    def build(self) -> Sampler:
        """The sampler, with those of the section's fields that its class has."""
        kind, corrector = samplers.SAMPLERS[self.sampler], samplers.CORRECTORS[self.corrector]
        options = {"steps": self.corrector_steps, "snr": self.snr}
        names = {f.name for f in dataclasses.fields(kind)}
        solver = self.solver()
        with section_errors(self.section):
            fields = {
                "solver": solver,
                "steps": 500 if self.steps is None else self.steps,
                "eta": self.eta,
                "corrector": corrector() if self.corrector == "none" else corrector(**options),
                **({"spacing": self.spacing} if self.spacing else {}),
            }
            return kind(**{field: value for field, value in fields.items() if field in names})
