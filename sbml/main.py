"""sbml --config=digits_vp [--mode=train,eval,sample] [--workdir=DIR]

Also as python -m sbml.main. A config is one of those in configs/, by its name, or any config file.
Of a run that has a checkpoint, --workdir=DIR alone is enough: its config is in the checkpoint.
"""

import importlib
import logging as stdlib_logging
import os
import pathlib
import pkgutil
import runpy
import signal
import sys
import traceback
from collections.abc import Collection, Sequence
from typing import Any

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from sbml import compiler, modes
from sbml.experiment import architecture, catalogue, stored
from sbml.experiment.config import check_overrides, fields_set_to_none
from sbml.experiment.fields import choices_in
from sbml.experiment.training import Training
from sbml.runtime import cpu, peers, refusals, sharding
from sbml.runtime.preemption import Preemption
from sbml.runtime.workdir import Workdir

# The names of the files in ``modes``. A mode is imported only when it is needed, so that a wrong
# flag is reported before these slow imports.
MODES = sorted(m.name for m in pkgutil.iter_modules(modes.__path__) if m.name[0] != "_")

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Name or file of a config. --config.FIELD=VALUE sets a field of it."
)
MODE = flags.DEFINE_list("mode", None, f"Modes to run, in this order: {', '.join(MODES)}.")
WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the results; default: runs/<name of the config>."
)
SOURCE: flags.FlagHolder[str | None] = flags.DEFINE_string(
    "source", None, "Checkpoint or work directory of other code, which --mode=convert reads."
)
RUNS = flags.DEFINE_list("runs", None, "Evaluated work directories, which --mode=compare compares.")
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


def parse(arguments: list[str]) -> list[str]:
    """Parse the command line; an unknown field of the config is an error that lists the fields.

    Of a field given twice as --config.field=value the last counts; absl joins those of tuples.
    """
    given = [(i, a.partition("=")[0]) for i, a in enumerate(arguments) if "=" in a]
    last = {name: i for i, name in given if name.startswith("--config.")}
    earlier = {i for i, name in given if last.get(name, i) != i}
    arguments = [a for i, a in enumerate(arguments) if i not in earlier]
    workdir = _value(arguments, "workdir")
    chosen = set(_value(arguments, "mode").split(",")).intersection(MODES)
    if {"--config=", "-config="}.intersection(arguments):
        sys.exit("--config= names no config: give one, or leave the flag out")
    try:
        if (
            workdir
            and not _value(arguments, "config")
            and Workdir(workdir).connect().has(Training.folder)
            and "config" not in ignored(chosen)
        ):
            # absl knows the fields of a config only after it has read it, so this argument comes
            # first.
            arguments.insert(1, f"--config={stored.__file__}:{workdir}")
        _locate_configs(arguments)
    except ValueError as error:
        sys.exit(str(error))
    file = _value(arguments, "config")
    check_config_file(file)
    config = load_config(file) if file else None
    unset = {} if config is None else fields_set_to_none(arguments)
    try:
        rest = app.parse_flags_with_usage([a for a in arguments if a not in unset])
        for field in unset.values():
            CONFIG.value.update_from_flattened_dict({field: None})
        return rest
    except (AttributeError, KeyError, IndexError, TypeError, ValueError):
        if config is not None:
            try:
                check_overrides(config, arguments)
            except ValueError as error:
                sys.exit(str(error))
        raise


def load_config(file: str) -> ConfigDict:
    """What the function of the config ``file`` returns; leave with one line if it does not work.

    absl loads the file as well, but shows the errors of the file with its own traceback.
    """
    path, has_argument, argument = file.partition(":")
    try:
        get_config = runpy.run_path(path).get("get_config")
        if get_config is None:
            sys.exit(
                f"--config={path} has no function get_config(): begin with a copy of a file of "
                "configs/"
            )
        config = get_config(argument) if has_argument else get_config()
    except Exception as error:
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
        place = f"--config={path}, line {lines[-1]}: " if lines else f"--config={path}: "
        sys.exit(refusals.line(error) or f"{place}{type(error).__name__}: {error}")
    if not isinstance(config, ConfigDict):
        sys.exit(
            f"--config={path}: get_config() returned {type(config).__name__}; return a ConfigDict, "
            "as the files of configs/ do"
        )
    return config


def _value(arguments: list[str], flag: str) -> str:
    """The value of ``flag``, after "=" or as the argument that follows; empty without it.

    Of several values it is the last, as for absl.
    """
    found = ""
    for i, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name.lstrip("-") == flag and argument.startswith("-"):
            found = value if equals else (arguments[i + 1 : i + 2] or [""])[0]
    return found


def _locate_configs(arguments: list[str]) -> None:
    """Replace the name of a config by its path, after "=" or in the argument that follows."""
    for i, argument in enumerate(arguments):
        flag, equals, value = argument.partition("=")
        if flag in ("-config", "--config"):
            if equals:
                arguments[i] = f"{flag}={_path_of(value)}"
            elif i + 1 < len(arguments):
                arguments[i + 1] = _path_of(arguments[i + 1])


def _path_of(config: str) -> str:
    """The path of a config, which may be named by its file's name or begin with ~."""
    return os.path.expanduser(catalogue.path_of(config))


