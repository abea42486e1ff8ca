"""The config of a trained run, read from its checkpoint, so that ``--config`` can be left out.

This is a config file like those in ``configs/``. Its argument is the work directory:
``sbml/experiment/stored.py:runs/digits_vp``. If ``--workdir`` is given without ``--config`` and has
checkpoints, the program uses this config file.
"""

from typing import Any

from ml_collections import ConfigDict

from sbml.experiment.config import default
from sbml.experiment.fields import as_tuples
from sbml.experiment.training import Training
from sbml.runtime.workdir import Workdir


def get_config(workdir: str) -> ConfigDict:
    """The config in the newest checkpoint of ``workdir``, which users may change.

    A field that the checkpoint lacks, because it was written by an older version, has its default.

    Raises:
      ValueError: there is no checkpoint, or it has a field that this version does not have.
    """
    checkpoints = Training().checkpoints(Workdir(workdir))
    metadata = checkpoints.metadata()
    if metadata is None:
        raise ValueError(
            f"no checkpoint in {checkpoints.directory} to take the config from: give --config"
        )
    trained = metadata["config"]
    config = default(
        trained["model"]["name"], trained.get("dequantizer", {}).get("name", "variational")
    )
    with config.unlocked():
        _update(config, trained, "config")
    return config


def _update(node: ConfigDict, values: dict[str, Any], name: str) -> None:
    for field, value in values.items():
        if field not in node:
            raise ValueError(
                f"the checkpoint has a field {name}.{field}, which this version of sbml does not "
                "have: install the version that wrote the checkpoint, or give --config"
            )
        if isinstance(value, dict):
            _update(node[field], value, f"{name}.{field}")
        else:
            node[field] = as_tuples(value)
