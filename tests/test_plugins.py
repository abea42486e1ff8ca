"""One part of each kind from a package outside the checkout, docs/skeletons/mine.

A quick test finds each part by its name and compares it with its definition. In the end-to-end
tests, the program trains, evaluates and samples with all of them.
"""

import importlib
import json
import math
import os
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
from scipy import stats

from sbml.core.registry import Registry
from sbml.density.estimators import ESTIMATORS
from sbml.density.estimators.base import Target
from sbml.program.config.build import Experiment
from sbml.program.config.config import Config
from sbml.program.features import EXTRACTORS
from sbml.program.modes import MODES

SKELETONS = runs.ROOT / "docs" / "skeletons"
# All but "uniform", which is none of the user's, and without the pilots of the bounds.
FEW = (
    "--config.eval.dequantizers=mine.dequantizer:Triangle,mine.dequantizer:Shrunk",
    "--config.eval.bound.proposal_bins=0",
)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """The work directory of a run in which every part is one of the user's."""
    root = tmp_path_factory.mktemp("plugins")
    shutil.copytree(SKELETONS / "mine", root / "mine")
    run(root, "--config=mine/config.py", "--workdir=run", "--file=counted.txt", *FEW)
    return root / "run"


def run(root, *arguments):
    """Run the program in ``root``, from which it imports the package."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{root}:{runs.ROOT}"}
    command = [sys.executable, "-m", "sbml.main", *arguments]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def report(workdir):
    return json.loads((workdir / "report.json").read_text())


@pytest.fixture
def experiment(monkeypatch):
    """The objects of the config of the skeletons, which names a part of each kind."""
    monkeypatch.syspath_prepend(SKELETONS)
    yield Experiment(Config(**importlib.import_module("mine.config").get_config().to_dict()))
    for name in [name for name in sys.modules if name.split(".")[0] == "mine"]:
        del sys.modules[name]


def test_each_skeleton_is_found_and_does_what_it_says(experiment, tmp_path):
    pages = (runs.ROOT / "docs" / "extending.md").read_text()
    files = {path.name for path in (SKELETONS / "mine").glob("*.py")}
    assert files == set(re.findall(r"literalinclude} skeletons/mine/(\w+\.py)", pages))

    # The network begins at 0, so the score is that of N(0, data_std^2 I) under the SDE, which has
    # alpha^2 + sigma^2 = 1.
    key, x, t = jax.random.key(0), jnp.array([[0.3], [-0.8]])[:, None], jnp.array(0.4)
    params = experiment.adapter.init(key, experiment.shape)
    rest = jnp.exp(-(0.1 * t + 9.95 * t**2))
    expected = -x / (0.57**2 * rest + 1 - rest)
    np.testing.assert_allclose(experiment.adapter(params)(x, t, key), expected, rtol=1e-4)

    # The parts of the evaluation: images, densities of u, and an estimator with its fields.
    images, draws = experiment.images("test"), jax.random.split(key, 1000)
    assert images.images.shape == (200, 2, 1, 1) and set(np.unique(images.images)) == set(range(6))
    triangle, shrunk = map(experiment.dequantizer, experiment.config.eval.dequantizers[1:])
    u, log_q = jax.vmap(triangle.sample, (None, None, 0))(None, images.images[0], draws)
    np.testing.assert_allclose(log_q, np.log(16 * np.prod(0.5 - abs(u - 0.5), (1, 2, 3))), 1e-3)
    u, log_q = shrunk.sample(shrunk.init(key, None), images.images[0], key)
    width = 1 / (1 + np.exp(-2.0))
    assert np.all(abs(u - 0.5) <= width / 2) and log_q == pytest.approx(-2 * math.log(width))
    for name, std in (("Normal", 1.0), ("WideNormal", 2.0)):
        estimator = ESTIMATORS[f"mine.estimator:{name}"]()
        terms, _ = estimator.one(None, None, x, key, None, Target(experiment.sde, 1e-5))
        found = sum(terms.values())
        assert found == pytest.approx(-stats.norm.logpdf(x, scale=std).sum(), rel=1e-5)

    # The others: three steps of the sampler, features, and a mode with its flag.
    sampler, score = experiment.config.sampling.build(), experiment.adapter(params)
    samples, evaluations = sampler(score, experiment.sde, x, key, eps=1e-3)
    np.testing.assert_allclose(samples, x / 8, rtol=1e-3)
    features, _ = EXTRACTORS["mine.features:raw_pixels"]("", "", 6, "")(images.images)
    np.testing.assert_allclose(features, images.images.reshape(200, 2) / 6)
    MODES["mine.mode:count"](experiment, tmp_path, file="n.txt")
    assert (tmp_path / "n.txt").read_text() == "26"


@pytest.mark.slow
def test_all_of_them_ran(workdir, report):
    """The network with (2 + 1) 4 + 4 and 4 2 + 2 parameters was trained, counted and reported."""
    assert (workdir / "counted.txt").read_text() == "26"
    assert report["model"] == {"name": "mine.network:Small", "parameters": 26}
    names = [(r["estimator"], r["dequantizer"]) for r in report["results"]]
    dequantizers = ("mine.dequantizer:Triangle", "mine.dequantizer:Shrunk")
    estimators = ("ode", "bound", "mine.estimator:Normal")
    assert names == [(e, d) for e in estimators for d in dequantizers]
    assert all(r["data"] == "dice" and r["n"] == 200 for r in report["results"])
    quality = json.loads((workdir / "quality.json").read_text())["values"]
    assert quality["pixel_frechet n=64"] > 0


@pytest.mark.slow
def test_a_new_dequantizer_is_trained_and_its_run_knows_its_config(workdir, report):
    """The width has hardly changed from sigmoid(2); -log2 of it is the dequantization term."""
    term = cell(report, "ode", "mine.dequantizer:Shrunk")["terms"]["dequantization"]
    assert term == pytest.approx(math.log2(1 + math.exp(-2)), abs=0.01)
    # The work directory alone says what to run, if its package is trusted; one field is changed.
    changed = ("--workdir=run", "--mode=eval,sample", "--config.sampling.sampler.factor=0.25")
    assert "mine.estimator:Normal" in run(workdir.parent, *changed, "--trust=mine")


def cell(report, estimator, dequantizer):
    return next(
        r
        for r in report["results"]
        if (r["estimator"], r["dequantizer"]) == (estimator, dequantizer)
    )


@pytest.mark.slow
def test_the_numbers_are_those_of_their_definitions(report):
    """log q of the triangle, -log N(x; 0, I), and a density near the entropy of the dice."""
    for estimator in ("ode", "bound", "mine.estimator:Normal"):
        value = cell(report, estimator, "mine.dequantizer:Triangle")["terms"]["dequantization"]
        # E log q = log 2 - 1/2, of 400 draws with a variance of 1/4.
        assert value == pytest.approx((math.log(2) - 0.5) / math.log(2), abs=0.15)
    pixels = np.random.default_rng(False).integers(0, 6, (200, 2, 1, 1))
    centre = (2 * pixels + 1) / 6 - 1
    # The triangle's variance is 1/24 of the square of its width, which is 1/3.
    nats = 0.5 * np.mean(centre**2 + 1 / 9 / 24) + 0.5 * math.log(2 * math.pi) + math.log(3)
    normal = cell(report, "mine.estimator:Normal", "mine.dequantizer:Triangle")
    without = normal["bits_per_dim"] - normal["terms"]["dequantization"]
    assert without == pytest.approx(nats / math.log(2), abs=0.02)
    assert normal["nfe_mean"] == 0 and "converged" not in normal  # It solves no ODE.
    ode, bound = (cell(report, name, "mine.dequantizer:Shrunk") for name in ("ode", "bound"))
    normal = cell(report, "mine.estimator:Normal", "mine.dequantizer:Shrunk")
    assert math.log2(6) - 0.02 < ode["bits_per_dim"] < normal["bits_per_dim"]
    assert abs(ode["bits_per_dim"] - bound["bits_per_dim"]) < 0.2 and ode["converged"]


@pytest.mark.slow
def test_samples_are_of_the_new_sampler(workdir):
    """z / 8, or z / 64 after the second run, lies in the two middle bins of six, except for the few
    |z| above 8/3."""
    with np.load(workdir / "samples.npz") as file:
        images, evaluations = file["images"], file["nfe"]
    assert images.shape == (64, 2, 1, 1)
    assert np.isin(images, (2, 3)).mean() > 0.95 and len(np.unique(images)) > 1
    assert (evaluations == 3).all()


def test_a_part_that_is_none_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "needing.py").write_text("import absent")
    (tmp_path / "failing.py").write_text("1 / 0")
    things = Registry("thing", {"a": "math:pi"}, float)
    assert things["a"] == math.pi == things["math:pi"]
    assert list(things) == ["a"] and "math:e" in things and "b" not in things
    for name, message in (
        ("b", "unknown thing 'b': choose one of a, or give your own as package.module:Name"),
        ("math:tau2", "math:tau2: the module math has no attribute tau2: did you mean tau? Give"),
        ("math:floor", "thing math:floor is <built-in function floor> (builtin_function_or_method"),
        ("nowhere.at:all", "(ModuleNotFoundError: No module named 'nowhere'): start Python where"),
        ("needing:all", "(ModuleNotFoundError: No module named 'absent'): correct it"),
        ("failing:all", "the module failing cannot be imported (ZeroDivisionError: division by"),
        ("../../etc:a", "unknown thing '../../etc:a'"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            things[name]
