"""sbml --config=NAME [--mode=MODE,...] [--workdir=DIR] [--config.FIELD=VALUE ...]

Also: python -m sbml.main. The modes have flags of their own, such as --source.

What one needs first:
  --config=NAME              A config: the name of a file in configs/, or the
                             path of another one. It is not needed with the
                             --workdir of a run that has a checkpoint.
  --mode=MODE,...            Modes to run, in order; default: config.mode.
  --workdir=DIR              Folder of results; default: runs/<name of config>.
  --trust=NAME,...           Parts of other packages, or packages, whose code
                             may run, and paths that may be read, if only a
                             file of --workdir names them.
  --source=PATH              What convert, compress and decompress read.
  --config.FIELD=VALUE       A field, such as --config.eval.ode.rtol=1e-5.

Several processes, and errors:
  --coordinator=HOST:PORT    HOST:PORT of process 0, or auto (TPU pods, Slurm).
  --num_processes=N          Number of processes, unless --coordinator=auto.
  --process_id=I             Number of this process from 0; not with auto.
  --traceback                Show the traceback of an error.
  --verbosity=0              Show also notes, not only warnings and errors.
"""

import contextlib
import functools
import inspect
import logging as stdlib_logging
import os
import pathlib
import re
import signal
import sys
import traceback
from argparse import ArgumentError, Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
from absl import app, flags, logging
from absl.flags.argparse_flags import ArgumentParser
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from sbml.core import compiler, registry
from sbml.core.registry import hint
from sbml.core.scalars import escaped, notation
from sbml.program.config import config as configs
from sbml.program.config import reference
from sbml.program.config.config import Config
from sbml.program.config.fields import errors_of
from sbml.program.config.training import Training
from sbml.program.modes import GIVEN, MODES, OF_CONFIG, Mode, parameters_of
from sbml.program.modes import overview as modes_in_words
from sbml.program.runtime import cpu, peers, refusals
from sbml.program.runtime.workdir import Workdir


def _names(text: str) -> list[str]:
    return re.findall(r"[^,\s]+", text)


# What the values of the flags are.
KINDS: dict[str, Callable[[str], Any]] = {
    "config": str,
    "mode": _names,
    "workdir": str,
    "trust": _names,
    "coordinator": str,
    "num_processes": int,
    "process_id": int,
}


def usage() -> str:
    """The text of ``--help``: what one needs first, the configs, the modes, the fields."""
    names = f"Configs:\n{reference.entry('', ', '.join(configs.named()))}"
    modes = "\n".join(["Modes:", *(reference.entry(*each) for each in modes_in_words())])
    fields = "\n".join(["Fields of the config, by section:", *reference.overview()])
    return "\n\n".join([str(__doc__).strip(), names, modes, fields])


def parse(arguments: Sequence[str]) -> Namespace:
    """The flags that this file reads; and as texts by their names, the ``fields`` of the config and
    the ``own`` flags of the modes. If a name is given several times, its last value counts."""
    parser = ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name, kind in KINDS.items():
        parser.add_argument(f"--{name}", type=kind)
    parser.set_defaults(trust=[], fields=[], own=[])
    parser.add_argument("--traceback", action="store_true")
    parser.add_argument("--help", "-h", nargs="?", const="")
    try:
        for argument in arguments[1:]:
            flag = argument.partition("=")[0]
            if any("\ud800" <= c <= "\udfff" or c == "\n" for c in argument):
                raise ValueError(f"{escaped(argument)} is not in UTF-8 in one line: change it")
            if flag.startswith("--"):
                name = flag.removeprefix("--").removeprefix("config.")
                dest = "fields" if flag.startswith("--config.") else "own"
                pair = functools.partial(lambda *pair: pair, name)
                with contextlib.suppress(ArgumentError):  # The flag is known.
                    parser.add_argument(flag, dest=dest, action="append", type=pair)
        options, rest = parser.parse_known_args(arguments[1:])
        if rest:
            raise ValueError(f"unknown: {rest[0]}; set fields as --config.field=value")
        if options.help is not None:
            try:
                print(reference.text(options.help) if options.help else usage(), flush=True)
            except BrokenPipeError:  # ``head`` has read its lines; the rest goes nowhere.
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(0)
    except ArgumentError as error:
        said, name = f"{error.argument_name}: {error.message}", str(error.argument_name)
        if "expected" in error.message:
            said += f": {near(name.removeprefix('--'), f'give {name}=VALUE')}"
        sys.exit(refusals.fitted(f"UsageError: {refusals.readable(said)}"))
    except (ValueError, flags.Error) as error:
        sys.exit(refusals.fitted(f"UsageError: {refusals.readable(str(error))}"))
    options.fields, options.own = dict(options.fields), dict(options.own)
    return options


def flags_of_modes() -> dict[str, set[str]]:
    """The flags of each mode, by its name."""
    return {mode: parameters_of(MODES[mode]) - GIVEN for mode in MODES}


def near(name: str, remedy: str) -> str:
    """The ``remedy``; before it, if the flag ``name`` is unknown, the one that is most like it."""
    known = {*KINDS, "help", "traceback"}.union(*flags_of_modes().values())
    return remedy if name in known else hint(name, known, remedy, "--")


