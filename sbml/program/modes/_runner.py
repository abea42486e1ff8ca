"""Runs the modes of a command, one after another, in one work directory.

The runner gives each mode what its parameters ask for (``sbml.program.modes``), and also

    every mode          one output for all processes; the report, once, at the end of the command
    workdir, trained    the lock, so that no other process runs the same mode in the work directory
    trained             the precision of matrix products, ``eval.precision``, and a row in
                        ``history.jsonl``
    preemption          the request to save and stop
"""

import contextlib
import io
import sys
import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import jax

from sbml.program.config.build import Experiment
from sbml.program.config.compatibility import of_workdir
from sbml.program.config.config import Config
from sbml.program.config.trained import Trained
from sbml.program.modes import Mode, parameters_of
from sbml.program.runtime import history, peers, sharding
from sbml.program.runtime.preemption import Preemption
from sbml.program.runtime.workdir import Workdir

# A mode with one of these parameters needs a config that fits the model in the work directory.
MODELLED = {"experiment", "trained"}
# A mode with one of these parameters, other than the report, leaves files in the work directory.
WRITING = {"workdir", "trained"}


class Command:
    """Modes that run one after another with one config.

    Attributes:
      config: the config; None if no mode needs one.
      workdir: the work directory; None if no mode needs one.
      flags: the flags of the command line that are for a mode, by their names.
    """

    def __init__(
        self, config: Config | None, workdir: Workdir | None, flags: Mapping[str, str]
    ) -> None:
        self.config, self.workdir, self.flags = config, workdir, flags
        self._start = time.perf_counter()
        self._to_report: list[Workdir] = []

    @cached_property
    def experiment(self) -> Experiment:
        """The objects of the config, with the fields of a converted checkpoint if there is one."""
        assert self.config is not None and self.workdir is not None
        return Experiment(of_workdir(self.config, self.workdir))

    def execute(self, modes: Mapping[str, Mode]) -> None:
        """Run ``modes`` in order. All of them are checked first; but a mode without an experiment
        makes the model of the later ones, so these are checked after it."""
        names, preemption = list(modes), Preemption()
        uses = [bool(parameters_of(modes[name]) & MODELLED) for name in names]
        first = [*uses, False].index(False)
        for i in range(first):
            self.check(names[i], modes[names[i]], names[:i])
        with peers.watched(lambda: f"what {self.workdir} holds"):
            try:
                for i, name in enumerate(names):
                    if i and jax.process_count() > 1:
                        preemption.leave_if_requested(f"{', '.join(names[:i])} done")
                    if i > first and uses[i]:
                        self.check(name, modes[name], names[:i])
                    self.run(name, modes[name])
            finally:
                self.report()

    def check(self, name: str, mode: Mode, before: Sequence[str]) -> None:
        """Refuse a config with which ``mode`` cannot run after the modes ``before``."""
        assert self.workdir is not None
        self.experiment.check()
        self.experiment.config.data.check_mode(name)
        if own_check := getattr(sys.modules[mode.__module__], "check", None):
            own_check(self.experiment, self.workdir, before)

    def run(self, name: str, mode: Mode) -> None:
        """Run a mode."""
        wanted, workdir = parameters_of(mode), self.workdir
        given: dict[str, Any] = {"config": self.config, "workdir": workdir, **self.flags}
        with contextlib.ExitStack() as stack:
            enter = stack.enter_context
            if self.config is not None and jax.process_index() > 0:
                enter(contextlib.redirect_stdout(io.StringIO()))
            if self.config and workdir is not None and wanted & WRITING and name != "report":
                enter(workdir.lock(name))
            if "preemption" in wanted:
                given["preemption"] = enter(Preemption())
            if "experiment" in wanted:
                given["experiment"] = self.experiment
            if "trained" in wanted:
                assert workdir is not None
                given["trained"] = trained = Trained.of(self.experiment, workdir)
                section = self.experiment.config.eval
                enter(jax.default_matmul_precision(section.precision))
                about = {"step": trained.restored.step, "split": section.split}
                enter(history.noted(workdir, name, **about))
            results = mode(**{name: value for name, value in given.items() if name in wanted})
            if wanted & MODELLED:
                sharding.barrier(f"{name} done")  # The next mode reads its files in all processes.
            else:
                vars(self).pop("experiment", None)  # A conversion can change its architecture.
        if "preemption" in wanted:
            # A signal in the last moments of a mode also ends the command.
            given["preemption"].leave_if_requested(f"{name} is done")
        if results is not None and workdir is not None:
            self._to_report += [results, workdir]

    def report(self) -> None:
        """Write the reports of the work directories in which modes have left results."""
        if not self._to_report:
            return
        from sbml.program.report import result, summary  # here: Matplotlib takes half a second

        for folder in {str(each): each for each in self._to_report}.values():
            if jax.process_index() == 0 and summary.write(folder, self.experiment.loaded):
                seconds = time.perf_counter() - self._start
                print(f"report: {folder / 'report.html'}, in {seconds:.0f} s")
                print(result.next_steps(folder))
