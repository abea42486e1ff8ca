"""python -m sbml.main --config=configs/digits_vp.py [--mode=train,eval,sample] [--workdir=DIR]"""

import pathlib
from collections.abc import Sequence

import jax
from absl import app, flags, logging
from etils import epath
from ml_collections import config_flags

from sbml import evaluate, sample, train

MODES = {"train": train.run, "eval": evaluate.run, "sample": sample.run}

CONFIG = config_flags.DEFINE_config_file("config", None, "Config file; any field of it can be set.")
MODE = flags.DEFINE_list("mode", None, f"What to run, in order: {', '.join(MODES)}.")
WORKDIR = flags.DEFINE_string("workdir", None, "Where results go; default runs/<config's name>.")
DISTRIBUTED = flags.DEFINE_bool("distributed", False, "One of several processes (see README).")
flags.mark_flag_as_required("config")


def main(argv: Sequence[str]) -> None:
    """Run the modes in order."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {argv[1:]}; fields are set as --config.field=value")
    config = CONFIG.value
    modes = MODE.value or list(config.mode)
    unknown = [mode for mode in modes if mode not in MODES]
    if unknown:
        raise app.UsageError(f"unknown mode {unknown}; choose from {list(MODES)}")
    if DISTRIBUTED.value:
        jax.distributed.initialize()
    name = pathlib.Path(config_flags.get_config_filename(flags.FLAGS["config"])).stem
    workdir = epath.Path(WORKDIR.value or f"runs/{name}")
    workdir.mkdir(parents=True, exist_ok=True)
    logging.info("%s in %s", ", ".join(modes), workdir)
    for mode in modes:
        MODES[mode](config, workdir)


if __name__ == "__main__":
    app.run(main)
