"""One SDE of each family, for code that sees an SDE only through its coefficients.

The coefficients of all SDEs have tests of their own (``test_sdes``, ``test_schedules``,
``test_times``). The estimators are compared with the truth for every SDE by ``--mode=verify``, and
one sampler for every SDE by ``test_samplers``.
"""

# In VE the signal is constant and the noise grows; in VP the signal decays; in the rectified flow
# it is 0 at T.
FAMILIES = ("ve", "vp", "rectified_flow")
