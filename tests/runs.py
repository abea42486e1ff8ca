"""Running the program as a user does: a process of its own, with devices and processes to order."""

import os
import pathlib
import subprocess
import sys

from sbml.experiment import build
from sbml.runtime import sharding

ROOT = pathlib.Path(__file__).parents[1]


def start(workdir, *flags, devices=1, env=(), config="tests/tiny.py"):
    """``python -m sbml.main`` in the background, on ``devices`` fake devices."""
    command = [sys.executable, "-m", "sbml.main", f"--workdir={workdir}"]
    command += [f"--config={config}"] if config else []  # Or the one in its checkpoint.
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}",
        **dict(env),
    }
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [*command, *flags], cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True
    )


def finish(process, expect=0):
    """Wait; the standard error, after checking the exit code."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == expect, f"exit {process.returncode}\n{out}\n{err[-4000:]}"
    return err


def run(workdir, *flags, **kwargs):
    """Start and finish."""
    expect = kwargs.pop("expect", 0)
    return finish(start(workdir, *flags, **kwargs), expect)


def state(config, workdir):
    """The newest checkpoint's state, in this process."""
    experiment = build.Experiment(config)
    with experiment.config.training.checkpoints(workdir) as checkpoints:
        return checkpoints.restore(sharding.abstract(experiment.init_state, sharding.data_mesh()))
