"""A learned noise schedule: the numbers of the SDE are trained together with the network.

    params = {**parameters of the network, "sde": {"gamma_0": (), "gamma_1": ()}}

The numbers of the SDE are scalars among the parameters. They are trained by the gradient of the
whole bound, and their averages are kept as those of the network's parameters are. An evaluation or
sampling uses the averages as plain numbers, as if the config had set them.

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
    """``params`` of a network together with the numbers of ``sde`` as their initial values."""
    return {**params, KEY: {n: jnp.asarray(v, float) for n, v in vars(sde).items()}}


def learned_sde(sde: SDE, params: Any) -> SDE:
    """``sde`` with the numbers in ``params``, through which the loss has a gradient."""
    return dataclasses.replace(sde, **params[KEY])


def numbers(params: Any) -> dict[str, float]:
    """The numbers of the SDE in ``params`` by name; empty if they are not learned."""
    return {name: float(sharding.to_host(value)) for name, value in params.get(KEY, {}).items()}


def check(process: Process, training: Training, data: Data) -> None:
    """Check that the loss of a learned schedule is the whole bound."""
    if not process.learned:
        return
    if not vars(process.build()):
        raise ValueError(f"sde.learned with sde.name={process.name}: it has no numbers to learn")
    if data.dequantization != "centre":
        raise ValueError(
            f"sde.learned with data.dequantization={data.dequantization}: the schedule is learned "
            "through the bound with a decoder; set --config.data.dequantization=centre"
        )
    needed = {"likelihood_weighting": True, "discrete_levels": 0, "second_order": 0}
    wrong = {name: v for name in needed if (v := getattr(training, name)) != needed[name]}
    if wrong:
        given = ", ".join(f"training.{name}={value}" for name, value in wrong.items())
        flags = " ".join(f"--config.training.{name}={needed[name]}" for name in wrong)
        raise ValueError(f"sde.learned with {given}: the loss is no bound; set {flags}")