def check_config_file(config: str) -> None:
    """Leave with an explanation if --config=``config`` is no file."""
    path = pathlib.Path(config.partition(":")[0]).expanduser()
    if config and not path.is_file():
        what = "a folder" if path.is_dir() else "not there"
        sys.exit(f"--config={config}: {path} is {what}; give a file such as configs/digits_vp.py")


def run_name(config: str) -> str:
    """configs/a.py is the run ``a``; configs/a.py:b/c, a config with an argument, ``a_b_c``."""
    file, _, argument = config.partition(":")
    name = pathlib.Path(file).name.replace(".py", "")
    return "_".join(filter(None, [name, *argument.split("/")])).replace(":", "_")


def default_workdir(config: str) -> str:
    """``runs/`` and the name of the run; for a stored config, the work directory that stores it."""
    file, _, argument = config.partition(":")
    if pathlib.Path(file).resolve() == pathlib.Path(stored.__file__).resolve():
        return argument
    return f"runs/{run_name(config)}"


def module_of(mode: str) -> Any:
    """The file of ``mode``, imported."""
    return importlib.import_module(f"{modes.__name__}.{mode}")


def ignored(chosen: Collection[str]) -> set[str]:
    """The flags that all of the modes in ``chosen`` ignore; none if there are no modes."""
    each = [set(getattr(module_of(mode), "IGNORES", ())) for mode in chosen]
    return set.intersection(*each) if each else set()


def check_flags(arguments: Sequence[str]) -> None:
    """Refuse flags that would be ignored, and those that name nothing.

    Raises:
      UsageError: naming the flag.
    """
    if len(arguments) > 1:
        raise app.UsageError(f"unknown: {arguments[1:]}; set fields as --config.field=value")
    if MODE.value is not None and not MODE.value:
        raise app.UsageError(f"--mode= names no mode: choose from {', '.join(MODES)}")
    if WORKDIR.value is not None and not WORKDIR.value.strip():
        raise app.UsageError("--workdir= names no folder: give one, or leave the flag out")
    count, own = PROCESSES.value, PROCESS.value
    if COORDINATOR.value == "auto" or COORDINATOR.value is None and count is None and own is None:
        return
    if count is None or own is None or not 0 <= own < count:
        raise app.UsageError(
            f"--coordinator={COORDINATOR.value} --num_processes={count} --process_id={own}: "
            "several processes need all three flags, and process_id must be from 0 to "
            "num_processes - 1; or give --coordinator=auto alone"
        )
    host, _, port = (COORDINATOR.value or "").rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise app.UsageError(
            f"--coordinator={COORDINATOR.value or ''}: give HOST:PORT of process 0, or auto"
        )


def check_modes(chosen: Sequence[str]) -> None:
    """Refuse modes that do not exist, and flags that none of the modes in ``chosen`` takes.

    Raises:
      UsageError: the message names the modes or the flag.
    """
    unknown = [mode for mode in chosen if mode not in MODES]
    if unknown or not chosen:
        raise app.UsageError(f"unknown mode {unknown}; choose from {', '.join(MODES)}")
    taken = {flag for mode in chosen for flag in getattr(module_of(mode), "FLAGS", ())}
    for flag, mode in ((SOURCE, "convert"), (RUNS, "compare")):
        if flag.value is not None and flag.name not in taken:
            raise app.UsageError(f"--{flag.name} is for --mode={mode}, not for {', '.join(chosen)}")
    for flag in (CONFIG, WORKDIR, COORDINATOR):
        if flag.value is not None and flag.name in ignored(chosen):
            raise app.UsageError(
                f"--mode={','.join(chosen)} does not use --{flag.name}: leave it out"
            )


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
    check_flags(arguments)
    if MODE.value:
        check_modes(MODE.value)
        if "config" in ignored(MODE.value):
            for mode in MODE.value:
                module = module_of(mode)
                module.run(None, WORKDIR.value, **_flags_of(module))
            return
    if CONFIG.value is None:
        raise app.UsageError(
            "--config=configs/<name>.py says what to run, or --workdir of a run that has a "
            "checkpoint; without either, --mode=verify"
        )
    chosen = MODE.value or choices_in(CONFIG.value.mode)
    check_modes(chosen)
    if COORDINATOR.value:
        address = None if COORDINATOR.value == "auto" else COORDINATOR.value
        jax.distributed.initialize(address, PROCESSES.value, PROCESS.value)
    cpu.settle()
    compiler.check()
    file = config_flags.get_config_filename(flags.FLAGS["config"])
    workdir = Workdir(WORKDIR.value or default_workdir(file)).connect()
    workdir.path.mkdir(parents=True, exist_ok=True)
    sharding.check_shared(workdir.path)
    print(f"{', '.join(chosen)} in {workdir}")
    for i, mode in enumerate(chosen):
        if check := getattr(module_of(mode), "check", None):
            check(CONFIG.value, workdir, chosen[:i])
    preemption = Preemption()
    with peers.watched(lambda: f"what {workdir} holds"):
        for i, mode in enumerate(chosen):
            if i and jax.process_count() > 1:
                preemption.leave_if_requested(f"{', '.join(chosen[:i])} done")
            module = module_of(mode)
            config = architecture.of_workdir(CONFIG.value, workdir)
            module.run(config, workdir, **_flags_of(module))


def _flags_of(module: Any) -> dict[str, Any]:
    """The flags that a mode takes beside config and work directory."""
    return {name: flags.FLAGS[name].value for name in getattr(module, "FLAGS", ())}


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
