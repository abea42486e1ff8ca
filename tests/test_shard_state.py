"""The optimizer's state and the average spread over eight fake devices: the same training."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
import runs
import tiny

SHARDED = "--config.training.shard_state=True"

# Prints the collectives of a step and the bytes of the state on one device, without and with it.
COMPILED = """
import json, sys
sys.path[:0] = ["tests", "."]
import jax, tiny
from benchmarks import accelerators
from sbml.build import Experiment
from sbml.runtime import sharding

for shard_state in (False, True):
    config = tiny.get_config()
    config.training.shard_state = shard_state
    experiment, mesh = Experiment(config), sharding.data_mesh()
    text = accelerators.training(experiment, mesh).compile().as_text()
    print(json.dumps({
        "parameters": experiment.parameter_count(),
        "collectives": accelerators.collectives(text),
        "state": accelerators.state_bytes(experiment, mesh),
    }))
"""


def losses(workdir) -> dict[int, float]:
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows}


def test_sharded_training_has_the_same_losses_and_checkpoints(tmp_path) -> None:
    """Begun without, gone on with, and back again."""
    whole, mixed = tmp_path / "whole", tmp_path / "mixed"
    runs.run(whole, "--mode=train", "--config.training.num_steps=12", devices=8)
    for steps, flags in ((4, ()), (8, (SHARDED,)), (12, ())):
        number = f"--config.training.num_steps={steps}"
        err = runs.run(mixed, "--mode=train", number, *flags, devices=8)
        assert "otherwise than it began" not in err
    expected, got = losses(whole), losses(mixed)
    assert set(expected) == set(got) == set(range(1, 13))
    for step, loss in expected.items():
        assert got[step] == pytest.approx(loss, rel=1e-6)
    states = [runs.state(tiny.get_config(), workdir).state for workdir in (whole, mixed)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-6), *states)


def test_gradients_are_reduced_once_and_a_device_holds_its_part() -> None:
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILED], cwd=runs.ROOT, env=environment, capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    plain, sharded = (json.loads(line) for line in done.stdout.splitlines())
    size = 4 * plain["parameters"]  # bytes
    # Without: every gradient once, the loss and the statistics, and nothing is gathered.
    assert set(plain["collectives"]) == {"all-reduce"}
    assert 1e6 * plain["collectives"]["all-reduce"][1] == pytest.approx(size, rel=0.02)
    assert plain["state"] == pytest.approx(4 * size, rel=0.02)
    # With: parameters whole, their average and both moments an eighth, where a leaf divides.
    assert size < sharded["state"] < 1.1 * (1 + 3 / 8) * size
    gathered = sharded["collectives"]["all-gather"][1]
    assert 1e6 * gathered < 1.1 * size
