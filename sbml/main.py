"""python -m sbml.main --config=configs/digits_vp.py [--mode=train,eval,sample] [--workdir=DIR]"""

import pathlib
import runpy
import sys
from collections.abc import Callable, Sequence

import jax
from absl import app, flags, logging
from etils import epath
from ml_collections import config_flags

from sbml import (
    architecture,
    convert,
    evaluate,
    latents,
    quality,
    sample,
    train,
    train_dequantizer,
    verify,
)
from sbml.config import check_overrides

MODES: dict[str, Callable[..., None]] = {
    "train": train.run,
    "train_dequantizer": train_dequantizer.run,
    "eval": evaluate.run,
    "sample": sample.run,
    "latents": latents.run,
    "stats": quality.stats,
    "quality": quality.run,
    "convert": lambda config, workdir: convert.run(config, workdir, SOURCE.value),
    "verify": verify.run,
}

CONFIG = config_flags.DEFINE_config_file("config", None, "Config file; any field of it can be set.")
MODE = flags.DEFINE_list("mode", None, f"What to run, in order: {', '.join(MODES)}.")
WORKDIR = flags.DEFINE_string("workdir", None, "Where results go; default runs/<config's name>.")
SOURCE: flags.FlagHolder[str | None] = flags.DEFINE_string(
    "source", None, "What --mode=convert reads: a folder of the authors'."
)
COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "Several processes: process 0's host:port, or auto (TPU pods, Slurm ...)."
)
PROCESSES = flags.DEFINE_integer("num_processes", None, "How many, unless --coordinator=auto.")
PROCESS = flags.DEFINE_integer("process_id", None, "Which this is, unless --coordinator=auto.")


def parse(arguments: list[str]) -> list[str]:
    """Parse the command line; an unknown field of the config is an error that lists the fields."""
    try:
        return app.parse_flags_with_usage(arguments)
    except (AttributeError, KeyError):
        given = next(a.partition("=")[2] for a in arguments if a.startswith("--config="))
        path, _, argument = given.partition(":")
        try:
            get_config = runpy.run_path(path)["get_config"]
            check_overrides(get_config(argument) if argument else get_config(), arguments)
        except ValueError as error:
            sys.exit(str(error))
        raise


def run_name(config: str) -> str:
    """configs/a.py is the run ``a``, configs/a.py:b, a config with an argument, ``a_b``."""
    return pathlib.Path(config).name.replace(".py", "").replace(":", "_")


def main(arguments: Sequence[str]) -> None:
    """Run the modes in order."""
    if len(arguments) > 1:
        raise app.UsageError(f"unknown: {arguments[1:]}; set fields as --config.field=value")
    if MODE.value == ["verify"]:  # The one mode that no config changes.
        return verify.run()
    if CONFIG.value is None:
        raise app.UsageError(
            "--config=configs/<name>.py says what to run; without it, --mode=verify"
        )
    modes = MODE.value or list(CONFIG.value.mode)
    unknown = [mode for mode in modes if mode not in MODES]
    if unknown:
        raise app.UsageError(f"unknown mode {unknown}; choose from {', '.join(MODES)}")
    if COORDINATOR.value:
        address = None if COORDINATOR.value == "auto" else COORDINATOR.value
        jax.distributed.initialize(address, PROCESSES.value, PROCESS.value)
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # The libraries' own chatter drowns the bars.
    name = run_name(config_flags.get_config_filename(flags.FLAGS["config"]))
    workdir = epath.Path(WORKDIR.value or f"runs/{name}")
    workdir.mkdir(parents=True, exist_ok=True)
    print(f"{', '.join(modes)} in {workdir}")
    for mode in modes:
        MODES[mode](architecture.of_workdir(CONFIG.value, workdir), workdir)


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
