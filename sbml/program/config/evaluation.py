"""``config.eval``: which numbers an evaluation computes, and how precisely."""

from typing import Annotated, ClassVar

from annotated_types import Ge, Le

from sbml import data
from sbml.core.scalars import MOST_DRAWS, MOST_SWEEPS
from sbml.density.estimators import ESTIMATORS, Cell
from sbml.dequantizers import DEQUANTIZERS
from sbml.likelihood.discrete import TAU
from sbml.program.config.fields import Natural, Positive, Section, Seed, among, field
from sbml.program.config.sampling import Method, Solving, Tolerance
from sbml.program.config.training import Bins, Times
from sbml.program.features import EXTRACTORS
from sbml.score.divergence import PROBES, Trace

DrawCount = Annotated[int, Ge(1), Le(MOST_DRAWS)]
Sweeps = Annotated[int, Ge(1), Le(MOST_SWEEPS)]


class Ode(Solving):
    """The estimator ``ode``: its solver, and the trace of the divergence."""

    section: ClassVar[str] = "eval.ode"

    method: Method = field("tsit5", "the solver")
    rtol: Tolerance = field(2e-4, "relative tolerance")
    atol: Tolerance = field(
        2e-4, "absolute tolerance, for data in [-1, 1] and for the log-determinant in nats/dim"
    )
    trace: Annotated[str, among((*PROBES, "exact"))] | None = field(
        None, "trace of the divergence; None: rademacher for K = 1, exact for K > 1"
    )
    probes: DrawCount = field(
        2, "number of random probes of a trace that is not exact; a power of two is best"
    )
    subset: Natural = field(
        32,
        "number of images on which the solver's error and the noise are measured, divided by K if "
        "K > 1; 0: all",
    )
    solver_budget: float = field(
        1e-3, "largest solver error in bits/dim; a number with a larger error is marked", ge=0, le=1
    )

    def divergence(self, num_importance: int = 1) -> Trace:
        """How the divergence is computed with K = ``num_importance`` draws of the dequantizer.

        This is ``trace``. If it is None, K = 1 has Rademacher probes, and K > 1 the exact trace.
        """
        kind = self.trace
        if num_importance > 1 and kind not in (None, "exact"):
            raise ValueError(
                f"eval.ode.trace={kind} with eval.num_importance={num_importance}: the noise of "
                "Hutchinson's trace would make the model look better than it is, by 0.15 bits/dim "
                "at K = 20 in one measurement; set --config.eval.ode.trace=exact"
            )
        kind = kind or ("exact" if num_importance > 1 else "rademacher")
        return Trace(kind) if kind == "exact" else Trace(kind, self.probes)


class Bound(Times):
    """The bounds: the times of an image, and how often it is swept."""

    section: ClassVar[str] = "eval.bound"

    n_times: DrawCount = field(2, "number of times for an image in one sweep")
    sweeps: Sweeps = field(8, "number of sweeps over all images")
    target_se: float = field(
        0.0,
        "standard error in bits/dim at which the sweeps stop, after at least 8; 0: off",
        ge=0,
        le=1,
    )
    max_sweeps: Sweeps = field(256, "largest number of sweeps for target_se")
    control: bool = field(
        True, "subtract a Gaussian control variate where a pilot finds that it helps"
    )
    proposal_bins: Bins = field(
        32, "number of bins of a density of times that is estimated on training images; 0: uniform"
    )
    level_images: Natural = field(
        128,
        "number of training images, and of evaluated ones, on which the loss at each noise level "
        "is measured; 0: none",
    )

    def check(self) -> None:
        """Check that a learned density of times has a proposal in log-SNR."""
        if self.proposal_bins and not self.importance_sampling:
            raise ValueError(
                "eval.bound.importance_sampling=False with eval.bound.proposal_bins="
                f"{self.proposal_bins}: the density of the times can only be estimated over "
                "log-SNR; set --config.eval.bound.proposal_bins=0"
            )


class Quality(Section):
    """The features of ``--mode=quality``."""

    section: ClassVar[str] = "eval.quality"

    features: Annotated[str, among(EXTRACTORS)] = field("inception", "feature extractor")
    inception_weights: str = field("", "file with the state dict of pytorch-fid")
    inception_sha256: str = field("6726825d", "first digits of the file's SHA-256")


class Eval(Section):
    """Settings of ``--mode=eval``: a table of mean bits/dim over the images of one split.

    The table has a number for every estimator with every dequantizer and every K, the number of
    draws of the dequantizer in one logarithm. The first number is the headline of the report.
    """

    section: ClassVar[str] = "eval"

    split: Annotated[str, among((*data.SPLITS, data.VALIDATION))] = field(
        "test", "images to evaluate; for validation, see data.validation"
    )
    estimators: tuple[Annotated[str, among(ESTIMATORS)], ...] = field(
        ("ode", "bound"), "the estimators of the table", min_length=1
    )
    dequantizers: tuple[Annotated[str, among(DEQUANTIZERS)], ...] = field(
        ("uniform",),
        "the dequantizers of the table; without one, integers have no density",
        min_length=1,
    )
    num_importance: tuple[DrawCount, ...] = field(
        (1,), "the values of K, numbers of draws of the dequantizer in one logarithm", min_length=1
    )
    importance_images: Natural = field(0, "number of images for K > 1; 0: as many as for K = 1")
    batch_size: Positive = field(128, "number of images in a batch, divided by K if K > 1")
    max_images: Natural = field(0, "size of a random sample, the same in every run; 0: all images")
    in_order: bool = field(
        False, "take the first max_images of the split instead of a random sample"
    )
    seed: Seed = field(0, "seed of all random draws")
    smallest_time: float | None = field(
        None, "smallest time of the ODE and of the bound; None: that of training", ge=0, lt=1
    )
    tau: float = field(
        TAU,
        "only for models of bin centres (data.dequantization=centre): the smallest time is that at "
        "which half a bin is as wide as tau standard deviations of the noise, unless the usual one "
        "is later; use the same value in training and evaluation; 0: always the usual one",
        ge=0,
        le=100,
    )
    precision: Annotated[str, among(("default", "high", "highest"))] = field(
        "highest",
        "precision of float32 matrix products; default: the accelerator's own (TF32, bfloat16)",
    )
    classifier_images: Natural = field(
        64, "number of images that a class-conditional model classifies by Bayes' rule; 0: none"
    )
    ode: Ode = Ode()
    bound: Bound = Bound()
    quality: Quality = Quality()

    def check(self) -> None:
        """Check the table."""
        self.cells()

    def cells(self) -> list[Cell]:
        """The table that ``config.eval`` asks for, undefined cells included."""
        table = [
            Cell(estimator, dequantizer, count)
            for estimator in dict.fromkeys(self.estimators)  # A name given twice counts once.
            for dequantizer in dict.fromkeys(self.dequantizers)
            for count in dict.fromkeys(self.num_importance)
        ]
        if all(cell.reason_undefined for cell in table):
            raise ValueError(f"no number to compute: {table[0].name}: {table[0].reason_undefined}")
        if self.bound.target_se and not any(
            cell.kind.is_bound and not cell.reason_undefined for cell in table
        ):
            raise ValueError(
                f"eval.bound.target_se={self.bound.target_se}: only a bound is swept until this "
                "standard error is reached; add bound to eval.estimators, or set "
                "--config.eval.bound.target_se=0"
            )
        for cell in table:
            self.ode.divergence(cell.num_importance)  # It raises if the trace does not fit K.
        return table
