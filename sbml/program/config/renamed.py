"""Names that fields of a config had in earlier versions. They are still read: in config files, on
the command line, and in the configs that checkpoints and evaluations store."""

from collections.abc import Mapping
from typing import Any, TypeVar

from absl import logging
from flax.traverse_util import flatten_dict

from sbml.core.types import Json
from sbml.program.config.evaluation import Bound, Ode, Quality
from sbml.program.config.sampling import Sampling, Solving

T = TypeVar("T")

# The fields of these sections were fields of ``eval`` and ``sampling``, with the same names. So a
# new field of them must not have the name of another field of ``eval`` or ``sampling``.
NEW = {
    f"{section}.{field}": kind.name_of(field)
    for section, kinds in (("eval", (Ode, Bound, Quality)), ("sampling", (Solving,)))
    for kind in kinds
    for field in kind.model_fields
} | {
    **{f"sampling.{field}": f"sampling.sampler.{field}" for field in ("steps", "spacing", "eta")},
    "sampling.sampler": "sampling.sampler.name",
    "sampling.corrector": "sampling.corrector.name",
    "sampling.corrector_steps": "sampling.corrector.steps",
    "sampling.snr": "sampling.corrector.snr",
}
# Values that stood for the default of the sampler, also for a sampler without the field.
UNSET = {"sampling.steps": None, "sampling.spacing": "", "sampling.eta": 0.0}


def current(
    values: Mapping[str, T], sampler: str = "", level: int = logging.WARNING
) -> dict[str, T]:
    """``values`` by the names that fields have now; a line of the log tells the new names.

    A sampler of another package, called ``sampler``, had its own fields in ``sampling``.
    """
    found, changed = {}, []
    for name, value in values.items():
        section, _, field = name.rpartition(".")
        own = section == "sampling" and ":" in sampler and field not in Sampling.model_fields
        new = NEW.get(name, f"sampling.sampler.{field}" if own else name)
        found[new] = value
        changed += [f"config.{name} is now config.{new}"] if new != name else []
    if changed:
        more = f", and {len(changed) - 3} more (docs/fields.md)" if len(changed) > 3 else ""
        logging.log(level, "%s%s", ", ".join(changed[:3]), more)
    return found


def stored(config: Json) -> dict[str, Any]:
    """The fields of a stored ``config``, nested mappings, by the names that they have now."""
    fields = flatten_dict(config, sep=".")
    unused = {name for name, value in UNSET.items() if fields.get(name, value) == value}
    if fields.get("sampling.corrector") == "none":
        unused |= {"sampling.corrector_steps", "sampling.snr"}
    used = {name: value for name, value in fields.items() if name not in unused}
    return current(used, fields.get("sampling.sampler", ""), logging.INFO)
