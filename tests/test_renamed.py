"""The names that fields had in earlier versions are read wherever a config comes from."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import tiny
from flax.traverse_util import flatten_dict, unflatten_dict
from test_sections import node_of

from sbml import samplers
from sbml.core.scalars import notation
from sbml.likelihood.ode import Solver
from sbml.program.config import renamed
from sbml.program.config.config import Config, of_checkpoint, with_overrides
from sbml.program.runtime.checkpoint import Checkpoints

# The sections ``eval`` and ``sampling`` of a config that an earlier version stored.
EVAL: dict[str, Any] = {
    "atol": 1e-3,
    "batch_size": 7,
    "classifier_images": 64,
    "control": False,
    "dequantizers": ["uniform"],
    "estimators": ["ode", "bound"],
    "features": "inception",
    "fixed_steps": 9,
    "importance": "velocity",
    "importance_images": 0,
    "importance_sampling": True,
    "in_order": False,
    "inception_sha256": "67",
    "inception_weights": "a.pth",
    "level_images": 1,
    "max_images": 0,
    "max_steps": 77,
    "max_sweeps": 16,
    "method": "heun",
    "n_times": 3,
    "num_importance": [1],
    "precision": "highest",
    "probes": 4,
    "proposal_bins": 0,
    "rtol": 1e-3,
    "seed": 0,
    "smallest_time": None,
    "solver_budget": 0.5,
    "split": "test",
    "subset": 5,
    "sweeps": 2,
    "target_se": 0.1,
    "tau": 3.0,
    "times": "iid",
    "trace": "exact",
}
SAMPLING: dict[str, Any] = {
    "atol": 1e-2,
    "batch_size": 4,
    "corrector": "langevin",
    "corrector_steps": 2,
    "denoise_last": True,
    "eta": 0.5,
    "fixed_steps": 0,
    "frames": 8,
    "max_steps": 88,
    "method": "heun",
    "num_images": 4,
    "rtol": 1e-2,
    "sampler": "ddim",
    "seed": 0,
    "smallest_time": None,
    "snr": 0.2,
    "spacing": "time",
    "steps": 20,
}
OLD = flatten_dict({"eval": EVAL, "sampling": SAMPLING}, sep=".")


@dataclasses.dataclass(frozen=True)
class Slow(samplers.EulerMaruyama):
    wait: float = 1.0


def in_a_file(fields: dict[str, Any]) -> Config:
    config = tiny.get_config()
    for name, value in fields.items():
        section, _, field = name.partition(".")
        value = tuple(value) if isinstance(value, list) else value
        config[section].update({field: value})
    return Config(**config.to_dict())


def on_the_command_line(fields: dict[str, Any]) -> Config:
    texts = {name: notation(value) for name, value in fields.items()}
    return with_overrides(tiny.get_config(), texts)


def in_a_checkpoint(fields: dict[str, Any]) -> Config:
    stored = Config(**tiny.get_config().to_dict()).plain() | {"eval": {}, "sampling": {}}
    stored |= unflatten_dict(fields, sep=".")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoints, "metadata", lambda self: {"config": stored})
        return of_checkpoint("run", trust=["test_renamed"])


@pytest.mark.parametrize("read", [in_a_file, on_the_command_line, in_a_checkpoint])
def test_every_earlier_name_sets_the_field_of_today(
    read: Callable[[dict[str, Any]], Config], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    config = read(OLD)
    for name, value in OLD.items():
        node, field = node_of(config.plain(), renamed.NEW.get(name, name))
        assert node[field] == value, name
    corrector = samplers.Langevin(2, 0.2)
    assert config.sampling.build() == samplers.DDIM(20, "time", corrector, eta=0.5)
    assert config.eval.ode.build() == Solver("heun", 1e-3, 1e-3, fixed_steps=9, max_steps=77)
    lines = [r.getMessage() for r in caplog.records if "is now" in r.getMessage()]
    if read is in_a_file:
        assert len(lines) == sum(renamed.NEW.get(name, name) != name for name in OLD)
        assert "config.eval.rtol is now config.eval.ode.rtol" in lines
    else:
        [line] = lines
        assert "config.eval.atol is now config.eval.ode.atol" in line and "more (docs/" in line


@pytest.mark.parametrize("name", samplers.SAMPLERS)
def test_a_stored_sampler_draws_as_before(name: str) -> None:
    """The values that stood for the defaults stand for them, also in fields of other samplers."""
    usual = {"corrector": "none", "snr": 0.3, "eta": 0.0, "spacing": "", "steps": None}
    fields = {f"sampling.{k}": v for k, v in (SAMPLING | usual | {"sampler": name}).items()}
    solver = Solver("heun", 1e-2, 1e-2, max_steps=88)
    made = samplers.SAMPLERS[name]
    expected = made(solver) if name == "ode" else made(steps=500)
    assert in_a_checkpoint(fields).sampling.build() == expected
    for field in ("snr", "corrector_steps", "eta"):
        del fields[f"sampling.{field}"]
    assert in_a_file(fields).sampling.build() == expected
    assert on_the_command_line(fields).sampling.build() == expected


def test_a_sampler_of_another_package_had_its_fields_beside_its_name() -> None:
    fields = {"sampling.sampler": "test_renamed:Slow", "sampling.wait": 2.0}
    for read in (in_a_file, on_the_command_line, in_a_checkpoint):
        assert read(fields).sampling.build() == Slow(steps=500, wait=2.0)
    with pytest.raises(ValueError, match=r"config.sampling has no field wait: it has batch_size"):
        on_the_command_line({"sampling.wait": 2.0})


def test_the_fields_of_another_sampler_are_left_out_with_a_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = tiny.get_config()
    config.sampling.sampler.update(name="ddim", steps=5, eta=0.5)
    changed = with_overrides(config, {"sampling.sampler.name": "ancestral"})
    assert changed.sampling.build() == samplers.Ancestral(steps=5)
    said = "config.sampling.sampler.name=ancestral leaves out eta=0.5 of ddim\n"
    assert capsys.readouterr().out == said
    config.sampling.corrector.update(name="langevin", snr=0.2)
    changed = with_overrides(config, {"sampling.corrector.name": "none"})
    assert changed.sampling.build() == samplers.DDIM(steps=5, eta=0.5)
