"""A training whose optimizer's state and average are spread over eight fake devices is the same."""

import json

import jax
import numpy as np
import pytest
import runs
import tiny

from sbml.program.modes import train

# Trains six steps at once, and again with the state spread in the middle.
TRAINED = """
import pathlib, runs, sys, test_shard_state
from sbml.program.modes import train

config, folder = test_shard_state.config(sys.argv[2]), pathlib.Path(sys.argv[1])
runs.mode(train.run, config, folder / "whole")
config.training.sample_every = 4  # In the sharded part.
for steps, shard_state in ((2, False), (4, True), (6, False)):
    config.training.update(num_steps=steps, shard_state=shard_state)
    runs.mode(train.run, config, folder / "mixed")
"""

# Prints the collectives of a step and the bytes of the state on one device, without and with it.
COMPILED = """
import json, tiny
from benchmarks import accelerators
from sbml.program.config.build import Experiment
from sbml.program.runtime import sharding

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


def config(optimizer):
    config = tiny.get_config()
    config.sampling.sampler.update(name="ddim", steps=2)
    config.training.update(num_steps=6, checkpoint_every=2, validate_every=2)
    config.data.validation = 41  # not a multiple of eight devices
    config.optim.name = optimizer
    if optimizer == "muon":
        with config.unlocked():
            config.model = {"name": "test_train:Block"}
    return config


def validation(workdir) -> list[float]:
    """The curve of bits/dim on validation images, at the steps 2, 4 and 6."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [row["validation_bits_per_dim"] for row in rows if "validation_bits_per_dim" in row]


def losses(workdir) -> dict[int, float]:
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows}


def on_eight_devices(code: str, *arguments: str) -> list[str]:
    """The lines that ``code`` prints, in a process of eight fake devices."""
    return runs.output(runs.python(code, *arguments, devices=8)).splitlines()


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_sharded_training_has_the_same_losses_and_checkpoints(optimizer, tmp_path) -> None:
    """The second training starts unsharded, continues sharded, and then unsharded again. Its
    curve of bits/dim on validation images is that of one device."""
    on_eight_devices(TRAINED, str(tmp_path), optimizer)
    runs.mode(train.run, config(optimizer), tmp_path / "one")
    curves = [validation(tmp_path / name) for name in ("one", "whole", "mixed")]
    assert len(curves[0]) == 3
    np.testing.assert_allclose(curves[1:], [curves[0]] * 2, rtol=1e-4)
    expected, got = losses(tmp_path / "whole"), losses(tmp_path / "mixed")
    assert set(expected) == set(got) == set(range(1, 7))
    for step, loss in expected.items():
        assert got[step] == pytest.approx(loss, rel=1e-6)
    stored = [runs.state(config(optimizer), tmp_path / name) for name in ("whole", "mixed")]
    states = [one.state for one in stored]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-6), *states)


@pytest.mark.slow
def test_gradients_are_reduced_once_and_a_device_holds_its_part() -> None:
    plain, sharded = map(json.loads, on_eight_devices(COMPILED))
    size = 4 * plain["parameters"]  # bytes
    # Unsharded: every gradient, the loss and the statistics are reduced once; nothing is gathered.
    assert set(plain["collectives"]) == {"all-reduce"}
    assert 1e6 * plain["collectives"]["all-reduce"][1] == pytest.approx(size, rel=0.02)
    assert plain["state"] == pytest.approx(4 * size, rel=0.02)
    # Sharded: a device holds all parameters, and an eighth of each leaf of their average and both
    # moments, if the leaf can be divided.
    assert size < sharded["state"] < 1.1 * (1 + 3 / 8) * size
    found = sharded["collectives"]
    assert set(found) <= {"all-reduce", "reduce-scatter", "all-gather"}
    reduced = sum(found.get(kind, [0, 0])[1] for kind in ("all-reduce", "reduce-scatter"))
    assert 0.9 * size < 1e6 * reduced < 1.1 * size
    assert 0.8 * size < 1e6 * found["all-gather"][1] < 1.1 * size
