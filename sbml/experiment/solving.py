"""The solver of an ODE: ``config.sampling.solver``, and the first fields of ``config.eval.ode``."""

from typing import Annotated, ClassVar

from annotated_types import Ge, Le

from sbml.experiment.fields import Natural, Positive, Section, among, field, section_errors
from sbml.ode import MAX_STEPS, METHODS, Solver

# Above 0.1 no step would ever be rejected. The error is measured with a tenth of the tolerance,
# which must not be below ``ode.least_tolerance`` of float32.
Tolerance = Annotated[float, Ge(1e-6), Le(0.1)]
Method = Annotated[str, among(METHODS)]


class Solving(Section):
    """The solver of the sampler ``ode``."""

    section: ClassVar[str] = "sampling.solver"

    method: Method = field("dopri5", "the solver")
    rtol: Tolerance = field(1e-3, "relative tolerance")
    atol: Tolerance = field(1e-3, "absolute tolerance, for data in [-1, 1]")
    fixed_steps: Natural = field(0, "number of equal steps; 0: adaptive steps")
    max_steps: Positive = field(MAX_STEPS, "number of adaptive steps at which it gives up")

    def check(self) -> None:
        """Check that the method has an error estimate, or a fixed number of steps."""
        self.build()

    def build(self) -> Solver:
        """The ODE solver."""
        with section_errors(self.section):
            return Solver(
                method=self.method,
                rtol=self.rtol,
                atol=self.atol,
                max_steps=self.max_steps,
                fixed_steps=self.fixed_steps or None,
            )
