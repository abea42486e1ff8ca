"""The density of a trained model: ``sbml.load("runs/digits_vp")``."""

import tempfile
from collections.abc import Iterable

from etils import epath
from ml_collections import ConfigDict

from sbml.density import Density
from sbml.program.config import config as configs
from sbml.program.config.config import Config
from sbml.program.config.trained import of_run
from sbml.program.config.training import Training
from sbml.program.convert import convert, diffusers
from sbml.program.runtime.workdir import Workdir


def load(
    folder: epath.PathLike, *, trust: Iterable[str] = (), config: str | ConfigDict | None = None
) -> Density:
    """The density of the trained model in ``folder``, of its newest checkpoint.

        density = sbml.load("runs/digits_vp")
        density.bits_per_dim(images), density.sample(key, 16), density.log_prob(x)

    The settings are those of ``--mode=eval``, so the numbers are the same. A model with classes has
    their names, ``density.classes``. The density of a table is that of rows in the units of the
    file, by the checkpoint that fits the validation rows best.

    Args:
      folder: the work directory of a run, or a model of other code that ``--mode=convert`` reads.
      trust: names ``package.module:Name`` of parts of other packages, or whole packages, whose code
        may run because the run uses them; and paths that may be read because it names them.
      config: for a model of other code, a config of its network and data, or the name of one in
        ``configs/``. A folder of diffusers describes itself.

    Raises:
      ValueError: there is no such checkpoint, or it is damaged.
      PermissionError: the run uses a part of another package, or a path, that is not in ``trust``.
    """
    workdir = Workdir(folder).connect()
    if Training().checkpoints(workdir).metadata() is not None:
        return of_run(workdir, trust)
    given = configs.load(config) if isinstance(config, str) else config
    if given is None and diffusers.recognises(folder):
        given = diffusers.config_of(folder)
    if given is None:
        raise ValueError(
            f"no checkpoint in {workdir}: give the work directory of a run, a folder of diffusers, "
            "or, with config=NAME, one of Song et al.'s or VDM's code"
        )
    with tempfile.TemporaryDirectory() as converted:
        convert(Config(**given.to_dict()), Workdir(converted), folder)
        return of_run(Workdir(converted), trust)
