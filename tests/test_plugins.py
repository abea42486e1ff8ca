"""A new variant of each kind needs only one file in the folder of its kind; end-to-end tests.

The package is copied, the files below are added to its folders, and the program runs without other
changes. The numbers of the report are compared with the definitions of these variants.
"""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import sbml

FILES = {
    # The variance-preserving SDE, defined by alpha and sigma only.
    "sdes/two_methods.py": """
import dataclasses
import jax.numpy as jnp
from sbml.sdes._kernel import SDE

@dataclasses.dataclass(frozen=True)
class TwoMethods(SDE):
    def mean_coef(self, t):
        return jnp.exp(-0.5 * (0.1 * t + 9.95 * t**2))

    def std(self, t):
        return jnp.sqrt(-jnp.expm1(-(0.1 * t + 9.95 * t**2)))

SDES = {"two_methods": TwoMethods}
""",
    # A network in plain Linen, without a dtype and without dropout.
    "networks/linear.py": """
import jax.numpy as jnp
from flax import linen as nn

class Model(nn.Module):
    width: int = 4

    @nn.compact
    def __call__(self, x, label, *, train):
        h = jnp.concatenate([x.reshape(len(x), -1), label[:, None]], axis=-1)
        h = nn.tanh(nn.Dense(self.width)(h))
        return nn.Dense(x[0].size, kernel_init=nn.initializers.zeros)(h).reshape(x.shape)
""",
    # u is the mean of two uniform numbers, which has a triangular density on [0, 1).
    "dequantizers/triangle.py": """
import dataclasses
from typing import ClassVar
import jax
import jax.numpy as jnp

@dataclasses.dataclass(frozen=True)
class Model:
    at_noise: ClassVar[bool] = False

    def init(self, key, pixels):
        return {}

    def sample(self, params, pixels, key):
        u = jax.random.uniform(key, (2, *pixels.shape)).mean(0)
        return u, jnp.sum(jnp.log(4 * jnp.minimum(u, 1 - u)))
""",
    # A dequantizer at noise without a bound: the bound of another one must not be used for it.
    "dequantizers/at_noise.py": """
import dataclasses
from typing import ClassVar
from sbml.dequantizers import uniform

@dataclasses.dataclass(frozen=True)
class Model(uniform.Model):
    at_noise: ClassVar[bool] = True
""",
    # u is uniform around the middle of the bin, and the width is learned.
    "dequantizers/shrunk.py": """
import dataclasses
from typing import ClassVar
import jax
import jax.numpy as jnp

@dataclasses.dataclass(frozen=True)
class Model:
    at_noise: ClassVar[bool] = False
    dropout: float = 0.0
    first: float = 2.0

    def init(self, key, pixels):
        return {"logit": jnp.asarray(self.first)}

    def sample(self, params, pixels, key):
        width = jax.nn.sigmoid(params["logit"])
        u = 0.5 + width * (jax.random.uniform(key, pixels.shape) - 0.5)
        return u, -pixels.size * jnp.log(width)

    def sample_batch(self, params, pixels, keys, *, train):
        return jax.vmap(self.sample, (None, 0, 0))(params, pixels, keys)
""",
    # -log N(x; 0, I), which does not depend on the score.
    "estimators/standard_normal.py": """
import dataclasses
from typing import ClassVar
import jax.numpy as jnp
from sbml.estimators import base

@dataclasses.dataclass(frozen=True)
class Estimator(base.Estimator):
    terms: ClassVar[tuple[str, ...]] = ("prior", "dequantization", "scale")
    is_bound: ClassVar[bool] = False

    def one(self, score, params, data, key, u, options, target):
        x, log_q = target.sample(params, data, key)
        prior = 0.5 * jnp.sum(x**2) + 0.5 * x.size * jnp.log(2 * jnp.pi)
        return {"prior": prior, "dequantization": log_q}, 0
""",
    # A step halves x, so the latent z becomes z / 2^steps.
    "samplers/halving.py": """
from sbml.samplers._grid import FixedSteps

class Halving(FixedSteps):
    def step(self, score, sde, x, carry, times, z):
        return x / 2, carry

SAMPLERS = {"halving": Halving}
""",
    "data/dice.py": """
import numpy as np
from sbml.data._image_set import ImageSet, check_split

class Dice:
    collection = False
    reads = ()

    def load(self, split, options):
        check_split(split)
        rng = np.random.default_rng(split == "train")
        pixels = rng.integers(0, 6, (200, 2, 1, 1)).astype(np.uint8)
        return ImageSet("dice", "1", split, pixels, levels=6)

SOURCE = Dice()
""",
    "modes/count.py": """
from sbml.experiment.build import Experiment

def run(config, workdir):
    (workdir / "count.txt").write_text(str(Experiment(config).parameter_count()))
""",
    # Checkpoints of a code whose files hold one array, "tiny".
    "convert/tiny_code.py": """
NETWORK = "linear"
CODE = "a tiny code"

def recognises(tree):
    return set(tree) == {"tiny"}

def convert(config, workdir, path, tree):
    (workdir / "converted.txt").write_text(str(int(tree["tiny"].sum())))
""",
}

