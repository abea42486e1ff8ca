"""A learned noise schedule: the numbers of the SDE are among the parameters, by their names.

    params = {**those of the network, "sde": {"gamma_0": (), "gamma_1": ()}}

They are trained with the network's, by the gradient of the whole bound, and averaged as these are.
The network reads only its own. What is evaluated has the averages as plain numbers, as if the
config had given them.

Reference: Kingma, Salimans, Poole, Ho, "Variational Diffusion Models", NeurIPS 2021, section 5.1.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp

from sbml.experiment.data import Data
from sbml.experiment.score import Process
from sbml.experiment.training import Training
from sbml.runtime import sharding
from sbml.sdes import SDE

KEY = "sde"


def with_numbers(params: Any, sde: SDE) -> Any:
    """``params`` of a network with the numbers of ``sde`` beside them, which they start from."""
    return {**params, KEY: {n: jnp.asarray(v, float) for n, v in vars(sde).items()}}


def learned_sde(sde: SDE, params: Any) -> SDE:
    """``sde`` with the numbers that ``params`` have, for the loss and its gradient."""
    return dataclasses.replace(sde, **params[KEY])


def numbers(params: Any) -> dict[str, float]:
    """The numbers that ``params`` have; none where they were not learned."""
    return {name: float(sharding.to_host(value)) for name, value in params.get(KEY, {}).items()}


def check(process: Process, training: Training, data: Data) -> None:
    """Refuse a learned schedule whose loss would not be the whole bound.

    Raises:
      ValueError: naming the field and its value.
    """
    if not process.learned:
        return
    if not vars(process.build()):
        raise ValueError(f"sde.learned with sde.name={process.name}: it has no numbers to learn")
    if data.dequantization != "centre":
        raise ValueError(
            f"sde.learned with data.dequantization={data.dequantization}: the schedule is learned "
            "through the bound with a decoder; set --config.data.dequantization=centre"
        )
    if training.discrete_levels or not training.likelihood_weighting:
        raise ValueError(
            f"sde.learned with training.discrete_levels={training.discrete_levels}, "
            f"training.likelihood_weighting={training.likelihood_weighting}: the loss is no bound; "
            "set --config.training.likelihood_weighting=True"
        )
