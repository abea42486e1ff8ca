"""The modes of the program (``--mode``), by name. A mode is a function; its parameters say what it
uses:

    trained        the trained model in the work directory (``sbml.program.config.trained``)
    experiment     the objects of the config (``sbml.program.config.build``), to train a model
    config         the config alone, for a mode that works before there is a fitting model
    workdir        the folder of the run (``program.runtime.workdir``)
    preemption     the request to save and stop (``program.runtime.preemption``); without it, Ctrl-C
                   ends the mode at once
    others         flags of the command line, such as ``source`` for ``--source=DIR``. Their values
                   are texts, and a flag without a default must be given.

A mode returns the work directory in which it left results for the report, or None. A mode that
cannot work raises a ValueError, which the program shows in one line. A function
``check(experiment, workdir, before)`` beside it raises one if it cannot work after the modes
``before``. It is called before the first mode runs. There is one exception: a mode without
``experiment`` and ``trained``, such as a conversion, makes the model of the later modes, which are
checked after it.
``--mode`` also takes a function of another package, as ``package.module:function``. Files whose
names begin with an underscore are parts that several modes share; ``_runner`` says what is done for
every mode.
"""

import ast
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sbml.core.registry import Registry
from sbml.program.runtime.workdir import Workdir

Mode = Callable[..., Workdir | None]
OF_CONFIG = {"trained", "experiment", "config"}  # what needs a config
GIVEN = {*OF_CONFIG, "workdir", "preemption"}  # The other parameters of a mode are flags.

MODES = Registry(
    "mode",
    {
        name: f"sbml.program.modes.{name}:run"
        # in the order of their use
        for name in """
            train train_dequantizer convert eval sample stats quality latents report compare
            compress decompress table verify audit
        """.split()
    },
    Callable,
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


def run(names: str, config: Any, workdir: str, **flags: str) -> None:
    """Run modes in Python, as ``--mode`` does: ``run("train,eval", config, "runs/mine")``.

    Args:
      names: the names of the modes, with commas between them.
      config: a ConfigDict, such as a file of ``configs/`` makes.
      workdir: the folder of the run.
      flags: the flags of these modes.
    """
    from sbml.program.config.config import Config
    from sbml.program.modes._runner import Command

    chosen = {name: MODES[name] for name in names.split(",")}
    Command(Config(**config.to_dict()), Workdir(workdir), flags).execute(chosen)


def parameters_of(mode: Mode) -> set[str]:
    """The names of the parameters of a mode."""
    try:
        return set(inspect.signature(mode).parameters)
    except ValueError:
        raise ValueError(f"mode {mode}: give a function whose parameters Python can tell") from None