CONFIG = """
from sbml.experiment.config import default

def get_config():
    config = default("linear", dequantizer="shrunk")
    config.mode = ("train", "train_dequantizer", "eval", "sample", "count", "convert")
    config.data.update(source="dice", shape=(2, 1, 1), levels=6, flip=False)
    config.sde.name = "two_methods"
    config.score.update(parameterization="preconditioned", label="log_snr", data_std=0.57)
    config.training.update(
        batch_size=64, num_steps=60, log_every=20, checkpoint_every=60, keep_every=0, sample_every=0
    )
    config.optim.update(lr=3e-3, warmup=10, ema=0.9)
    config.dequantizer.training.update(batch_size=64, num_steps=3, checkpoint_every=3)
    config.dequantizer.optim.warmup = 1
    config.eval.update(
        batch_size=100, sweeps=2, trace="exact", estimators=("ode", "bound", "standard_normal"),
        dequantizers=("uniform", "triangle", "at_noise", "shrunk"),
    )
    config.sampling.update(
        num_images=64, batch_size=64, sampler="halving", steps=3, denoise_last=False, frames=1
    )
    return config
"""


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """The work directory of train, eval, sample, the new mode and a conversion."""
    root = tmp_path_factory.mktemp("plugins")
    shutil.copytree(Path(sbml.__file__).parent, root / "sbml")
    for name, text in FILES.items():
        (root / "sbml" / name).write_text(text)
    (root / "config.py").write_text(CONFIG)
    (root / "source").mkdir()
    from flax import serialization

    tree = {"tiny": np.arange(5, dtype=np.float32)}
    (root / "source" / "checkpoint_1").write_bytes(serialization.msgpack_serialize(tree))
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(root)}
    command = [sys.executable, "-m", "sbml.main", "--config=config.py", "--workdir=run"]
    done = subprocess.run(
        [*command, "--source=source"], cwd=root, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return root / "run"


@pytest.fixture(scope="module")
def report(workdir):
    return json.loads((workdir / "report.json").read_text())


def test_all_of_them_ran(workdir, report):
    """The network with (2 + 1) 4 + 4 and 4 2 + 2 parameters was trained, counted and reported."""
    assert (workdir / "count.txt").read_text() == "26"
    assert report["model"] == {"name": "linear", "parameters": 26}
    assert (workdir / "converted.txt").read_text() == "10"
    names = [(r["estimator"], r["dequantizer"]) for r in report["results"]]
    assert names == [
        *(("ode", d) for d in ("uniform", "triangle", "at_noise", "shrunk")),
        *(("bound", d) for d in ("uniform", "triangle", "shrunk")),
        *(("standard_normal", d) for d in ("uniform", "triangle", "at_noise", "shrunk")),
    ]
    assert all(r["data"] == "dice" and r["n"] == 200 for r in report["results"])


def test_a_new_dequantizer_is_trained_and_its_run_knows_its_config(workdir, report):
    """The width has hardly changed from sigmoid(2); -log2 of it is the dequantization term."""
    term = cell(report, "ode", "shrunk")["terms"]["dequantization"]
    assert term == pytest.approx(math.log2(1 + math.exp(-2)), abs=0.01)
    code = "from sbml.experiment import stored; print(stored.get_config('run').dequantizer.model)"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(workdir.parent)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        **{"cwd": workdir.parent, "env": environment, "capture_output": True, "text": True},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.split() == ["dropout:", "0.0", "first:", "2.0"]


def test_a_dequantizer_at_noise_without_a_bound_has_none(report):
    assert list(report["undefined"]) == ["bound_at_noise"]
    assert "has no bound of its own" in report["undefined"]["bound_at_noise"]


def cell(report, estimator, dequantizer):
    return next(
        r
        for r in report["results"]
        if (r["estimator"], r["dequantizer"]) == (estimator, dequantizer)
    )


def test_the_numbers_are_those_of_their_definitions(report):
    """log q of the triangle, -log N(x; 0, I), and a density near the entropy of the dice."""
    for estimator in ("ode", "bound", "standard_normal"):
        value = cell(report, estimator, "triangle")["terms"]["dequantization"]
        # E log q = log 2 - 1/2, of 400 draws with a variance of 1/4.
        assert value == pytest.approx((math.log(2) - 0.5) / math.log(2), abs=0.15)
    pixels = np.random.default_rng(False).integers(0, 6, (200, 2, 1, 1))
    centre = (2 * pixels + 1) / 6 - 1
    nats = 0.5 * np.mean(centre**2 + 1 / 6**2 / 3) + 0.5 * math.log(2 * math.pi) + math.log(3)
    normal = cell(report, "standard_normal", "uniform")
    assert normal["bits_per_dim"] == pytest.approx(nats / math.log(2), abs=0.02)
    assert normal["nfe_mean"] == 0 and normal["converged"]
    ode, bound = (cell(report, name, "uniform") for name in ("ode", "bound"))
    assert math.log2(6) - 0.02 < ode["bits_per_dim"] < normal["bits_per_dim"]
    assert abs(ode["bits_per_dim"] - bound["bits_per_dim"]) < 0.2 and ode["converged"]


def test_samples_are_of_the_new_sampler(workdir):
    """z / 8 lies in the two middle bins of six, except for the few |z| above 8/3."""
    with np.load(workdir / "samples.npz") as file:
        images, evaluations = file["images"], file["nfe"]
    assert images.shape == (64, 2, 1, 1)
    assert np.isin(images, (2, 3)).mean() > 0.95 and len(np.unique(images)) > 1
    assert (evaluations == 3).all()
