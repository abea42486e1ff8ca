"""``config.training`` and ``config.dequantizer.training``: the steps, the loss, the checkpoints."""

import dataclasses
from typing import ClassVar

from etils import epath

from sbml.experiment.fields import Section, choice, flag, integer, real
from sbml.runtime.checkpoint import Checkpoints
from sbml.sdes import SDE, Kernel
from sbml.times import DRAWS, PROPOSALS, Grid, Proposal

NOISES = ("independent", "antithetic")

# The error whose likelihood weights importance sampling makes equal, and the proposal of its times.
IMPORTANCE = {"noise": "importance", "velocity": "velocity"}


@dataclasses.dataclass(frozen=True)
class Loop(Section):
    """What a training loop needs, whatever it trains. Counts are of optimizer steps.

    Raises:
      ValueError: naming a field, its value and what it may be.
    """

    folder: ClassVar[str]  # of the checkpoints, within a work directory

    batch_size: int = integer(128, least=1)  # rows a step
    num_steps: int = integer(1_300_000, least=1)
    accumulate: int = integer(1, least=1)  # micro-batches a step
    steps_per_dispatch: int = integer(1, least=1)  # more can help accelerators; slow on CPU
    # optimizer's state and average split over the devices: less memory of each, and a step
    # gathers all parameters once more
    shard_state: bool = flag(False)
    log_every: int = integer(100, least=1)
    checkpoint_every: int = integer(5_000, least=1)
    keep_last: int = integer(2, least=1)  # checkpoints
    keep_every: int = integer(50_000)  # keep the first checkpoint past each multiple; 0: none
    sample_every: int = integer(0)  # a grid of samples; 0: none during training

    def checkpoints(self, workdir: epath.PathLike) -> Checkpoints:
        """The checkpoints of the run in ``workdir``."""
        return Checkpoints(
            epath.Path(workdir) / self.folder,
            keep_last=self.keep_last,
            keep_every=self.keep_every or None,
        )


def proposal_name(importance_sampling: bool, importance: str) -> str:
    """Where times are drawn, of ``times.PROPOSALS``."""
    return IMPORTANCE[importance] if importance_sampling else "uniform"


def check_importance(section: str, importance_sampling: bool, importance: str) -> None:
    """Refuse a kind of importance where times are uniform.

    Raises:
      ValueError: naming the fields of ``section`` and their values.
    """
    if not importance_sampling and importance != "noise":
        raise ValueError(
            f"{section}.importance={importance} with {section}.importance_sampling=False: times "
            f"are uniform, of no importance; set --config.{section}.importance_sampling=True"
        )


@dataclasses.dataclass(frozen=True)
class Training(Loop):
    """The training of the score.

    Raises:
      ValueError: naming a field, its value and what it may be.
    """

    section: ClassVar[str] = "training"
    folder: ClassVar[str] = "checkpoints"

    likelihood_weighting: bool = flag(True)
    importance_sampling: bool = flag(True)  # times by importance; or uniform in t
    # noise: uniform in log-SNR, the paper's; velocity: density proportional to alpha^2 in log-SNR
    importance: str = choice("noise", IMPORTANCE)
    # N: the discrete-time loss on N noise levels, DDPM's (vp) or SMLD's (ve); 0: off
    discrete_levels: int = integer(0, below=2**20)
    # beside the loss so much of the second-order loss, which the ODE's likelihood needs; 0: off.
    # i-DODE adds 0.1 in the last 3 of 100 steps
    second_order: float = real(0.0, least=0, most=100)
    # of its divergence; 1 is i-DODE's, whose minimum is not at the true score
    second_order_probes: int = integer(2, least=1, below=2**10)
    times: str = choice("lattice", DRAWS)
    noises: str = choice("antithetic", NOISES)  # half the images, each with z and -z
    proposal_bins: int = integer(32, below=2**16)  # of a density of times that follows the noise
    # None: 1e-5, sub-VP 1e-2, ImageNet with both flags above 5e-5 (the paper's); of bin centres,
    # where by eval.tau their evaluation begins, if that is later
    smallest_time: float | None = real(None, least=0, below=1)
    sample_every: int = integer(50_000)  # a grid of samples; 0: none during training

    def check(self) -> None:
        """A discrete-time loss has neither of the two flags; a kind of importance has its flag."""
        for name in ("likelihood_weighting", "importance_sampling"):
            if self.discrete_levels and getattr(self, name):
                raise ValueError(
                    f"training.discrete_levels={self.discrete_levels} with training.{name}: "
                    f"the discrete-time losses have neither; set --config.training.{name}=False"
                )
        check_importance(self.section, self.importance_sampling, self.importance)

    @property
    def antithetic(self) -> bool:
        """Whether every image of a batch is called twice, with noises z and -z."""
        return self.noises == "antithetic"

    @property
    def adapts(self) -> bool:
        """Whether the times' density follows the noise that training meets."""
        return self.proposal_bins > 0

    @property
    def weighting(self) -> str:
        """Of ``losses.WEIGHTINGS``."""
        return "likelihood" if self.likelihood_weighting else "original"

    def kernel(self, sde: SDE) -> Kernel:
        """What noises the images in training: ``sde``, or ``discrete_levels`` of it."""
        return sde.levels(self.discrete_levels) if self.discrete_levels else sde

    def proposal(self, sde: SDE, eps: float) -> Proposal | Grid:
        """Where the times of training are drawn, from ``eps`` on."""
        if self.discrete_levels:
            return Grid(self.discrete_levels)
        return PROPOSALS[proposal_name(self.importance_sampling, self.importance)](sde, eps)


@dataclasses.dataclass(frozen=True)
class DequantizerTraining(Loop):
    """The training of the dequantizer.

    Raises:
      ValueError: naming a field, its value and what it may be.
    """

    section: ClassVar[str] = "dequantizer.training"
    folder: ClassVar[str] = "dequantizer/checkpoints"

    num_steps: int = integer(300_000, least=1)
