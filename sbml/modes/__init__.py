"""The modes of the program (``--mode``), by name. A mode is a function; its parameters say what it
uses:

    experiment     the objects of the config (``sbml.experiment.build``)
    config         the config alone, for a mode that works before there is a fitting model
    workdir        the folder of the run (``sbml.runtime.workdir``)
    others         flags of the command line, such as ``source`` for ``--source=DIR``. Their values
                   are texts, and a flag without a default must be given.

A mode that cannot work raises a ValueError, which the program shows in one line. A function
``check(experiment, workdir, before)`` beside it raises one if the mode cannot work after the modes
``before``. It is called before the first mode runs, but after a mode without ``experiment``,
because that mode makes the model. ``--mode`` also takes a function of another package, as
``package.module:function``. Files whose names begin with an underscore are parts that several
modes share.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from sbml.experiment.build import Experiment
from sbml.experiment.config import Config
from sbml.experiment.trained import of_workdir
from sbml.registry import Registry
from sbml.runtime.workdir import Workdir

Mode = Callable[..., None]
GIVEN = ("experiment", "config", "workdir")  # The other parameters of a mode are flags.

MODES = Registry(
    "mode",
    {
        name: f"sbml.modes.{name}:run"
        for name in (
            *(
                "audit",
                "compare",
                "compress",
                "convert",
                "decompress",
                "eval",
                "latents",
                "quality",
            ),
            *("report", "sample", "stats", "table", "train", "train_dequantizer", "verify"),
        )
    },
)


def parameters_of(mode: Mode) -> set[str]:
    """The names of the parameters of a mode."""
    return set(inspect.signature(mode).parameters)


def execute(
    mode: Mode, config: Config | None, workdir: Workdir | None, flags: Mapping[str, str]
) -> None:
    """Run a mode with what its parameters ask for."""
    wanted = parameters_of(mode)
    given: dict[str, Any] = {"config": config, "workdir": workdir, **flags}
    if "experiment" in wanted and config is not None and workdir is not None:
        given["experiment"] = Experiment(of_workdir(config, workdir))
    mode(**{name: value for name, value in given.items() if name in wanted})
