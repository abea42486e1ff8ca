"""A fingerprint changes with everything that changes a number, and with nothing else."""

import dataclasses
import importlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax.errors import FlaxError
from flax.traverse_util import flatten_dict, unflatten_dict

from sbml.core import fingerprint
from sbml.density.estimators import Cell, bound, ode
from sbml.density.estimators.base import Target
from sbml.dequantizers import truncated_normal, uniform
from sbml.likelihood.bound import GaussianControl, Reduction
from sbml.likelihood.ode import Solver
from sbml.networks import mlp
from sbml.program.config import build
from sbml.program.config.config import Config
from sbml.program.config.trained import Trained
from sbml.program.evaluation import samples
from sbml.program.evaluation.cells import Evaluation, run_of
from sbml.program.runtime.workdir import Workdir
from sbml.score import Adapter
from sbml.score.divergence import Trace
from sbml.sdes import VE, VP

CONTROL = GaussianControl(np.zeros(2), np.ones(2), None)
SOLVED = ode.Estimator(Trace("exact"), 1, Solver())
SWEPT = bound.Estimator(2, "lattice", Reduction(CONTROL, np.ones(4)))
TARGET = Target(VP(), 1e-5, 17, uniform.Model())
OWN = Adapter(mlp.Model(width=8), VP())
# Another value of every field, for objects of which numbers are made.
CHANGED = {
    SOLVED: {"trace": Trace(), "num_importance": 2, "solver": Solver(rtol=1e-5)},
    TARGET: {
        "sde": VP(beta_max=10.0),
        "eps": 1e-4,
        "levels": 16,
        "dequantizer": truncated_normal.Model(),
    },
    OWN: {
        "model": mlp.Model(width=16),
        "sde": VE(),
        "parameterization": "x0",
        "label": "log_snr",
        "data_std": 0.4,
        "eps": 1e-4,
        "labels": VP(),
        "log_snr_range": (-4.0, 13.3),
        "time_scale": 1.0,
        "levels": 3,
        "data": "centre",
    },
}


@pytest.mark.parametrize("value", CHANGED, ids=lambda value: type(value).__name__)
def test_each_field_changes_the_fingerprint(value):
    fields = {field.name for field in dataclasses.fields(value)}
    assert fields == set(CHANGED[value])
    for name, other in CHANGED[value].items():
        changed = dataclasses.replace(value, **{name: other})
        assert fingerprint.of(changed) != fingerprint.of(value), name


def test_arrays_count_by_their_bits():
    one = fingerprint.of(SWEPT)
    same = dataclasses.replace(SWEPT, reduction=Reduction(CONTROL, jnp.ones(4)))
    assert fingerprint.of(same)["reduction"]["control"] == one["reduction"]["control"]
    moved = dataclasses.replace(CONTROL, mean=np.array([0.0, 1e-300]))
    assert one != fingerprint.of(dataclasses.replace(SWEPT, reduction=Reduction(moved, np.ones(4))))


def test_what_changes_the_training_only_changes_no_fingerprint():
    other = dataclasses.replace(OWN, model=mlp.Model(width=8, dropout=0.3))
    assert fingerprint.of(other) == fingerprint.of(OWN)


def test_a_function_without_a_name_counts_by_its_code_and_by_what_it_reads():
    def made(scale):
        return lambda x: scale * x

    assert fingerprint.of(made(1.0)) == fingerprint.of(made(1.0)) != fingerprint.of(made(2.0))
    assert fingerprint.of(lambda x: x + 1) != fingerprint.of(lambda x: x + 2)
    assert fingerprint.of(lambda x: jnp.sin(x)) != fingerprint.of(lambda x: jnp.cos(x))
    assert fingerprint.of(lambda x, y=1: x + y) != fingerprint.of(lambda x, y=2: x + y)
    assert " at 0x" not in str(fingerprint.of(lambda x: map(lambda y: y + 1, x)))
    with pytest.raises(TypeError, match="has no fingerprint"):
        fingerprint.of(object())


