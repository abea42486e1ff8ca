"""sbml --config=digits_vp [--mode=train,eval,sample] [--workdir=DIR] [--config.FIELD=VALUE ...]

Also as python -m sbml.main. The modes read flags of their own, such as --source=DIR.
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
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from sbml import compiler, registry
from sbml.experiment import config as configs
from sbml.experiment import reference, renamed
from sbml.experiment.config import Config
from sbml.experiment.training import Training
from sbml.modes import GIVEN, MODES, OF_CONFIG, Mode, parameters_of
from sbml.modes import overview as modes_in_words
from sbml.registry import hint
from sbml.runtime import cpu, peers, refusals, sharding
from sbml.runtime.workdir import Workdir
from sbml.scalars import notation

CONFIG = flags.DEFINE_string(
    "config",
    None,
    "A config: the name of a file in configs/, or the path of any config file. It is not needed "
    "with the --workdir of a run that has a checkpoint, which holds the config.",
)
MODE = flags.DEFINE_list(
    "mode", None, "Modes to run, in this order; default: the field mode of the config."
)
WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the results; default: runs/<name of the config>."
)
TRUST = flags.DEFINE_list(
    "trust",
    [],
    "Parts of other packages, package.module:Name, or whole packages, whose code may run although "
    "only a file of --workdir names them.",
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


def usage() -> str:
    """The text of ``--help``: what one needs first, the modes, the sections of the config."""

    def group(title: str, *entries: tuple[str, str]) -> str:
        return "\n".join([f"{title}:", *(reference.entry(*each) for each in entries)])

    def own(*pairs: tuple[str, flags.FlagHolder]) -> list[tuple[str, str]]:
        return [(head, str(flags.FLAGS[flag.name].help)) for head, flag in pairs]

    return "\n\n".join(
        [
            str(__doc__).strip(),
            group(
                "What one needs first",
                *own(("--config=NAME", CONFIG)),
                ("", f"Names: {', '.join(configs.named())}."),
                *own(("--mode=MODE,...", MODE), ("--workdir=DIR", WORKDIR)),
                *own(("--trust=NAME,...", TRUST)),
                ("--source=PATH", "What the modes convert, compress and decompress read."),
                (
                    "--config.FIELD=VALUE",
                    "A field of the config, such as --config.eval.ode.rtol=1e-5.",
                ),
            ),
            group("Modes", *modes_in_words()),
            "\n".join(["Fields of the config, by section:", *reference.overview()]),
            group(
                "Several processes, and errors",
                *own(("--coordinator=HOST:PORT", COORDINATOR), ("--num_processes=N", PROCESSES)),
                *own(("--process_id=I", PROCESS), ("--traceback", TRACEBACK)),
                ("--helpfull", "All flags, also of the packages that are used."),
            ),
        ]
    )


def parse(arguments: list[str]) -> list[str]:
    """Set the flags that this file defines, and return the other arguments: fields of the config,
    and flags of the modes."""
    for argument in arguments[1:]:
        try:
            argument.encode()
        except UnicodeEncodeError:
            shown = refusals.readable(argument)
            sys.exit(f"UsageError: {shown} is not in UTF-8: give another name or value")
        if argument in ("--help", "-h", "--h") or argument.startswith("--help="):
            section = argument.partition("=")[2]
            try:
                print(reference.text(section) if section else usage())
            except ValueError as error:
                sys.exit(f"UsageError: {refusals.readable(str(error))}")
            sys.exit(0)
    flags.FLAGS.set_gnu_getopt(True)
    try:
        rest: list[str] = flags.FLAGS(arguments, known_only=True)
    except flags.Error as error:
        sys.exit(f"UsageError: {refusals.readable(str(error))}")
    return rest


def values_of(arguments: Sequence[str]) -> dict[str, str]:
    """The values in arguments such as ``--config.eval.seed=3`` or ``--source DIR``, by name. If a
    name is given several times, its last value counts.
    """
    values, rest = {}, list(arguments)
    while rest:
        argument = rest.pop(0)
        name, equals, value = argument.lstrip("-").partition("=")
        if not argument.startswith("-"):
            raise app.UsageError(f"unknown: {argument}; set fields as --config.field=value")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise app.UsageError(f"{argument} has no value: give {argument}=VALUE{near(name)}")
            value = rest.pop(0)
        values[name] = value
    return values


def flags_of_modes() -> dict[str, set[str]]:
    """The flags of each mode, by its name."""
    return {mode: parameters_of(MODES[mode]) - GIVEN for mode in MODES}


def near(name: str) -> str:
    """The end of a message about an unknown flag ``name``: the flag that is most like it."""
    known = {"help", *flags.FLAGS}.union(*flags_of_modes().values()) - {name}
    return hint(f"--{name}", [f"--{flag}" for flag in known])


def flags_of(chosen: Mapping[str, Mode], given: Mapping[str, str]) -> dict[str, str]:
    """The flags of the modes, by name, from the arguments that are ``given``.

    An argument that no mode uses is refused, and so is a mode without a flag that it needs.
    """
    used = set().union(*map(parameters_of, chosen.values()))
    names = ", ".join(chosen)
    own = {name: value for name, value in given.items() if not name.startswith("config.")}
    for name in own:
        if name not in used - GIVEN:
            if owners := [mode for mode, has in flags_of_modes().items() if name in has]:
                raise app.UsageError(
                    f"--{name} is for --mode={' or '.join(owners)}, not for {names}"
                )
            raise app.UsageError(f"unknown flag --{name}{near(name)}")
    for mode, function in chosen.items():
        for name, parameter in inspect.signature(function).parameters.items():
            if parameter.default is parameter.empty and name not in {*GIVEN, *own}:
                raise app.UsageError(f"--mode={mode} needs --{name}=VALUE")
    folder = OF_CONFIG | {"workdir"}
    for name, users in (("config", OF_CONFIG), ("coordinator", OF_CONFIG), ("workdir", folder)):
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
    """The name of a run: ``a`` for configs/a.py, and ``a_b_c`` for configs/a.py:b/c."""
    file, _, argument = config.partition(":")
    name = pathlib.Path(file).name.replace(".py", "")
    return "_".join(filter(None, [name, *argument.split("/")])).replace(":", "_")


def read_config(
    given: Mapping[str, str], own: ConfigDict | None
) -> tuple[Config | None, Workdir | None]:
    """The config of the command line and the work directory. ``own`` is that of ``--config``.

    Without it, it is the config in the checkpoint of ``--workdir``, if there is one.
    """
    workdir = None if WORKDIR.value is None else Workdir(WORKDIR.value).connect()
    prefix = "config."
    fields = {n.removeprefix(prefix): v for n, v in given.items() if n.startswith(prefix)}
    if own is not None:
        workdir = workdir or Workdir(f"runs/{run_name(str(CONFIG.value))}")
        return configs.with_overrides(own, fields), workdir
    if workdir is not None and workdir.has(Training.folder):
        return configs.of_checkpoint(workdir, fields), workdir
    return None, workdir


def settings(config: Config, given: Mapping[str, str]) -> str:
    """The fields that the command line sets, as they were read; empty if there are none."""
    prefix = "config."
    fields = {n.removeprefix(prefix): v for n, v in given.items() if n.startswith(prefix)}
    names = renamed.current(fields, config.sampling.sampler.name, stdlib_logging.DEBUG)
    values = flatten_dict(config.plain(), sep=".")
    each = [f"--config.{name}={notation(values[name])}" for name in names if name in values]
    return f", with {' '.join(each)}" if each else ""


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
    own = None if CONFIG.value is None else configs.load(CONFIG.value)
    named = configs.parts_in(own and own.to_dict(), given, MODE.value)
    with registry.only({*TRUST.value, *named}):
        _run(given, own)


def _run(given: Mapping[str, str], own_config: ConfigDict | None) -> None:
    """Run the modes. The names in ``own_config``, the config of ``--config``, are the user's."""
    config, workdir = read_config(given, own_config)
    names = MODE.value or (config and config.mode)
    if not names:
        raise app.UsageError(f"give {MODEL}; without either, --mode=verify; see --help")
    chosen = {name: MODES[name] for name in names}
    own = flags_of(chosen, given)
    from sbml.modes._runner import Command  # here, because --help does not need it

    needing = [name for name in chosen if parameters_of(chosen[name]) & OF_CONFIG]
    if not needing:
        Command(None, workdir, own).execute(chosen)
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
    print(f"{', '.join(chosen)} in {workdir}{settings(config, given)}")
    Command(config, workdir, own).execute(chosen)


def quiet() -> None:
    """Show no messages below warnings, unless --verbosity asks for them: they hide the bars.

    matplotlib's warning that it builds its font cache is hidden too, since it needs no attention. A
    message begins with its kind, and in a terminal it takes the place of a bar that is shown.
    """
    logging.set_verbosity(logging.WARNING)
    clear = "\r\033[K" if sys.stderr.isatty() else ""

    class Form(stdlib_logging.Formatter):
        def format(self, record: stdlib_logging.LogRecord) -> str:
            return refusals.relative(super().format(record))

    logging.get_absl_handler().setFormatter(Form(f"{clear}%(levelname)s: %(message)s"))
    stdlib_logging.getLogger("matplotlib.font_manager").addFilter(
        lambda record: "building the font cache" not in record.getMessage()
    )


if __name__ == "__main__":
    quiet()
    app.run(main, flags_parser=parse)
