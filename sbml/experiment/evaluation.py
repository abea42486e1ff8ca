"""``config.eval``: which numbers an evaluation is of, and how precisely they are computed."""

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
    """An evaluation: a table of numbers of the images of one split.

    Raises:
      ValueError: naming a field, its value and what it may be.
    """

    section: ClassVar[str] = "eval"

    split: str = choice("test", (*data.SPLITS, data.VALIDATION))  # validation: data.validation
    # Every estimator with every dequantizer and every K; the first is the headline.
    estimators: tuple[str, ...] = names(("ode", "bound"))  # bound_ssm
    # truncated_normal, variational, categorical, learned
    dequantizers: tuple[str, ...] = names(("uniform",))
    # K draws of the dequantizer in one logarithm
    num_importance: tuple[int, ...] = integers((1,), least=1, below=2**20)
    importance_images: int = integer(0)  # where K > 1, on this many images; 0: max_images
    batch_size: int = integer(128, least=1)  # images
    max_images: int = integer(0)  # drawn from the split once and for all; 0: all
    in_order: bool = flag(False)  # max_images are the first of the split instead
    seed: int = integer(0, below=2**32)
    smallest_time: float | None = real(None, least=0, below=1)  # None: the training's
    # of what is of the integers themselves: their smallest time is where so many standard
    # deviations of the noise fill half a bin, if it is the later one; 0: never. A training on bin
    # centres begins there too
    tau: float = real(TAU, least=0, most=100)
    # None: rademacher, exact where K > 1
    trace: str | None = choice(None, (*PROBES, "exact"))
    # of a Hutchinson trace, ode's or bound_ssm's; a power of two serves best
    probes: int = integer(2, least=1, below=2**20)
    n_times: int = integer(2, least=1, below=2**20)  # of the bound, draws an image in one sweep
    times: str = choice("lattice", times.DRAWS)  # of the bound
    importance_sampling: bool = flag(True)  # its times by importance; or uniform in t
    importance: str = choice("noise", IMPORTANCE)  # as in training
    sweeps: int = integer(8, least=1)  # of the bound, each over all images
    # sweep, 8 times at least, to this standard error in bits/dim; 0: off
    target_se: float = real(0.0, least=0, most=1)
    max_sweeps: int = integer(256, least=1)
    control: bool = flag(True)  # Gaussian control variate of the bound
    # of a learned density of the bound's times; 0: uniform
    proposal_bins: int = integer(32, below=2**16)
    method: str = method("tsit5")
    rtol: float = tolerance(2e-4)
    atol: float = tolerance(2e-4)  # for data in [-1, 1], and nats/dim of the log-determinant
    fixed_steps: int = integer(0)  # 0: step control
    # of float32 products; default: the accelerator's own (TF32, bfloat16)
    precision: str = choice("highest", PRECISIONS)
    # images for the solver's error and the noise of ode; 0: all; a Kth where K > 1
    subset: int = integer(32)
    features: str = choice("inception", EXTRACTORS)  # of the samples' quality
    inception_weights: str = text("")  # pytorch-fid's state dict, a file
    inception_sha256: str = text("6726825d")  # that its hash begins with
    # bits/dim; a larger solver error marks the number
    solver_budget: float = real(1e-3, least=0, most=1)

    def check(self) -> None:
        """The table is not empty, and a learned density of times has its proposal."""
        cells(self)
        check_importance(self.section, self.importance_sampling, self.importance)
        if self.proposal != "importance" and self.proposal_bins:
            raise ValueError(
                f"eval.importance={self.importance}, eval.importance_sampling="
                f"{self.importance_sampling} with eval.proposal_bins={self.proposal_bins}: the "
                "density of the bound's times is one of log-SNR; set --config.eval.proposal_bins=0"
            )

    @property
    def proposal(self) -> str:
        """Where the bound's times are drawn, of ``times.PROPOSALS``."""
        return proposal_name(self.importance_sampling, self.importance)


def cells(section: Eval) -> list[Cell]:
    """The table that ``config.eval`` asks for, undefined cells included.

    Raises:
      ValueError: for an unknown choice, a table without numbers, K > 1 with a Hutchinson trace, or
        a ``target_se`` without a bound.
    """
    known = {
        "estimators": estimators.ESTIMATORS,
        "dequantizers": dequantizers.DEQUANTIZERS,
    }
    chosen = {field: choices_in(getattr(section, field)) for field in known}
    for field, choices in known.items():
        if field == "dequantizers" and "none" in chosen[field]:
            raise ValueError(
                "eval.dequantizers=none is refused: integers have no density, an estimate of "
                f"one is without bound; choose from {sorted(choices)}"
            )
        for name in chosen[field]:
            check_choice(f"eval.{field}", name, choices)
    table = [
        Cell(estimator, dequantizer, count)
        for estimator in dict.fromkeys(chosen["estimators"])  # Each once, in order.
        for dequantizer in dict.fromkeys(chosen["dequantizers"])
        for count in dict.fromkeys(section.num_importance)
    ]
    if all(cell.reason_undefined for cell in table):
        raise ValueError(f"no number to compute: {table[0].name}: {table[0].reason_undefined}")
    if section.target_se and not any(cell.is_bound and not cell.reason_undefined for cell in table):
        raise ValueError(
            f"eval.target_se={section.target_se}: only a bound is swept until it is reached; add "
            "bound to eval.estimators"
        )
    for cell in table:
        trace(section, cell.num_importance)
    return table


def trace(section: Eval, num_importance: int = 1) -> Trace:
    """How the divergence is computed: ``eval.trace``, else Rademacher, exact where K > 1.

    Raises:
      ValueError: for K > 1 with a trace that is not exact.
    """
    kind = section.trace
    if num_importance > 1 and kind not in (None, "exact"):
        raise ValueError(
            f"eval.trace={kind} with eval.num_importance={num_importance}: the noise of "
            "Hutchinson's trace makes the logarithm of a mean of K likelihoods too good "
            "(0.15 bits/dim at K = 20 in one measurement); set --config.eval.trace=exact"
        )
    kind = kind or ("exact" if num_importance > 1 else "rademacher")
    return Trace(kind) if kind == "exact" else Trace(kind, section.probes)
