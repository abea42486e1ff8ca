"""The audit of this program, ``--mode=verify``. Its rows compare every estimator, and the functions
that it uses, with closed forms, on data whose likelihood and score are known (``oracle``)."""
