"""One SDE of each family, for code that sees an SDE only through its coefficients.

The coefficients of all SDEs have tests of their own (``test_sdes``, ``test_schedules``,
``test_times``), and ``--mode=verify`` compares every estimator with each SDE.
"""

# The signal is kept against growing noise, decays, and vanishes at T.
FAMILIES = ("ve", "vp", "rectified_flow")
