"""``config.training`` and ``config.dequantizer.training``: steps, loss and checkpoints."""

import dataclasses
from typing import ClassVar

from etils import epath

from sbml.experiment.fields import Section, choice, flag, integer, real, refusal
from sbml.runtime.checkpoint import Checkpoints
from sbml.sdes import SDE, Kernel
from sbml.times import DRAWS, PROPOSALS, Grid, Proposal

NOISES = ("independent", "antithetic")

# With likelihood weighting, importance sampling gives the squared error of one prediction the same
# total weight at all times. From this prediction to the name of the proposal of the times.
IMPORTANCE = {"noise": "importance", "velocity": "velocity"}


@dataclasses.dataclass(frozen=True)
class Loop(Section):
    """Settings of a training loop, for a score or a dequantizer.

    Raises:
      ValueError: a field is invalid; the message gives its name, value and range.
    """

    folder: ClassVar[str]  # folder of the checkpoints in the work directory

    # number of rows in a step; antithetic noises make two rows of an image
    batch_size: int = integer(128, least=1)
    num_steps: int = integer(1_300_000, least=1)  # number of steps of the optimizer
    accumulate: int = integer(1, least=1)  # number of micro-batches in a step
    # number of steps that are compiled into one call; more can help accelerators, but are slow on
    # CPU
    steps_per_dispatch: int = integer(1, least=1)
    # split the optimizer's state and the average of the parameters over the devices: each needs
    # less memory, but all parameters are gathered once more in a step
    shard_state: bool = flag(False)
    # number of steps between rows of metrics.jsonl, in which each checkpoint also ends a row
    log_every: int = integer(100, least=1)
    checkpoint_every: int = integer(5_000, least=1)  # number of steps between checkpoints
    keep_last: int = integer(2, least=1)  # number of newest checkpoints that are kept
    # also keep the first checkpoint at or past each multiple of this step; 0: none
    keep_every: int = integer(50_000)
    sample_every: int = integer(0)  # number of steps between grids of samples; 0: no grids

    def checkpoints(self, workdir: epath.PathLike) -> Checkpoints:
        """The checkpoints of the run in ``workdir``."""
        return Checkpoints(
            epath.Path(workdir) / self.folder,
            keep_last=self.keep_last,
            keep_every=self.keep_every or None,
        )


def proposal_name(importance_sampling: bool, importance: str) -> str:
    """The name of the proposal of the times, a key of ``times.PROPOSALS``."""
    return IMPORTANCE[importance] if importance_sampling else "uniform"


def check_importance(section: str, importance_sampling: bool, importance: str) -> None:
    """Check that ``importance`` has its default if there is no importance sampling.

    Raises:
      ValueError: it has another value; the message gives both fields of ``section``.
    """
    if not importance_sampling and importance != "noise":
        raise ValueError(
            f"{section}.importance={importance} with {section}.importance_sampling=False: it has "
            f"no effect on uniform times; set --config.{section}.importance_sampling=True"
        )


@dataclasses.dataclass(frozen=True)
class Training(Loop):
    """Settings of the training of the score.

    Raises:
      ValueError: a field is invalid; the message gives its name, value and range.
    """

    section: ClassVar[str] = "training"
    folder: ClassVar[str] = "checkpoints"

    likelihood_weighting: bool = flag(True)  # w = g^2 / sigma^2; False: w = 1 (sbml.losses)
    importance_sampling: bool = flag(True)  # draw times by importance; False: uniform in t
    # noise: uniform in log-SNR, as in the paper; velocity: with a density over log-SNR that is
    # proportional to its sigmoid, which is alpha^2 for vp
    importance: str = choice("noise", IMPORTANCE)
    # number of noise levels of the discrete-time loss of DDPM (vp) or SMLD (ve); 0: continuous time
    discrete_levels: int = integer(0, below=2**20)
    # weight of the second-order loss (sbml.second_order), which is added to the loss and trains the
    # divergence in the likelihood of the ODE; 0: off. i-DODE uses 0.1 in the last 3% of the steps.
    # It gained nothing in the trainings of benchmarks/README.md
    second_order: float = real(0.0, least=0, most=100)
    # number of probes of its divergence; with 1, as in i-DODE, its minimum is not at the true score
    second_order_probes: int = integer(2, least=1, below=2**10)
    times: str = choice("lattice", DRAWS)  # how the times of a batch are spread
    noises: str = choice("antithetic", NOISES)  # antithetic: each image has two rows, z and -z
    # number of bins of a density of times that follows the noise of the gradient, as estimated
    # from the losses; 0: no such density
    proposal_bins: int = integer(32, below=2**16)
    # None: that of the SDE, 1e-5 for vp and 1e-2 for subvp, but at least 5e-5 on ImageNet with
    # likelihood_weighting and importance_sampling; on bin centres it can be later, see eval.tau
    smallest_time: float | None = real(None, least=0, below=1)
    # number of steps between grids of at most 64 samples; 0: no grids
    sample_every: int = integer(50_000)

    def check(self) -> None:
        """Check that the flags fit the loss: a discrete-time loss has neither of the first two."""
        for name in ("likelihood_weighting", "importance_sampling"):
            if self.discrete_levels and getattr(self, name):
                raise ValueError(
                    f"training.discrete_levels={self.discrete_levels} with training.{name}: "
                    f"the discrete-time losses have neither; set --config.training.{name}=False"
                )
        if self.discrete_levels == 1:
            raise refusal("training.discrete_levels", 1, "0, or at least 2")
        check_importance(self.section, self.importance_sampling, self.importance)

    @property
    def antithetic(self) -> bool:
        """Whether every image of a batch has two rows, with noises z and -z."""
        return self.noises == "antithetic"

    @property
    def rows_per_image(self) -> int:
        """The number of rows that an image has in a batch."""
        return 2 if self.antithetic else 1

    @property
    def adapts(self) -> bool:
        """Whether the density of the times follows the noise of the loss during training."""
        return self.proposal_bins > 0

    @property
    def weighting(self) -> str:
        """The name of the loss's weighting, one of ``losses.WEIGHTINGS``."""
        return "likelihood" if self.likelihood_weighting else "original"

    def kernel(self, sde: SDE) -> Kernel:
        """The process that noises images in training: ``sde``, or ``discrete_levels`` of it."""
        return sde.levels(self.discrete_levels) if self.discrete_levels else sde

    def proposal(self, sde: SDE, eps: float) -> Proposal | Grid:
        """The proposal of the times of training, in [eps, T] or on the discrete levels."""
        if self.discrete_levels:
            return Grid(self.discrete_levels)
        return PROPOSALS[proposal_name(self.importance_sampling, self.importance)](sde, eps)


@dataclasses.dataclass(frozen=True)
class DequantizerTraining(Loop):
    """Settings of the training of the dequantizer.

    Raises:
      ValueError: a field is invalid; the message gives its name, value and range.
    """

    section: ClassVar[str] = "dequantizer.training"
    folder: ClassVar[str] = "dequantizer/checkpoints"

    num_steps: int = integer(300_000, least=1)  # number of steps of the optimizer
