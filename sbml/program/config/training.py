"""``config.training`` and ``config.dequantizer.training``: steps, loss and checkpoints; and what
follows from them: the smallest time of a training, and the unit of its loss."""

from typing import TYPE_CHECKING, Annotated, ClassVar

import jax.numpy as jnp
from annotated_types import Ge, Le
from etils import epath

from sbml.core.scalars import Number, notation
from sbml.core.streams import Name
from sbml.data import imagenet32
from sbml.likelihood import discrete
from sbml.program.config.data import Data
from sbml.program.config.fields import Natural, Positive, Section, among, errors_of, field, refusal
from sbml.sdes import SDE, Kernel, times
from sbml.sdes.times import DRAWS, PROPOSALS, Grid, Proposal

if TYPE_CHECKING:
    from sbml.program.runtime.checkpoint import Checkpoints

# A density of times with more bins needs more images than a data set has.
Bins = Annotated[int, Ge(0), Le(4_096)]
NOISES = ("independent", "antithetic")


class Loop(Section):
    """Settings of a training loop, for a score or a dequantizer."""

    name: ClassVar[Name]  # of the stream of the steps' keys, and of the progress bar
    folder: ClassVar[str]  # folder of the checkpoints in the work directory

    batch_size: Positive = field(
        128, "number of rows in a step; antithetic noises make two rows of an image"
    )
    num_steps: Positive = field(1_300_000, "number of steps of the optimizer")
    accumulate: Positive = field(1, "number of micro-batches in a step")
    steps_per_dispatch: Positive = field(
        1,
        "number of steps that are compiled into one call; more can help accelerators, but are slow "
        "on CPU",
    )
    shard_state: bool = field(
        False,
        "split the optimizer's state and the average of the parameters over the devices: each "
        "needs less memory, but all parameters are gathered once more in a step",
    )
    log_every: Positive = field(
        100, "number of steps between rows of metrics.jsonl; each checkpoint also writes a row"
    )
    checkpoint_every: Positive = field(5_000, "number of steps between checkpoints")
    keep_last: Positive = field(2, "number of newest checkpoints that are kept")
    keep_every: Natural = field(
        50_000, "also keep the first checkpoint at or past each multiple of this number; 0: none"
    )
    sample_every: Natural = field(0, "number of steps between grids of samples; 0: no grids")

    def checkpoints(self, workdir: epath.PathLike) -> "Checkpoints":
        """The checkpoints of the run in ``workdir``."""
        from sbml.program.runtime.checkpoint import (
            Checkpoints,  # here, because it takes half a second
        )

        return Checkpoints(
            epath.Path(workdir) / self.folder,
            keep_last=self.keep_last,
            keep_every=self.keep_every or None,
        )

    @property
    def rows_per_image(self) -> int:
        """The number of rows that an image has in a batch; ``batch_size`` counts rows."""
        return 1


class Times(Section):
    """How the times of a training or of a bound are drawn."""

    times: Annotated[str, among(DRAWS)] = field("lattice", "how the times are spread")
    importance_sampling: bool = field(
        True, "draw times uniformly in log-SNR, the paper's importance sampling; False: in t"
    )

    @property
    def proposal_name(self) -> str:
        """The name of the proposal of the times, a key of ``times.PROPOSALS``."""
        return "importance" if self.importance_sampling else "uniform"


