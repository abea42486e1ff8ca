"""sbml --config=digits_vp [--mode=train,eval,sample] [--workdir=DIR] [--config.FIELD=VALUE ...]

Also as python -m sbml.main. A config is one of those in configs/, by its name, or any config file.
Of a run that has a checkpoint, --workdir=DIR alone is enough: its config is in the checkpoint.
--help=SECTION lists the fields of a section of the config, such as eval; --help=config all of them.
Flags of one mode: --source=DIR [--pixels=centred|unit|bins] of convert, --runs=DIR,DIR of compare,
--source=FOLDER of compress, --source=FILE --to=FOLDER of decompress.
"""

import inspect
import logging as stdlib_logging
import pathlib
import signal
import sys
import traceback
from collections.abc import Mapping, Sequence

import jax
from absl import app, flags, logging

from sbml import compiler
from sbml.experiment import config as configs
from sbml.experiment import reference
from sbml.experiment.build import Experiment
from sbml.experiment.config import Config
from sbml.experiment.trained import of_workdir
from sbml.experiment.training import Training
from sbml.modes import GIVEN, MODES, Mode, execute, parameters_of
from sbml.registry import hint
from sbml.runtime import cpu, peers, refusals, sharding
from sbml.runtime.preemption import Preemption
from sbml.runtime.workdir import Workdir

CONFIG = flags.DEFINE_string(
    "config", None, "Name or file of a config. --config.FIELD=VALUE sets a field of it."
)
MODE = flags.DEFINE_list("mode", None, f"Modes to run, in this order: {', '.join(MODES)}.")
WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the results; default: runs/<name of the config>."
)
COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "For several processes: HOST:PORT of process 0, or auto (TPU pods, Slurm)."
)
PROCESSES = flags.DEFINE_integer(
    "num_processes", None, "Number of processes, unless --coordinator=auto."
)
PROCESS = flags.DEFINE_integer(
    "process_id", None, "Number of this process from 0, unless --coordinator=auto."
)
TRACEBACK = flags.DEFINE_boolean("traceback", False, "Show the traceback of an error.")
MODEL = "--config=configs/<name>.py, or --workdir of a run that has a checkpoint"


def parse(arguments: list[str]) -> list[str]:
    """Set the flags that this file defines, and return the other arguments: fields of the config,
    and flags of the modes."""
    for argument in arguments[1:]:
        if argument.startswith("--help="):
            print(reference.text(argument.partition("=")[2]))
            sys.exit(0)
    flags.FLAGS.set_gnu_getopt(True)
    try:
        rest: list[str] = flags.FLAGS(arguments, known_only=True)
    except flags.Error as error:
        sys.exit(f"UsageError: {error}")
    return rest


def values_of(arguments: Sequence[str]) -> dict[str, str]:
    """The values in arguments such as ``--config.eval.seed=3`` or ``--source DIR``, by name; the
    last of several counts.
    """
    values, rest = {}, list(arguments)
    while rest:
        argument = rest.pop(0)
        name, equals, value = argument.lstrip("-").partition("=")
        if not argument.startswith("-"):
            raise app.UsageError(f"unknown: {argument}; set fields as --config.field=value")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise app.UsageError(f"{argument} has no value: give {argument}=VALUE")
            value = rest.pop(0)
        values[name] = value
    return values


def flags_of(chosen: Mapping[str, Mode], given: Mapping[str, str]) -> dict[str, str]:
    """The flags of the modes, by name, from the arguments that are ``given``.

    An argument that no mode uses is refused, and so is a mode without a flag that it needs.
    """
    used = set().union(*map(parameters_of, chosen.values()))
    names = ", ".join(chosen)
    own = {name: value for name, value in given.items() if not name.startswith("config.")}
    for name in own:
        if name not in used - {*GIVEN}:
            flags_of_modes = {mode: parameters_of(MODES[mode]) - {*GIVEN} for mode in MODES}
            if owners := [mode for mode, has in flags_of_modes.items() if name in has]:
                raise app.UsageError(
                    f"--{name} is for --mode={' or '.join(owners)}, not for {names}"
                )
            known = set().union(*flags_of_modes.values())
            raise app.UsageError(f"unknown flag --{name}{hint(name, [*flags.FLAGS, *known])}")
    for mode, function in chosen.items():
        for name, parameter in inspect.signature(function).parameters.items():
            if parameter.default is parameter.empty and name not in {*GIVEN, *own}:
                raise app.UsageError(f"--mode={mode} needs --{name}=VALUE")
    needed = {"config", "experiment"}
    for name, users in (("config", needed), ("coordinator", needed), ("workdir", {"workdir"})):
        is_set = flags.FLAGS[name].value is not None or (name == "config" and len(given) > len(own))
        if is_set and not users & used:
            raise app.UsageError(f"--mode={names} does not use --{name}: leave it out")
    return own


