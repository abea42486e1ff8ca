"""``config.latents``: what ``--mode=latents`` encodes, interpolates and completes."""

import dataclasses
from typing import ClassVar

from sbml.experiment.fields import Section, integer, real
from sbml.samplers import AnnealedLangevin, ReverseDiffusion


@dataclasses.dataclass(frozen=True)
class Latents(Section):
    """The pictures of a model's latents.

    Raises:
      ValueError: naming a field, its value and what it may be.
    """

    section: ClassVar[str] = "latents"

    count: int = integer(8, least=2, below=2**16)  # images of eval.split
    frames: int = integer(8, least=1, below=2**16)  # of an interpolation
    steps: int = integer(200, least=1)  # of a completion, by reverse diffusion
    corrector_steps: int = integer(2, least=1)  # by annealed Langevin, after each
    snr: float = real(0.16, above=0, most=1)  # of a corrector's step: noise to score

    def sampler(self) -> ReverseDiffusion:
        """What draws a completion."""
        corrector = AnnealedLangevin(self.corrector_steps, self.snr)
        return ReverseDiffusion(self.steps, corrector=corrector)