class Training(Loop, Times):
    """Settings of ``--mode=train``, the training of the score."""

    section: ClassVar[str] = "training"
    name: ClassVar[Name] = "train"
    folder: ClassVar[str] = "checkpoints"

    likelihood_weighting: bool = field(
        True, "weight the loss by w = g^2 / sigma^2; False: w = 1 (sbml.losses)"
    )
    discrete_levels: int = field(
        0,
        "number of noise levels of the discrete-time loss of DDPM (vp) or SMLD (ve); 0: continuous "
        "time",
        ge=0,
        lt=2**20,
    )
    noises: Annotated[str, among(NOISES)] = field(
        "antithetic", "antithetic: each image has two rows, with noises z and -z"
    )
    proposal_bins: Bins = field(
        32,
        "number of bins of a density of times that follows the noise of the gradient, which is "
        "estimated from the losses; 0: no such density",
    )
    smallest_time: float | None = field(
        None,
        "None: that of the SDE, 1e-5 for vp and 1e-2 for subvp, but at least 5e-5 on ImageNet with "
        "likelihood_weighting and importance_sampling; on bin centres it can be later, see "
        "eval.tau",
        ge=0,
        lt=1,
    )
    sample_every: Natural = field(
        50_000, "number of steps between grids of at most 64 samples; 0: no grids"
    )
    validate_every: Natural = field(
        0,
        "number of steps between evaluations of the bound on validation images (data.validation), "
        "for a curve; the last step has one too; 0: no curve",
    )
    validation_images: Annotated[int, Ge(1), Le(100_000)] = field(
        256, "largest number of images of the validation curve"
    )

    def check(self) -> None:
        """Check that the flags fit the loss: a discrete-time loss has neither likelihood weighting
        nor importance sampling."""
        for name in ("likelihood_weighting", "importance_sampling"):
            if self.discrete_levels and getattr(self, name):
                raise ValueError(
                    f"training.discrete_levels={self.discrete_levels} with training.{name}=True: "
                    f"a discrete-time loss has no {name}; set --config.training.{name}=False"
                )
        if self.discrete_levels == 1:
            raise refusal("training.discrete_levels", 1, "0, or at least 2")
        super().check()

    @property
    def antithetic(self) -> bool:
        """Whether every image of a batch has two rows, with noises z and -z."""
        return self.noises == "antithetic"

    @property
    def rows_per_image(self) -> int:
        return 2 if self.antithetic else 1

    @property
    def weighting(self) -> str:
        """The name of the loss's weighting, one of ``losses.WEIGHTINGS``."""
        return "likelihood" if self.likelihood_weighting else "original"

    def kernel(self, sde: SDE) -> Kernel:
        """The process that adds noise to the images in training: ``sde``, or ``discrete_levels``
        noise levels of it."""
        if not self.discrete_levels:
            return sde
        with errors_of(f"config.{self.name_of('discrete_levels')}"):
            return sde.levels(self.discrete_levels)

    def proposal(self, sde: SDE, eps: float) -> Proposal | Grid:
        """The proposal of the times of training, in [eps, T] or on the discrete levels."""
        if self.discrete_levels:
            return Grid(self.discrete_levels)
        with errors_of(f"config.{self.name_of('smallest_time')}"):
            return PROPOSALS[self.proposal_name](sde, eps)


class DequantizerTraining(Loop):
    """Settings of the training of the dequantizer."""

    section: ClassVar[str] = "dequantizer.training"
    name: ClassVar[Name] = "train dequantizer"
    folder: ClassVar[str] = "dequantizer/checkpoints"

    num_steps: Positive = field(300_000, "number of steps of the optimizer")


def smallest_time(sde: SDE, training: Training, data: Data, tau: float) -> float:
    """The smallest time of a training: ``training.smallest_time``, or if it is None, the paper's.

    The paper's smallest time is the SDE's ``smallest_time``. On ImageNet with likelihood weighting
    and importance sampling it is at least 5e-5. For training on bin centres it is replaced by the
    time at which half a bin is ``tau`` standard deviations of the noise wide, if this is later
    (``discrete.smallest_time``): the evaluation of such a model needs no earlier time.
    """
    if training.smallest_time is not None:
        with errors_of(f"config.{training.name_of('smallest_time')}"):
            sde.check_time(training.smallest_time, "t")
        return training.smallest_time
    both = training.likelihood_weighting and training.importance_sampling
    imagenet = imagenet32.version(data.source) is not None
    eps = max(sde.smallest_time, 5e-5 if imagenet and both else 0.0)
    if data.dequantization != "centre":
        return eps
    return float(discrete_time(sde, data.levels, eps, tau))


def discrete_time(sde: SDE, levels: int, eps: Number, tau: float) -> Number:
    """``discrete.smallest_time`` for ``eval.tau``."""
    found = discrete.smallest_time(sde, levels, eps, tau)
    return sde.check_time(found, f"eval.tau={notation(tau)} gives smallest time eps")


def smallest_trained_time(sde: SDE, levels: int, eps: float) -> float:
    """The smallest time t at which the network sees images in training.

    In continuous time it is ``eps``. In discrete time it is the time with the log-SNR of the first
    of the noise ``levels``, or ``eps`` if that is later.
    """
    if not levels:
        return eps
    return max(eps, float(sde.time(sde.levels(levels).log_snr(jnp.zeros(())))))


def loss_unit(sde: SDE, training: Training, eps: float) -> float:
    """The value of the loss of this package, in nats/dim, when the loss of the paper is 1.

    The paper's loss is a mean over times and dimensions of weighted squared errors of the
    prediction. With likelihood weighting and importance sampling the weights are 1 and the loss
    here is Z / 2 times the paper's, where Z is the normaliser of the proposal. Otherwise it is half
    the paper's; the length T - eps of the interval of times, 1 to within 1%, is neglected.
    """
    proposal = training.proposal(sde, eps)
    if not (training.likelihood_weighting and isinstance(proposal, times.Importance)):
        return 0.5
    return float(proposal.normaliser) / 2
