"""``config.sampling``, ``config.latents`` and ``config.codec``: the samples of a run and their
sampler, the pictures of ``--mode=latents``, and the coded images of ``--mode=compress``."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from annotated_types import Ge, Le

from sbml.core.scalars import MOST_STEPS
from sbml.core.types import Json
from sbml.likelihood.ode import MAX_STEPS, METHODS, Solver
from sbml.program.config.fields import (
    Chosen,
    Natural,
    Positive,
    PositiveSize,
    Section,
    Seed,
    among,
    errors_of,
    field,
)
from sbml.samplers import CORRECTORS, SAMPLERS, AnnealedLangevin, ReverseDiffusion, Sampler

# Above 0.1 no step would ever be rejected. The error is measured with a tenth of the tolerance,
# which must not be below ``ode.least_tolerance`` of float32.
Tolerance = Annotated[float, Ge(1e-6), Le(0.1)]
Steps = Annotated[int, Ge(1), Le(MOST_STEPS)]
Method = Annotated[str, among(METHODS)]


class Solving(Section):
    """The solver of the sampler ``ode``."""

    section: ClassVar[str] = "sampling.solver"

    method: Method = field("dopri5", "the solver")
    rtol: Tolerance = field(1e-3, "relative tolerance")
    atol: Tolerance = field(1e-3, "absolute tolerance, for data in [-1, 1]")
    fixed_steps: Annotated[int, Ge(0), Le(MOST_STEPS)] = field(
        0, "number of equal steps; 0: adaptive steps"
    )
    max_steps: Positive = field(MAX_STEPS, "number of adaptive steps at which it gives up")

    def check(self) -> None:
        """Check that the method has an error estimate, or a fixed number of steps."""
        self.build()

    def build(self) -> Solver:
        """The ODE solver."""
        tolerances, fixed = (self.rtol, self.atol), self.fixed_steps or None
        with errors_of(f"config.{self.section}"):
            return Solver(self.method, *tolerances, fixed_steps=fixed, max_steps=self.max_steps)


class SamplerChoice(Chosen):
    """The sampler: its name, and the fields of its class. These are ``steps``, 500 by default, and
    ``spacing`` for all but ode, and ``eta`` for ddim (docs/samplers.md)."""

    section: ClassVar[str] = "sampling.sampler"
    parts: ClassVar[Mapping[str, Any]] = SAMPLERS
    skip: ClassVar[tuple[str, ...]] = ("solver", "corrector")  # sections beside this one

    name: Annotated[str, among(SAMPLERS)] = field("ode", "the sampler")

    @classmethod
    def relevant(cls, own: Json, made: type[Section]) -> Json:
        steps = {"steps": 500} if "steps" in made.model_fields else {}
        # These values have stood for the default, and on the command line they are texts.
        default = {"steps": "None", "spacing": ""}
        return steps | {name: v for name, v in own.items() if str(v) != default.get(name)}


class CorrectorChoice(Chosen):
    """The corrector after every step of a sampler: its name, and the fields of its class, the
    number ``steps`` of its own steps and their signal-to-noise ratio ``snr``."""

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
    frames: Annotated[int, Ge(0), Le(1_000)] = field(
        8, "number of frames of the strip from noise to image"
    )
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
        for part, name, usual in (("corrector", "name", "none"), ("solver", "fixed_steps", 0)):
            value = getattr(getattr(self, part), name)
            if part not in has and value != usual:
                raise ValueError(
                    f"sampling.{part}.{name}={value}: the sampler {self.sampler.name} has no "
                    f"{part}: leave it out, or choose another sampler (docs/samplers.md)"
                )
        parts = {"corrector": self.corrector.build(), "solver": self.solver.build()}
        return dataclasses.replace(sampler, **{name: parts[name] for name in parts if name in has})


class Latents(Section):
    """Settings of ``--mode=latents``, which encodes, interpolates and completes images."""

    section: ClassVar[str] = "latents"

    count: int = field(8, "number of images, from eval.split", ge=2, lt=2**16)
    frames: Annotated[int, Ge(1), Le(1_000)] = field(8, "number of images in an interpolation")
    steps: Steps = field(200, "steps of reverse diffusion for a completion")
    corrector_steps: Annotated[int, Ge(1), Le(1_000)] = field(
        2, "steps of annealed Langevin after each of them"
    )
    snr: float = field(0.16, "signal-to-noise ratio of a corrector's step", gt=0, le=1)

    def sampler(self) -> ReverseDiffusion:
        """The sampler of a completion: reverse diffusion with annealed Langevin steps."""
        corrector = AnnealedLangevin(self.corrector_steps, self.snr)
        return ReverseDiffusion(self.steps, corrector=corrector)


class Coding(Section):
    """Settings of ``--mode=compress``, which codes images of ``eval.split`` without loss."""

    section: ClassVar[str] = "codec"

    steps: Steps = field(
        250,
        "number of steps of the diffusion chain; more steps give a smaller file and take longer",
    )
    lanes: PositiveSize = field(
        8,
        "number of images that are coded at once; each of these lanes needs initial bits, which "
        "make the file longer",
    )
    num_images: Natural = field(0, "size of a random sample of images; 0: all")
