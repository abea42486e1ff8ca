"""``config.sampling`` and ``config.latents``: the samples of a run and their sampler, and the
pictures of ``--mode=latents``."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from sbml.experiment.fields import (
    Chosen,
    Natural,
    Positive,
    PositiveSize,
    Section,
    Seed,
    Size,
    among,
    field,
    section_errors,
)
from sbml.experiment.solving import Solving, Tolerance
from sbml.ode import MAX_STEPS, METHODS
from sbml.samplers import (
    CORRECTORS,
    SAMPLERS,
    SPACINGS,
    AnnealedLangevin,
    ReverseDiffusion,
    Sampler,
)


class Sampling(Solving, Chosen):
    """Settings of ``--mode=sample``, and of the samples during training. A sampler of another
    package can have further fields here."""

    section: ClassVar[str] = "sampling"
    choice: ClassVar[str] = "sampler"
    parts: ClassVar[Mapping[str, Any]] = SAMPLERS
    # These are set by fields of this section.
    skip: ClassVar[tuple[str, ...]] = ("solver", "steps", "spacing", "eta", "corrector")

    num_images: Positive = field(64, "number of samples")
    batch_size: Positive = field(64, "number of samples that are drawn at once")
    seed: Seed = field(0, "seed of the samples")
    smallest_time: float | None = field(
        None, "time of the last step; None: 1e-3, or that of training if it is larger", ge=0, lt=1
    )
    denoise_last: bool = field(True, "replace x at the smallest time by its denoised value")
    sampler: Annotated[str, among(SAMPLERS)] = field("ode", "the sampler")
    method: Annotated[str, among(METHODS)] = field("dopri5", "solver of the sampler ode")
    rtol: Tolerance = field(1e-3, "relative tolerance of ode")
    atol: Tolerance = field(1e-3, "absolute tolerance of ode, for data in [-1, 1]")
    fixed_steps: Natural = field(0, "number of steps of ode; 0: adaptive steps")
    max_steps: Positive = field(MAX_STEPS, "number of adaptive steps at which ode gives up")
    steps: PositiveSize | None = field(None, "number of steps of other samplers; None: 500")
    spacing: Annotated[str, among((*SPACINGS, ""))] = field(
        "", "spacing of the times of the steps; empty: the default of the sampler"
    )
    eta: float = field(0.0, "share of fresh noise in the steps of ddim", ge=0, le=1)
    corrector: Annotated[str, among(CORRECTORS)] = field("none", "corrector after every step")
    corrector_steps: Positive = field(1, "number of the corrector's steps after every step")
    snr: float = field(0.16, "signal-to-noise ratio of a corrector's step", gt=0, le=1)
    frames: Size = field(8, "number of frames of the strip from noise to image")

    def check(self) -> None:
        """Check that the sampler uses the corrector, spacing, eta and number of steps that are set.

        The other fields have values in all configs, and are ignored by samplers without them.
        """
        options = {f.name for f in dataclasses.fields(SAMPLERS[self.sampler])}
        settings = {
            "corrector": ("corrector", self.corrector != "none"),
            "spacing": ("spacing", bool(self.spacing)),
            "eta": ("eta", self.eta > 0),
            "fixed_steps": ("solver", self.fixed_steps > 0),
            "steps": ("steps", self.steps is not None),
        }
        for name, (option, is_set) in settings.items():
            if is_set and option not in options:
                default = type(self).model_fields[name].default
                raise ValueError(
                    f"sampling.{name}={getattr(self, name)}: sampler {self.sampler} takes no "
                    f"{name}; set its default (--config.sampling.{name}={default}) or choose "
                    "another sampler (docs/samplers.md)"
                )
        self.build()

    def build(self) -> Sampler:
        """The sampler, with those of the section's fields that its class has."""
        kind, corrector = SAMPLERS[self.sampler], CORRECTORS[self.corrector]

        solver = self.solver()
        with section_errors(self.section):
            fields = {
                "solver": solver,
                "steps": 500 if self.steps is None else self.steps,
                "eta": self.eta,
                "corrector": corrector()
                if self.corrector == "none"
                else corrector(steps=self.corrector_steps, snr=self.snr),
                **({"spacing": self.spacing} if self.spacing else {}),
                **self.own,
            }
            names = {f.name for f in dataclasses.fields(kind)}
            return kind(**{name: value for name, value in fields.items() if name in names})


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
