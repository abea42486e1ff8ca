"""Running the program as a user does: in new processes, with as many devices as a test asks for.

Importing the program takes seconds. A process that has imported it, and has computed nothing, is
kept; each run is a copy of it (fork), in which XLA has not started either: it can still be told how
many devices to make.
"""

import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import tempfile

import jax

from sbml.program.config import build, compatibility
from sbml.program.config.config import Config
from sbml.program.modes._runner import Command
from sbml.program.runtime import sharding
from sbml.program.runtime.workdir import Workdir

ROOT = pathlib.Path(__file__).parents[1]
FRESH = multiprocessing.get_context("forkserver")
# What the program imports, except sbml.main: it defines the flags, so it runs once in a process.
FRESH.set_forkserver_preload(
    [*(f"sbml.program.modes.{mode}" for mode in ("train", "eval", "sample")), "sklearn.datasets"]
)


class Copy:
    """``call(arguments)`` in a copy of the process with imports; it has the interface of ``Popen``.

    The environment is set after the imports. ``XLA_FLAGS`` is read later than that, but other
    variables may have been read before.
    """

    def __init__(self, call, arguments, environment):
        self._folder = tempfile.TemporaryDirectory(prefix="sbml-output-")
        self._written = [pathlib.Path(self._folder.name, name) for name in ("out", "err")]
        given = (call, arguments, environment, [str(path) for path in self._written])
        self._process = FRESH.Process(target=_begin, args=given)
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self):
        return self._process.exitcode

    def poll(self):
        return self.returncode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout=None):
        """Wait; standard output and error."""
        self._process.join(timeout)
        if self.poll() is None:
            raise subprocess.TimeoutExpired("a copy", timeout)
        return tuple(path.read_text() if path.exists() else "" for path in self._written)


def _begin(call, arguments, environment, written):
    for descriptor, path in zip((1, 2), written, strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    jax.config.update("jax_platforms", environment["JAX_PLATFORMS"])
    os.chdir(ROOT)
    try:
        call(arguments)
    finally:
        # A copy does not run the interpreter's exit handlers, in which jax would leave the service
        # of several processes. Each process waits there for all others.
        jax.distributed.shutdown()


def _program(arguments):
    from sbml import main

    sys.argv = ["sbml.main", *arguments]
    main.run()


def _code(arguments):
    code, *sys.argv[1:] = arguments
    exec(code, {"__name__": "__main__"})


def _environment(devices):
    flags = os.environ["XLA_FLAGS"]
    if devices > 1:  # Otherwise with the flags of this process, whose compiled programs it reuses.
        flags += f" --xla_force_host_platform_device_count={devices}"
    return {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}


def python(code, *arguments, devices=1):
    """``python -c code arguments`` in the background, on ``devices`` fake devices."""
    return Copy(_code, [code, *arguments], _environment(devices))


def start(workdir, *flags, devices=1, env=(), config="tests/tiny.py"):
    """``python -m sbml.main`` in the background, on ``devices`` fake devices."""
    given = {"workdir": workdir, "config": config}
    arguments = [*(f"--{name}={value}" for name, value in given.items() if value), *flags]
    environment = {**_environment(devices), **dict(env)}
    if set(dict(env)) <= {"XLA_FLAGS"}:
        return Copy(_program, arguments, environment)
    command = [sys.executable, "-m", "sbml.main", *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True)


def _finished(process, expect=0):
    out, err = process.communicate(timeout=300)
    assert process.returncode == expect, f"exit {process.returncode}\n{out}\n{err[-4000:]}"
    return out, err


def finish(process, expect=0):
    """Wait; the standard error, after checking the exit code."""
    return _finished(process, expect)[1]


def output(process):
    """Wait; the standard output of a process that succeeds."""
    return _finished(process)[0]


def run(workdir, *flags, **kwargs):
    """Start and finish."""
    expect = kwargs.pop("expect", 0)
    return finish(start(workdir, *flags, **kwargs), expect)


def checked(config):
    """The config of a ConfigDict, or ``config`` itself."""
    return config if isinstance(config, Config) else Config(**config.to_dict())


def mode(run, config, workdir, source=None, **flags):
    """Run a mode in this process, as the program does."""
    flags |= {} if source is None else {"source": source}
    command = Command(checked(config), Workdir(workdir), flags)
    command.run(run.__module__.rpartition(".")[2], run)
    command.report()


def result(bits, **fields):
    """A row of results in ``evaluation.json``, whose mean is that of ``bits (n,)``."""
    ends = [float(bits.mean() - 0.1), float(bits.mean() + 0.1)]
    unread = dict.fromkeys(("stderr", "this_set_stderr", "this_set_ci95", "min", "max"), 0.0)
    row = {"estimator": "ode", "dequantizer": "uniform", "num_importance": 1, **unread}
    row |= {"data": "digits", "split": "test", "n": len(bits), "split_size": len(bits)}
    row |= {"bits_per_dim": float(bits.mean()), "interval": ends, "this_set_interval": ends}
    row |= {"nonfinite": 0, "outliers": [], "terms": {}, "smallest_time": 1e-5, "trace": None}
    row |= {"dequantizer_step": None, "nfe_mean": 70.0, "nfe_max": 80, "ci95": 0.1}
    return row | fields


def is_empty(workdir):
    """Whether a work directory has no file but those of its locks."""
    return not workdir.exists() or all(path.suffix == ".lock" for path in workdir.iterdir())


def fitted(config, workdir):
    """The config with the fields of a converted checkpoint."""
    return compatibility.of_workdir(checked(config), Workdir(workdir))


def state(config, workdir):
    """The newest checkpoint's state, in this process."""
    experiment = build.Experiment(config)
    template = sharding.abstract(experiment.init_state, sharding.data_mesh())
    with experiment.config.training.checkpoints(workdir) as checkpoints:
        return checkpoints.restore(lambda metadata: template)
