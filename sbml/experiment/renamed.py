"""Names that fields of a config had in earlier versions. They are still read: in config files, on
the command line, and in the configs that checkpoints and evaluations store."""

from collections.abc import Mapping
from typing import Any, TypeVar

from absl import logging
from flax.traverse_util import flatten_dict

from sbml.types import Json

T = TypeVar("T")

SOLVER = "method rtol atol fixed_steps max_steps"
# The fields of ``eval`` and ``sampling`` in earlier versions, by the sections that have them now.
_SECTIONS = {
    "eval.ode": f"{SOLVER} trace probes subset solver_budget",
    "eval.bound": "n_times times importance_sampling importance sweeps target_se max_sweeps "
    "control proposal_bins level_images",
    "eval.quality": "features inception_weights inception_sha256",
    "sampling": "num_images batch_size seed smallest_time denoise_last frames",
    "sampling.solver": SOLVER,
    "sampling.sampler": "steps spacing eta",
}
NEW = {
    f"{section.partition('.')[0]}.{field}": f"{section}.{field}"
    for section, fields in _SECTIONS.items()
    for field in fields.split()
} | {
    "sampling.sampler": "sampling.sampler.name",
    "sampling.corrector": "sampling.corrector.name",
    "sampling.corrector_steps": "sampling.corrector.steps",
    "sampling.snr": "sampling.corrector.snr",
}


def current(
    values: Mapping[str, T], sampler: str = "", level: int = logging.WARNING
) -> dict[str, T]:
    """``values`` by the names that fields have now; a line of the log tells the new names.

    A sampler of another package, called ``sampler``, had its own fields in ``sampling``. A stored
    config without a corrector had the fields of the others all the same, which are left out.
    """
    found, changed = {}, []
    without = values.get("sampling.corrector") == "none"
    for name, value in values.items():
        section, _, field = name.rpartition(".")
        own = section == "sampling" and ":" in sampler
        new = NEW.get(name, f"sampling.sampler.{field}" if own else name)
        if without and name in ("sampling.corrector_steps", "sampling.snr"):
            continue
        found[new] = value
        changed += [f"config.{name} is now config.{new}"] if new != name else []
    if changed:
        more = f", and {len(changed) - 3} more (docs/fields.md)" if len(changed) > 3 else ""
        logging.log(level, "%s%s", ", ".join(changed[:3]), more)
    return found


def stored(config: Json) -> dict[str, Any]:
    """The fields of a stored ``config``, nested mappings, by the names that they have now."""
    fields = flatten_dict(config, sep=".")
    return current(fields, fields.get("sampling.sampler", ""), logging.INFO)
