"""Fields that ``config.eval`` and ``config.sampling`` share: an ODE solver and a smallest time."""

import dataclasses
from typing import Any

from sbml.experiment.fields import Section, choice, integer, real, section_errors
from sbml.ode import MAX_STEPS, METHODS, Solver
from sbml.sdes import SDE


def method(default: str) -> Any:
    """A field: a method of ``ode.Solver``."""
    return choice(default, METHODS)


def tolerance(default: float) -> Any:
    """A field: a tolerance of ``ode.Solver``. Above 0.1 no step would ever be rejected. The error
    is measured with a tenth of it, which must not be below ``ode.least_tolerance`` of float32."""
    return real(default, least=1e-6, most=0.1)


@dataclasses.dataclass(frozen=True)
class Solving(Section):
    """Settings of an ODE solver, and a smallest time; ``Eval`` and ``Sampling`` set the defaults.

    Raises:
      ValueError: a field is invalid; the message gives its name, value and range.
    """

    method: str
    rtol: float
    atol: float
    fixed_steps: int = integer(0)  # number of equal steps; 0: adaptive steps
    max_steps: int = integer(MAX_STEPS, least=1)  # number of adaptive steps at which it gives up
    smallest_time: float | None = real(None, least=0, below=1)

    def solver(self) -> Solver:
        """The ODE solver.

        Raises:
          ValueError: adaptive steps with a method that has no error estimate.
        """
        fixed_steps = self.fixed_steps or None
        with section_errors(self.section):
            return Solver(
                method=self.method,
                rtol=self.rtol,
                atol=self.atol,
                fixed_steps=fixed_steps,
                max_steps=self.max_steps,
            )

    def eps(self, sde: SDE, otherwise: float) -> float:
        """``smallest_time``, or ``otherwise`` where it is None.

        Raises:
          ValueError: if it does not lie in (0, T).
        """
        eps = otherwise if self.smallest_time is None else self.smallest_time
        return sde.check_time(eps, self.name_of("smallest_time"))
