"""``config.eval``: which numbers an evaluation computes, and how precisely."""

import dataclasses
from typing import ClassVar

from sbml import data, dequantizers, estimators, times
from sbml.discrete import TAU
from sbml.divergence import PROBES, Trace
from sbml.estimators import Cell
from sbml.experiment.fields import (
    check_choice,
    choice,
    choices_in,
    flag,
    integer,
    integers,
    names,
    real,
    text,
)
from sbml.experiment.solving import Solving, method, tolerance
from sbml.experiment.training import IMPORTANCE, check_importance, proposal_name
from sbml.features import EXTRACTORS

PRECISIONS = ("default", "high", "highest")


@dataclasses.dataclass(frozen=True)
class Eval(Solving):
    """Settings of an evaluation: a table of mean bits/dim over the images of one split.

    The table has a number for every estimator with every dequantizer and every K, the number of
    draws of the dequantizer in one logarithm. The first number is the headline of the report.

    Raises:
      ValueError: a field is invalid; the message gives its name, value and range.
    """

    section: ClassVar[str] = "eval"

    split: str = choice("test", (*data.SPLITS, data.VALIDATION))  # validation: see data.validation
    estimators: tuple[str, ...] = names(("ode", "bound"))  # of these and bound_ssm
    # of uniform, variational, truncated_normal, categorical and learned
    dequantizers: tuple[str, ...] = names(("uniform",))
    num_importance: tuple[int, ...] = integers((1,), least=1, below=2**20)  # the values of K
    importance_images: int = integer(0)  # number of images for K > 1; 0: as many as for K = 1
    batch_size: int = integer(128, least=1)  # number of images in a batch; for K > 1 a Kth of it
    max_images: int = integer(0)  # size of a random sample, the same in every run; 0: all
    in_order: bool = flag(False)  # take the first max_images of the split, not a random sample
    seed: int = integer(0, below=2**32)
    # None: the smallest time of training
    smallest_time: float | None = real(None, least=0, below=1)
    # Sets the smallest time of the dequantizers that put noise around bin centres, and of training
    # on bin centres: where half a bin is tau standard deviations of the noise wide, if this is
    # later than the smallest time otherwise. 0: it never is.
    tau: float = real(TAU, least=0, most=100)
    # None: rademacher for K = 1, exact for K > 1
    trace: str | None = choice(None, (*PROBES, "exact"))
    # number of random probes of a trace that is not exact; a power of two is best
    probes: int = integer(2, least=1, below=2**20)
    # The fields from n_times to proposal_bins are for the bound, an expectation over times, which
    # is estimated by sweeps over all images.
    n_times: int = integer(2, least=1, below=2**20)  # number of times for an image in one sweep
    times: str = choice("lattice", times.DRAWS)  # how the times are spread
    importance_sampling: bool = flag(True)  # draw times by importance; False: uniform in t
    importance: str = choice("noise", IMPORTANCE)  # as training.importance
    sweeps: int = integer(8, least=1)  # number of sweeps
    # standard error in bits/dim at which the sweeps stop, after at least 8 of them; 0: off
    target_se: float = real(0.0, least=0, most=1)
    max_sweeps: int = integer(256, least=1)  # largest number of sweeps for target_se
    control: bool = flag(True)  # subtract a Gaussian control variate
    # number of bins of a density of times that is estimated on training images; 0: uniform
    proposal_bins: int = integer(32, below=2**16)
    method: str = method("tsit5")  # solver of the estimator ode
    rtol: float = tolerance(2e-4)  # relative tolerance of ode
    # absolute tolerance of ode, for data in [-1, 1] and for the log-determinant in nats/dim
    atol: float = tolerance(2e-4)
    fixed_steps: int = integer(0)  # number of equal steps of ode; 0: adaptive steps
    # precision of float32 matrix products; default: the accelerator's own (TF32, bfloat16)
    precision: str = choice("highest", PRECISIONS)
    # number of images on which the solver's error and the noise of ode are measured, for K > 1 a
    # Kth of it; 0: all
    subset: int = integer(32)
    features: str = choice("inception", EXTRACTORS)  # feature extractor of --mode=quality
    inception_weights: str = text("")  # file with the state dict of pytorch-fid
    inception_sha256: str = text("6726825d")  # first digits of the file's SHA-256
    # largest solver error of ode in bits/dim; a number with a larger error is marked
    solver_budget: float = real(1e-3, least=0, most=1)

    def check(self) -> None:
        """Check the table, and that a learned density of times has a proposal in log-SNR."""
        self.cells()
        check_importance(self.section, self.importance_sampling, self.importance)
        if self.proposal != "importance" and self.proposal_bins:
            raise ValueError(
                f"eval.importance={self.importance}, eval.importance_sampling="
                f"{self.importance_sampling} with eval.proposal_bins={self.proposal_bins}: the "
                "density of the bound's times can only be estimated over log-SNR; set "
                "--config.eval.proposal_bins=0"
            )

    @property
    def proposal(self) -> str:
        """The name of the proposal of the bound's times, a key of ``times.PROPOSALS``."""
        return proposal_name(self.importance_sampling, self.importance)

    def cells(self) -> list[Cell]:
        """The table that ``config.eval`` asks for, undefined cells included.

        Raises:
          ValueError: for an unknown choice, a table without numbers, K > 1 with a trace that is not
            exact, or a ``target_se`` without a bound.
        """
        registries = {
            "estimators": estimators.ESTIMATORS,
            "dequantizers": dequantizers.DEQUANTIZERS,
        }
        chosen = {field: choices_in(getattr(self, field)) for field in registries}
        for field, choices in registries.items():
            if field == "dequantizers" and "none" in chosen[field]:
                raise ValueError(
                    "eval.dequantizers=none is refused: integers have no density, so a model's "
                    "density at them can grow without limit; choose from "
                    f"{', '.join(sorted(choices))}"
                )
            for name in chosen[field]:
                check_choice(f"eval.{field}", name, choices)
        table = [
            Cell(estimator, dequantizer, count)
            for estimator in dict.fromkeys(chosen["estimators"])  # A name given twice counts once.
            for dequantizer in dict.fromkeys(chosen["dequantizers"])
            for count in dict.fromkeys(self.num_importance)
        ]
        if all(cell.reason_undefined for cell in table):
            raise ValueError(f"no number to compute: {table[0].name}: {table[0].reason_undefined}")
        if self.target_se and not any(
            cell.is_bound and not cell.reason_undefined for cell in table
        ):
            raise ValueError(
                f"eval.target_se={self.target_se}: only a bound is swept until this standard error "
                "is reached; add bound to eval.estimators, or set --config.eval.target_se=0"
            )
        for cell in table:
            self.divergence(cell.num_importance)  # It raises if the trace does not fit K.
        return table

    def divergence(self, num_importance: int = 1) -> Trace:
        """How the divergence is computed with K = ``num_importance`` draws of the dequantizer.

        This is ``eval.trace``. If it is None, K = 1 has Rademacher probes, and K > 1 the exact
        trace.

        Raises:
          ValueError: K > 1 with a trace that is not exact.
        """
        kind = self.trace
        if num_importance > 1 and kind not in (None, "exact"):
            raise ValueError(
                f"eval.trace={kind} with eval.num_importance={num_importance}: the noise of "
                "Hutchinson's trace would make the model look better than it is, by 0.15 bits/dim "
                "at K = 20 in one measurement; set --config.eval.trace=exact"
            )
        kind = kind or ("exact" if num_importance > 1 else "rademacher")
        return Trace(kind) if kind == "exact" else Trace(kind, self.probes)
