"""The config of a run that exists: ``--workdir`` alone is enough to evaluate or sample it.

A config file like those of ``configs/``, whose argument is the work directory:
``sbml/experiment/stored.py:runs/digits_vp``. The program takes it where --config is left out.
"""

from typing import Any

from ml_collections import ConfigDict

from sbml.experiment.config import default
from sbml.experiment.fields import as_tuples
from sbml.experiment.training import Training
from sbml.runtime.workdir import Workdir


def get_config(workdir: str) -> ConfigDict:
    """The config in the newest checkpoint of ``workdir``, to be changed.

    A field that the checkpoint's version did not have takes its default.

    Raises:
      ValueError: without a checkpoint, or for one with a field that this version does not have.
    """
    checkpoints = Training().checkpoints(Workdir(workdir))
    metadata = checkpoints.metadata()
    if metadata is None:
        raise ValueError(
            f"no checkpoint in {checkpoints.directory} to take the config from: give --config"
        )
    trained = metadata["config"]
    config = default(trained["model"]["name"])
    with config.unlocked():
        _lay_over(config, trained, "config")
    return config


def _lay_over(node: ConfigDict, values: dict[str, Any], name: str) -> None:
    for field, value in values.items():
        if field not in node:
            raise ValueError(
                f"the checkpoint has a field {name}.{field}, which this version of sbml does not "
                "have: update sbml, or give --config"
            )
        if isinstance(value, dict):
            _lay_over(node[field], value, f"{name}.{field}")
        else:
            node[field] = as_tuples(value)
