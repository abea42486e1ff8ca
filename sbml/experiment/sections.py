"""One part each from a config: the process, the network, the optimizer, a solver, the data, and
which numbers an evaluation is of.

What a run needs of them together is in ``sbml.experiment.build``.
"""

import dataclasses
from collections.abc import Collection
from typing import Any

import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from sbml import dequantizers, estimators, networks, samplers, sdes, times, vdm_schedule
from sbml.data import Options, imagenet32
from sbml.divergence import Trace
from sbml.estimators import Cell
from sbml.experiment.config import choices_in
from sbml.ode import Solver
from sbml.runtime import optim

SDES: dict[str, type[sdes.SDE]] = {**sdes.SDES, "linear_gamma": vdm_schedule.LinearGamma}


def check_choice(field: str, name: str, choices: Collection[str]) -> str:
    """``name`` itself.

    Raises:
      ValueError: if it is not among ``choices``, naming the config field and the choices.
    """
    if name not in choices:
        raise ValueError(f"{field}={name!r} is unknown; choose from {sorted(choices)}")
    return name


def plain(value: Any) -> Any:
    """``value`` of dicts, tuples and lists as JSON has them: tuples become lists."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return [plain(v) for v in value]
    return value


def sde(config: ConfigDict) -> sdes.SDE:
    """The forward process, from those fields of ``config.sde`` that it has."""
    kind = SDES[check_choice("sde.name", config.sde.name, SDES)]
    return kind(**{f.name: config.sde[f.name] for f in dataclasses.fields(kind)})


def smallest_time(config: ConfigDict) -> float:
    """The paper's, unless ``training.smallest_time`` says otherwise.

    The SDE's own, but for VP on ImageNet with likelihood weighting and importance sampling 5e-5.
    """
    training = config.training
    if training.smallest_time is not None:
        return training.smallest_time
    both = training.likelihood_weighting and training.importance_sampling
    imagenet = imagenet32.version(config.data.source) is not None
    return max(sde(config).smallest_time, 5e-5 if imagenet and both else 0.0)


def trained_from(config: ConfigDict) -> float:
    """The smallest time whose noise training shows: in discrete time, that of the first level."""
    eps, levels = smallest_time(config), config.training.discrete_levels
    if not levels:
        return eps
    process = sde(config)
    return max(eps, float(process.time(process.levels(levels).log_snr(jnp.zeros(())))))


def solver(section: ConfigDict) -> Solver:
    """The ODE solver of ``config.eval`` or ``config.sampling``."""
    fixed_steps = section.fixed_steps or None
    tolerances = {"rtol": section.rtol, "atol": section.atol}
    return Solver(method=section.method, fixed_steps=fixed_steps, **tolerances)


def sampler(section: ConfigDict) -> samplers.Sampler:
    """The sampler of ``config.sampling``, those of its fields that it has."""
    kind = samplers.SAMPLERS[check_choice("sampling.sampler", section.sampler, samplers.SAMPLERS)]
    name = check_choice("sampling.corrector", section.corrector, samplers.CORRECTORS)
    follows = samplers.CORRECTORS[name]
    options = {"steps": section.corrector_steps, "snr": section.snr}
    fields = {
        "solver": solver(section),
        "steps": 500 if section.steps is None else section.steps,
        "eta": section.eta,
        "corrector": follows() if name == "none" else follows(**options),
        **({"spacing": section.spacing} if section.spacing else {}),
    }
    known = {f.name for f in dataclasses.fields(kind)}
    if section.spacing:
        check_choice("sampling.spacing", section.spacing, samplers.SPACINGS)
    asked = {"corrector": name != "none", "spacing": section.spacing, "eta": section.eta}
    asked |= {"solver": section.fixed_steps, "steps": section.steps is not None}
    for field, value in asked.items():
        if value and field not in known:
            flag = "fixed_steps" if field == "solver" else field
            raise ValueError(
                f"sampling.{flag}={section[flag]}: sampler {section.sampler} takes no {flag} "
                "(docs/samplers.md)"
            )
    return kind(**{field: value for field, value in fields.items() if field in known})


def cells(section: ConfigDict) -> list[Cell]:
    """The table that ``config.eval`` asks for, undefined cells included.

    Raises:
      ValueError: for an unknown choice, an empty table, K > 1 with a Hutchinson trace, or a
        ``target_se`` without a bound.
    """
    known = {
        "estimators": estimators.ESTIMATORS,
        "dequantizers": dequantizers.DEQUANTIZERS,
    }
    chosen = {field: choices_in(section[field]) for field in known}
    for field, choices in known.items():
        if not chosen[field]:
            raise ValueError(f"eval.{field} is empty: choose from {sorted(choices)}")
        if field == "dequantizers" and "none" in chosen[field]:
            raise ValueError(
                "eval.dequantizers=none is refused: integers have no density, an estimate of "
                f"one is without bound; choose from {sorted(choices)}"
            )
        for name in chosen[field]:
            check_choice(f"eval.{field}", name, choices)
    if not section.num_importance or min(section.num_importance) < 1:
        raise ValueError(f"eval.num_importance={section.num_importance}: need integers from 1 up")
    table = [
        Cell(estimator, dequantizer, count)
        for estimator in dict.fromkeys(chosen["estimators"])  # Each once, in order.
        for dequantizer in dict.fromkeys(chosen["dequantizers"])
        for count in dict.fromkeys(section.num_importance)
    ]
    if all(cell.undefined for cell in table):
        raise ValueError(f"no number to compute: {table[0].name}: {table[0].undefined}")
    if section.target_se and not any(cell.is_bound and not cell.undefined for cell in table):
        raise ValueError(
            f"eval.target_se={section.target_se}: only a bound is swept until it is reached; add "
            "bound to eval.estimators"
        )
    for cell in table:
        trace(section, cell.num_importance)
    return table


def trace(section: ConfigDict, num_importance: int = 1) -> Trace:
    """How the divergence is computed: ``eval.trace``, else Rademacher, exact where K > 1.

    Raises:
      ValueError: for K > 1 with a trace that is not exact.
    """
    kind = section.trace
    if num_importance > 1 and kind not in (None, "exact"):
        raise ValueError(
            f"eval.trace={kind} with eval.num_importance={num_importance}: the noise of "
            "Hutchinson's trace makes the logarithm of a mean of K likelihoods too good "
            "(0.15 bits/dim at K = 20 in one measurement); set --config.eval.trace=exact"
        )
    kind = kind or ("exact" if num_importance > 1 else "rademacher")
    return Trace(kind) if kind == "exact" else Trace(kind, section.probes)


def network(config: ConfigDict) -> Any:
    """The network ``config.model.name`` with its fields."""
    fields = dict(config.model)
    module = networks.get(fields.pop("name"))
    known = {f.name for f in dataclasses.fields(module)}
    unknown = sorted(set(fields) - known)
    if unknown:
        raise ValueError(
            f"config.model has fields {unknown} that {config.model.name!r} lacks: begin the config "
            f"with sbml.experiment.config.default({config.model.name!r})"
        )
    return module(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})


def proposal(section: ConfigDict) -> str:
    """Where times are drawn, of ``times.PROPOSALS``, by ``config.training`` or ``config.eval``."""
    return "importance" if section.importance_sampling else "uniform"


def loss_unit(config: ConfigDict) -> float:
    """Our loss, nats/dim, where the paper's is 1: it leaves constants out, mean |z - F|^2.

    Z / 2 where importance sampling makes the likelihood's weights equal, else 1 / 2.
    """
    training = config.training
    if not (training.likelihood_weighting and training.importance_sampling):
        return 0.5
    return float(times.Importance(sde(config), smallest_time(config)).normaliser) / 2


def data_options(section: ConfigDict) -> Options:
    """How to find and cut images, from ``config.data``.

    Raises:
      ValueError: for a folder's images with a shape or levels that they are not given.
    """
    height, width, channels = section.shape
    if section.source == "image_folder" and (height != width or section.levels != 256):
        raise ValueError(
            f"data.shape={height},{width},{channels} with data.levels={section.levels}: images of "
            "a folder are made square, of 256 levels; set --config.data.shape=SIZE,SIZE,CHANNELS "
            "--config.data.levels=256"
        )
    return Options(
        cache_dir=section.cache_dir or None,
        manual_dir=section.manual_dir or None,
        path=section.path or None,
        image_size=section.shape[0],
        channels=section.shape[-1],
        crop=section.crop,
        test_fraction=section.test_fraction,
        seed=section.split_seed,
    )


def optimizer(section: ConfigDict, unit: float) -> optax.GradientTransformation:
    """The optimizer of ``section.optim``, of ``config`` itself or ``config.dequantizer``.

    ``unit`` is what our loss is where the paper's is 1: clipping at ``grad_clip`` is then theirs.
    """
    o = section.optim
    rate = optim.learning_rate(o.lr, o.warmup, o.schedule, section.training.num_steps)
    return optim.adam(
        rate,
        beta1=o.beta1,
        beta2=o.beta2,
        eps=o.eps,
        weight_decay=o.weight_decay,
        grad_clip=o.grad_clip * unit,
    )
