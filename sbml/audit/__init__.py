"""A conformance suite for likelihood code: is it a bound, normalised, and its error bar right?

    from sbml.audit import Estimator, audit

    print(audit(Estimator("my bound", my_bound, "centre")))

``worlds`` are data whose entropy and denoisers are known, ``suite`` has the checks, ``ours`` the
estimators of this package, and ``mistakes`` estimators that must fail.

May import: core, density, dequantizers, likelihood, score, sdes, statistics.
"""

from sbml.audit.continuous import density as density
from sbml.audit.suite import WORLDS as WORLDS
from sbml.audit.suite import Estimator as Estimator
from sbml.audit.suite import Numbers as Numbers
from sbml.audit.suite import Report as Report
from sbml.audit.suite import Schedule as Schedule
from sbml.audit.suite import audit as audit
