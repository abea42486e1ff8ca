"""Every estimator compared with data whose truth is known in closed form."""
