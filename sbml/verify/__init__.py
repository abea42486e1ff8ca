"""Comparison of every estimator with data whose likelihood and score have a closed form."""
