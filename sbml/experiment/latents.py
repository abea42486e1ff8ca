"""``config.latents``: settings of ``--mode=latents``, which encodes, interpolates and completes."""

import dataclasses
from typing import ClassVar

from sbml.experiment.fields import Section, integer, real
from sbml.samplers import AnnealedLangevin, ReverseDiffusion


@dataclasses.dataclass(frozen=True)
class Latents(Section):
    """Settings of the pictures that ``--mode=latents`` makes.

    Raises:
      ValueError: a field is invalid; the message gives its name, value and range.
    """

    section: ClassVar[str] = "latents"

    count: int = integer(8, least=2, below=2**16)  # number of images, from eval.split
    frames: int = integer(8, least=1, below=2**16)  # number of images in an interpolation
    steps: int = integer(200, least=1)  # steps of reverse diffusion for a completion
    corrector_steps: int = integer(2, least=1)  # steps of annealed Langevin after each of them
    snr: float = real(0.16, above=0, most=1)  # ratio of noise to score in a corrector's step

    def sampler(self) -> ReverseDiffusion:
        """The sampler of a completion: reverse diffusion with annealed Langevin steps."""
        corrector = AnnealedLangevin(self.corrector_steps, self.snr)
        return ReverseDiffusion(self.steps, corrector=corrector)
