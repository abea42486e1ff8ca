"""One part of each kind from a package outside the checkout; end-to-end tests.

The package consists of the examples in docs/extending.md. The program trains, evaluates and samples
with them, and the numbers of the report are compared with the definitions of these parts.
"""

import json
import math
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import runs

from sbml.core.registry import Registry

# All but "uniform", which is none of the user's, and without the pilots of the bounds.
FEW = (
    "--config.eval.dequantizers=mine.dequantizer:Triangle,mine.dequantizer:Shrunk",
    "--config.eval.bound.proposal_bins=0",
)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """The work directory of a run in which every part is one of the user's."""
    root = tmp_path_factory.mktemp("plugins")
    text = (runs.ROOT / "docs" / "extending.md").read_text()
    for block in re.findall(r"```python\n(# mine/.*?)```", text, re.DOTALL):
        file = root / block.partition("\n")[0].removeprefix("# ")
        file.parent.mkdir(exist_ok=True)
        file.write_text(block)
    assert len(list((root / "mine").iterdir())) == 10
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


@pytest.mark.slow
def test_all_of_them_ran(workdir, report):
    """The network with (2 + 1) 4 + 4 and 4 2 + 2 parameters was trained, counted and reported."""
    assert (workdir / "counted.txt").read_text() == "26"
    assert report["model"] == {"name": "mine.network:Small", "parameters": 26}
    names = [(r["estimator"], r["dequantizer"]) for r in report["results"]]
    dequantizers = ("mine.dequantizer:Triangle", "mine.dequantizer:Shrunk")
    estimators = ("ode", "bound", "mine.estimator:StandardNormal")
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
    assert "mine.estimator:StandardNormal" in run(workdir.parent, *changed, "--trust=mine")


def cell(report, estimator, dequantizer):
    return next(
        r
        for r in report["results"]
        if (r["estimator"], r["dequantizer"]) == (estimator, dequantizer)
    )


@pytest.mark.slow
def test_the_numbers_are_those_of_their_definitions(report):
    """log q of the triangle, -log N(x; 0, I), and a density near the entropy of the dice."""
    for estimator in ("ode", "bound", "mine.estimator:StandardNormal"):
        value = cell(report, estimator, "mine.dequantizer:Triangle")["terms"]["dequantization"]
        # E log q = log 2 - 1/2, of 400 draws with a variance of 1/4.
        assert value == pytest.approx((math.log(2) - 0.5) / math.log(2), abs=0.15)
    pixels = np.random.default_rng(False).integers(0, 6, (200, 2, 1, 1))
    centre = (2 * pixels + 1) / 6 - 1
    # The triangle's variance is 1/24 of the square of its width, which is 1/3.
    nats = 0.5 * np.mean(centre**2 + 1 / 9 / 24) + 0.5 * math.log(2 * math.pi) + math.log(3)
    normal = cell(report, "mine.estimator:StandardNormal", "mine.dequantizer:Triangle")
    without = normal["bits_per_dim"] - normal["terms"]["dequantization"]
    assert without == pytest.approx(nats / math.log(2), abs=0.02)
    assert normal["nfe_mean"] == 0 and "converged" not in normal  # It solves no ODE.
    ode, bound = (cell(report, name, "mine.dequantizer:Shrunk") for name in ("ode", "bound"))
    normal = cell(report, "mine.estimator:StandardNormal", "mine.dequantizer:Shrunk")
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
