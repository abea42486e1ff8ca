"""The audit's part for this program, ``--mode=verify``: rows that compare every estimator, and what
it is made of, with data whose likelihood and score have a closed form (``oracle``)."""
