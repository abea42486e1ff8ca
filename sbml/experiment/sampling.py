"""``config.sampling`` and ``config.latents``: the samples of a run and their sampler, and the
pictures of ``--mode=latents``."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from sbml.experiment.fields import (
    Chosen,
    Positive,
    PositiveSize,
    Section,
    Seed,
    Size,
    among,
    field,
)
from sbml.experiment.solving import Solving
from sbml.samplers import CORRECTORS, SAMPLERS, AnnealedLangevin, ReverseDiffusion, Sampler
from sbml.types import Json

STEPS = 500  # of every sampler with a fixed number of them, unless the config has another number


class SamplerChoice(Chosen):
    """The sampler: its name, and the fields of its class (docs/samplers.md), such as ``steps``,
    which is 500 by default, and ``spacing``."""

    section: ClassVar[str] = "sampling.sampler"
    parts: ClassVar[Mapping[str, Any]] = SAMPLERS
    skip: ClassVar[tuple[str, ...]] = ("solver", "corrector")  # sections beside this one

    name: Annotated[str, among(SAMPLERS)] = field("ode", "the sampler")

    @classmethod
    def relevant(cls, own: Json, made: type[Section]) -> Json:
        # In earlier versions, every sampler had these fields, whose defaults were these values.
        unset = {"steps": "None", "spacing": ""}
        unset |= {} if "eta" in made.model_fields else {"eta": "0.0"}
        steps = {"steps": STEPS} if "steps" in made.model_fields else {}
        return steps | {name: v for name, v in own.items() if str(v) != unset.get(name)}


class CorrectorChoice(Chosen):
    """The corrector after every step of a sampler: its name, and the fields of its class."""

    section: ClassVar[str] = "sampling.corrector"
    parts: ClassVar[Mapping[str, Any]] = CORRECTORS

    name: Annotated[str, among(CORRECTORS)] = field("none", "the corrector")


class Sampling(Section):
    """Settings of ``--mode=sample``, and of the samples during training."""

    section: ClassVar[str] = "sampling"

    num_images: Positive = field(64, "number of samples")
    batch_size: Positive = field(64, "number of samples that are drawn at once")
    seed: Seed = field(0, "seed of the samples")
    smallest_time: float | None = field(
        None, "time of the last step; None: 1e-3, or that of training if it is larger", ge=0, lt=1
    )
    denoise_last: bool = field(True, "replace x at the smallest time by its denoised value")
    frames: Size = field(8, "number of frames of the strip from noise to image")
    sampler: SamplerChoice = SamplerChoice()
    corrector: CorrectorChoice = CorrectorChoice()
    solver: Solving = Solving()

    def check(self) -> None:
        """Check the fields of the sampler."""
        self.build()

    def build(self) -> Sampler:
        """The sampler, with the corrector or the solver if its class has one."""
        sampler: Any = self.sampler.build()
        has = {field.name for field in dataclasses.fields(sampler)}
        corrector, steps = self.corrector.name, self.solver.fixed_steps
        for part, setting, is_set in (
            ("corrector", f"corrector.name={corrector}", corrector != "none"),
            ("solver", f"solver.fixed_steps={steps}", steps > 0),
        ):
            if is_set and part not in has:
                raise ValueError(
                    f"sampling.{setting}: the sampler {self.sampler.name} has no {part}: leave it "
                    "out, or choose another sampler (docs/samplers.md)"
                )
        parts = {"corrector": self.corrector.build(), "solver": self.solver.build()}
        return dataclasses.replace(sampler, **{name: parts[name] for name in parts if name in has})


class Latents(Section):
    """Settings of ``--mode=latents``, which encodes, interpolates and completes images."""

    section: ClassVar[str] = "latents"

    count: int = field(8, "number of images, from eval.split", ge=2, lt=2**16)
    frames: PositiveSize = field(8, "number of images in an interpolation")
    steps: PositiveSize = field(200, "steps of reverse diffusion for a completion")
    corrector_steps: Positive = field(2, "steps of annealed Langevin after each of them")
    snr: float = field(0.16, "signal-to-noise ratio of a corrector's step", gt=0, le=1)

    def sampler(self) -> ReverseDiffusion:
        """The sampler of a completion: reverse diffusion with annealed Langevin steps."""
        corrector = AnnealedLangevin(self.corrector_steps, self.snr)
        return ReverseDiffusion(self.steps, corrector=corrector)
