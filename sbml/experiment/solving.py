"""What ``config.eval`` and ``config.sampling`` share: an ODE solver and a smallest time."""

from typing import Annotated

from annotated_types import Ge, Le

from sbml.experiment.fields import Section, section_errors
from sbml.ode import Solver
from sbml.sdes import SDE

# Above 0.1 no step would ever be rejected. The error is measured with a tenth of the tolerance,
# which must not be below ``ode.least_tolerance`` of float32.
Tolerance = Annotated[float, Ge(1e-6), Le(0.1)]


class Solving(Section):
    """Fields to which each section gives its own defaults."""

    method: str
    rtol: float
    atol: float
    fixed_steps: int
    max_steps: int
    smallest_time: float | None

    def solver(self) -> Solver:
        """The ODE solver."""
        with section_errors(self.section):
            return Solver(
                method=self.method,
                rtol=self.rtol,
                atol=self.atol,
                max_steps=self.max_steps,
                fixed_steps=self.fixed_steps or None,
            )

    def eps(self, sde: SDE, otherwise: float) -> float:
        """``smallest_time``, or ``otherwise`` if it is None, checked by ``sde.check_time``."""
        eps = otherwise if self.smallest_time is None else self.smallest_time
        sde.check_time(eps, self.name_of("smallest_time"))
        return eps