def check_flags(chosen: Mapping[str, Mode], options: Namespace) -> None:
    """Refuse a flag that no mode uses, and a mode without a flag that it needs."""
    used = set().union(*map(parameters_of, chosen.values()))
    names = ", ".join(chosen)
    for name in options.own:
        if name not in used - GIVEN:
            if owners := [mode for mode, has in flags_of_modes().items() if name in has]:
                raise app.UsageError(
                    f"--{name} is for --mode={' or '.join(owners)}, not for {names}"
                )
            raise app.UsageError(f"unknown flag --{name}: {near(name, 'see --help')}")
    for mode, function in chosen.items():
        for name, parameter in inspect.signature(function).parameters.items():
            if parameter.default is parameter.empty and name not in {*GIVEN, *options.own}:
                raise app.UsageError(f"--mode={mode} needs --{name}=VALUE")
    folder = OF_CONFIG | {"workdir"}
    for name, users in (("config", OF_CONFIG), ("coordinator", OF_CONFIG), ("workdir", folder)):
        is_set = vars(options)[name] is not None or (name == "config" and options.fields)
        if is_set and not users & used:
            raise app.UsageError(f"--mode={names} does not use --{name}: leave it out")


def check_values(options: Namespace) -> None:
    """Check the values of the flags that this file reads."""
    for name, what in (("config", "config"), ("workdir", "folder")):
        value = vars(options)[name]
        if value is not None and not value.strip():
            raise app.UsageError(f"--{name}= names no {what}: give one, or leave the flag out")
    if options.mode == []:
        raise app.UsageError(f"--mode= names no mode: choose from {', '.join(MODES)}")
    address, count, own = options.coordinator, options.num_processes, options.process_id
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


def read_config(options: Namespace, own: ConfigDict | None) -> tuple[Config | None, Workdir | None]:
    """The config of the command line and the work directory. ``own`` is that of ``--config``.

    Without it, it is the config in the checkpoint of ``--workdir``, if there is one.
    """
    with errors_of("--workdir"):
        workdir = None if options.workdir is None else Workdir(options.workdir).connect()
    if own is not None:
        workdir = workdir or Workdir(f"runs/{run_name(options.config)}")
        return configs.with_overrides(own, options.fields), workdir
    if workdir is not None and workdir.has(Training.folder):
        return configs.of_checkpoint(workdir, options.fields), workdir
    return None, workdir


def settings(config: Config, fields: Iterable[str]) -> str:
    """The fields that the command line sets, as they were read; empty if there are none."""
    values = flatten_dict(config.plain(), sep=".")
    each = [f"--config.{name}={notation(values[name])}" for name in fields if name in values]
    return f", with {' '.join(each)}" if each else ""


def main(options: Namespace) -> None:
    """Run the modes in order; a refusal ends in one line, and with the status 1; Ctrl-C ends with
    the status 130."""
    try:
        check_values(options)
        own = None if options.config is None else configs.load(options.config)
        given = options.fields, options.own, options.mode
        values = {} if own is None else own.to_dict()
        paths = configs.paths_in({**flatten_dict(values, sep="."), **options.fields})
        with registry.only({*options.trust, *configs.parts_in(values, *given), *paths}):
            _run(options, own)
    except KeyboardInterrupt:
        if options.traceback:
            raise
        logging.warning("interrupted")
        raise SystemExit(128 + signal.SIGINT) from None
    except SystemExit as error:
        sys.exit(refusals.exit_line(error) or error.code)
    except peers.LostProcessError as error:
        peers.leave(traceback.format_exc() if options.traceback else f"{refusals.line(error)}")
    except Exception as error:
        if options.traceback or (line := refusals.line(error)) is None:
            raise
        sys.exit(refusals.fitted(line))


def _run(options: Namespace, own: ConfigDict | None) -> None:
    """Run the modes. The names in ``own``, the config of ``--config``, are the user's."""
    config, workdir = read_config(options, own)
    names = options.mode or (config and config.mode)
    model = "--config=configs/<name>.py, or --workdir of a run that has a checkpoint"
    if not names:
        raise app.UsageError(f"give {model}; without either, --mode=verify; see --help")
    chosen = {name: MODES[name] for name in names}
    check_flags(chosen, options)
    from sbml.program.modes._runner import Command  # here, because --help does not need them
    from sbml.program.runtime import sharding

    needing = [name for name in chosen if parameters_of(chosen[name]) & OF_CONFIG]
    if not needing:
        Command(None, workdir, options.own).execute(chosen)
        return
    if config is None or workdir is None:
        raise app.UsageError(f"--mode={needing[0]} needs {model}")
    if options.coordinator:
        address = None if options.coordinator == "auto" else options.coordinator
        jax.distributed.initialize(address, options.num_processes, options.process_id)
    cpu.settle()
    compiler.check()
    workdir.path.mkdir(parents=True, exist_ok=True)
    sharding.check_shared(workdir.path)
    print(f"{', '.join(chosen)} in {workdir}{settings(config, options.fields)}")
    Command(config, workdir, options.own).execute(chosen)


def quiet() -> None:
    """Show no messages below warnings, unless --verbosity asks for them: they hide the bars.

    matplotlib's warning that it builds its font cache is hidden too, since it needs no attention. A
    message begins with its kind, and in a terminal it takes the place of a bar that is shown.
    """
    logging.set_verbosity(logging.WARNING)
    clear = "\r\033[K" if sys.stderr.isatty() else ""

    class Form(stdlib_logging.Formatter):
        def format(self, record: stdlib_logging.LogRecord) -> str:
            return clear + refusals.fitted(refusals.relative(super().format(record)))

    logging.get_absl_handler().setFormatter(Form("%(levelname)s: %(message)s"))
    stdlib_logging.getLogger("matplotlib.font_manager").addFilter(
        lambda record: "building the font cache" not in record.getMessage()
    )


def run() -> None:
    """The command ``sbml``. The lines that it prints fit in a terminal."""
    quiet()
    write, stdout = sys.stdout.write, sys.stdout
    stdout.write = lambda text: write(refusals.fitted(text, stdout))  # type: ignore[method-assign]
    app.run(main, flags_parser=parse)


if __name__ == "__main__":
    run()
