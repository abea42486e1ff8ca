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

import ast
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sbml.experiment.build import Experiment
from sbml.experiment.compatibility import of_workdir
from sbml.experiment.config import Config
from sbml.registry import Registry
from sbml.runtime.workdir import Workdir

Mode = Callable[..., None]
GIVEN = ("experiment", "config", "workdir")  # The other parameters of a mode are flags.

MODES = Registry(
    "mode",
    {
        name: f"sbml.modes.{name}:run"
        for name in (  # in the order of their use
            *("train", "train_dequantizer", "convert", "eval", "sample", "stats", "quality"),
            *("latents", "report", "compare", "compress", "decompress", "table"),
            *("verify", "audit"),
        )
    },
)


def overview() -> list[tuple[str, str]]:
    """The flags of each mode and what it does, from the first paragraph of its file's docstring:
    "What it does: ``--mode=...``." No mode is imported, which would take seconds."""
    lines = []
    for name in MODES:
        source = Path(__file__).with_name(f"{name}.py").read_text()
        about = " ".join((ast.get_docstring(ast.parse(source)) or "").partition("\n\n")[0].split())
        meaning, _, flags = about.removesuffix("``.").rpartition(": ``")
        lines.append((flags, f"{meaning}."))
    return lines


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