def test_a_part_of_another_package_counts_by_its_file(tmp_path, monkeypatch):
    """Also where only its name is known, as that of a prediction; comments do not count."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    text = "import dataclasses\n@dataclasses.dataclass\nclass Mine:\n    slope: float = 5.0\n"
    text += "    def std(self, t):\n        return self.slope * t\ndef made(f):\n    return f\n"

    def found(text):
        (tmp_path / "mine_outside.py").write_text(text)
        monkeypatch.delitem(sys.modules, "mine_outside", raising=False)
        part = importlib.import_module("mine_outside")
        values = (part.Mine(), part.made, Adapter(OWN.model, VP(), "mine_outside:made"))
        return [str(fingerprint.of(value)) for value in values]

    base = found(text)
    assert found(text.replace("slope * t", "slope *  t  # the noise")) == base
    changed = found(text.replace("slope * t", "slope * t**2"))
    assert not set(changed) & set(base)
    assert fingerprint.of(VP) == "sbml.sdes.linear_beta:VP" and fingerprint.of("a: b") == "a: b"


# Fields of a config that change the rows of an evaluation (of the ODE or of the bound), and those
# that change samples. Every other field changes neither.
OF_BOTH = set(
    """
    data.levels model.fourier_scale score.data_std score.label score.log_snr_range
    score.parameterization score.time_scale sde.beta_max sde.beta_min sde.data_scale
    sde.data_shift training.smallest_time
    """.split()
)
OF_ROWS = OF_BOTH | set(
    """
    eval.ode.atol eval.bound.control eval.ode.fixed_steps
    eval.bound.importance_sampling eval.ode.max_steps eval.ode.method eval.bound.n_times
    eval.precision eval.ode.probes eval.bound.proposal_bins eval.ode.rtol eval.seed
    eval.smallest_time eval.bound.times eval.ode.trace
    """.split()
)
OF_SAMPLES = OF_BOTH | set(
    """
    data.dequantization model.dtype sampling.solver.atol sampling.denoise_last
    sampling.solver.fixed_steps sampling.solver.max_steps sampling.solver.method
    sampling.solver.rtol sampling.sampler.name sampling.seed sampling.smallest_time
    """.split()
)
# Those that change the classifier, which a density of the evaluation computes.
OF_CLASSIFIER = OF_BOTH | set(
    """
    eval.ode.atol eval.ode.fixed_steps eval.ode.max_steps eval.ode.method eval.ode.probes
    eval.ode.rtol eval.ode.trace eval.seed eval.smallest_time
    """.split()
)
# Values of fields whose next number would not be valid.
OTHERS = {
    "data.crop": "random",
    "data.dequantization": "none",
    "eval.ode.method": "heun",
    "eval.precision": "high",
    "eval.smallest_time": 1e-3,
    "eval.bound.times": "iid",
    "eval.ode.trace": "exact",
    "model.dtype": "bfloat16",
    "sampling.solver.method": "tsit5",
    "sampling.sampler.name": "ancestral",
    "sampling.smallest_time": 2e-3,
    "score.label": "time",
    "score.log_snr_range": (-4.0, 13.3),
    "score.parameterization": "noise",
    "sde.data_shift": 0.1,
    "training.smallest_time": 1e-4,
}


def other(name, value):
    """Another valid value of the field ``name``; None if only further fields make it valid."""
    if name in OTHERS:
        return OTHERS[name]
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    return 0.9 * value if isinstance(value, float) and value else None


@pytest.mark.slow
def test_the_fields_of_a_config_that_change_rows_and_samples(digits_model, tmp_path):
    """All other fields can be changed, and the stored rows are used again."""
    config = tiny.get_config()
    config.eval.bound.update(control=False, proposal_bins=0)
    plain = Config(**config.to_dict())
    restored = build.Experiment(plain).restore(digits_model)
    images, train = (build.Experiment(plain).images(split) for split in ("test", "train"))

    def of(config):
        model = Trained(build.Experiment(config), restored, Workdir(tmp_path))
        inputs = Evaluation(model, images, train)
        with jax.default_matmul_precision(config.eval.precision):
            cells = (Cell(name, "uniform") for name in ("ode", "bound"))
            runs = [
                run_of(inputs, c, inputs.dequantization("uniform"), stored=False) for c in cells
            ]
            rows = [run.measurement.fingerprint() for run in runs]
        return rows, samples.identity(model), fingerprint.of(model.density())

    found, base = {}, of(plain)
    for name, value in flatten_dict(plain.plain(), sep=".").items():
        if (changed := other(name, value)) is None:
            continue
        try:
            given = flatten_dict(plain.plain(), sep=".") | {name: changed}
            now = of(Config(**unflatten_dict(given, sep=".")))
        except (ValueError, FlaxError):
            continue  # This value needs another value of a further field.
        found[name] = [new != old for new, old in zip(now, base, strict=True)]
    for kind, fields in enumerate((OF_ROWS, OF_SAMPLES, OF_CLASSIFIER)):
        assert {name for name, changed in found.items() if changed[kind]} == fields
    assert len(found) > 100