def check_values() -> None:
    """Check the values of the flags that this file defines."""
    for flag, what in ((CONFIG, "config"), (WORKDIR, "folder")):
        if flag.value is not None and not flag.value.strip():
            raise app.UsageError(f"--{flag.name}= names no {what}: give one, or leave the flag out")
    if MODE.value is not None and not MODE.value:
        raise app.UsageError(f"--mode= names no mode: choose from {', '.join(MODES)}")
    address, count, own = COORDINATOR.value, PROCESSES.value, PROCESS.value
    if address == "auto" or address is None and count is None and own is None:
        return
    if count is None or own is None or not 0 <= own < count:
        raise app.UsageError(
            f"--coordinator={address} --num_processes={count} --process_id={own}: several "
            "processes need all three flags, and process_id must be from 0 to num_processes - 1; "
            "or give --coordinator=auto alone"
        )
    host, _, port = (address or "").rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise app.UsageError(f"--coordinator={address or ''}: give HOST:PORT of process 0, or auto")


def run_name(config: str) -> str:
    """configs/a.py is the run ``a``; configs/a.py:b/c, a config with an argument, ``a_b_c``."""
    file, _, argument = config.partition(":")
    name = pathlib.Path(file).name.replace(".py", "")
    return "_".join(filter(None, [name, *argument.split("/")])).replace(":", "_")


def read_config(given: Mapping[str, str]) -> tuple[Config | None, Workdir | None]:
    """The config of the command line and the work directory.

    Without ``--config`` it is the config in the checkpoint of ``--workdir``, if there is one.
    """
    workdir = None if WORKDIR.value is None else Workdir(WORKDIR.value).connect()
    if CONFIG.value is not None:
        workdir = workdir or Workdir(f"runs/{run_name(CONFIG.value)}")
        config = configs.load(CONFIG.value)
    elif workdir is not None and workdir.has(Training.folder):
        config = configs.of_checkpoint(workdir)
    else:
        return None, workdir
    prefix = "config."
    fields = {n.removeprefix(prefix): v for n, v in given.items() if n.startswith(prefix)}
    return configs.with_overrides(config, fields), workdir


def main(arguments: Sequence[str]) -> None:
    """Run the modes in order; a refusal ends in one line, and with the status 1; Ctrl-C ends with
    the status 130."""
    try:
        _main(arguments)
    except KeyboardInterrupt:
        if TRACEBACK.value:
            raise
        logging.warning("interrupted")
        raise SystemExit(128 + signal.SIGINT) from None
    except peers.LostProcessError as error:
        peers.leave(traceback.format_exc() if TRACEBACK.value else f"{refusals.line(error)}")
    except Exception as error:
        if TRACEBACK.value or (line := refusals.line(error)) is None:
            raise
        sys.exit(line)


def _main(arguments: Sequence[str]) -> None:
    check_values()
    given = values_of(arguments[1:])
    config, workdir = read_config(given)
    names = MODE.value or (config and config.mode)
    if not names:
        raise app.UsageError(f"give {MODEL}; without either, --mode=verify")
    chosen = {name: MODES[name] for name in names}
    own = flags_of(chosen, given)
    needing = [name for name in chosen if parameters_of(chosen[name]) & {"config", "experiment"}]
    if not needing:
        for mode in chosen.values():
            execute(mode, None, workdir, own)
        return
    if config is None or workdir is None:
        raise app.UsageError(f"--mode={needing[0]} needs {MODEL}")
    if COORDINATOR.value:
        address = None if COORDINATOR.value == "auto" else COORDINATOR.value
        jax.distributed.initialize(address, PROCESSES.value, PROCESS.value)
    cpu.settle()
    compiler.check()
    workdir.path.mkdir(parents=True, exist_ok=True)
    sharding.check_shared(workdir.path)
    names, modes = list(chosen), list(chosen.values())
    print(f"{', '.join(names)} in {workdir}")

    def check(i: int) -> None:
        """Refuse a config with which mode i cannot work after those before it."""
        experiment = Experiment(of_workdir(config, workdir, quiet=True))
        experiment.check()
        experiment.config.data.check_mode(names[i])
        if own_check := getattr(sys.modules[modes[i].__module__], "check", None):
            own_check(experiment, workdir, names[:i])

    # A mode without an experiment makes the model of the later modes, which are checked after it.
    uses = ["experiment" in parameters_of(mode) for mode in modes]
    first = [*uses, False].index(False)
    for i in range(first):
        check(i)
    preemption = Preemption()
    with peers.watched(lambda: f"what {workdir} holds"):
        for i, mode in enumerate(modes):
            if i and jax.process_count() > 1:
                preemption.leave_if_requested(f"{', '.join(names[:i])} done")
            if i > first and uses[i]:
                check(i)
            execute(mode, config, workdir, own)


def quiet() -> None:
    """Show no messages below warnings, unless --verbosity asks for them: they hide the bars.

    matplotlib also warns that it lists the fonts, which it does once and which needs no attention.
    """
    logging.set_verbosity(logging.WARNING)
    stdlib_logging.getLogger("matplotlib.font_manager").addFilter(
        lambda record: "building the font cache" not in record.getMessage()
    )


if __name__ == "__main__":
    quiet()
    app.run(main, flags_parser=parse)
