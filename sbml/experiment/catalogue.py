"""The config files of the package by name: ``digits_vp`` is the file ``configs/digits_vp.py``."""

import pathlib

_PACKAGE = pathlib.Path(__file__).parents[1]


def folder() -> pathlib.Path:
    """The folder ``configs``: in the package once it is installed, beside it in a checkout."""
    installed = _PACKAGE / "configs"
    return installed if installed.is_dir() else _PACKAGE.with_name("configs")


def path_of(config: str) -> str:
    """``config`` with the name of a config replaced by its path: the value of --config for absl.

    ``config`` is a name or a path, or either followed by ``:argument``. If it contains a folder or
    a file ending it is a path, and is not changed. The same holds if there is a file of that name,
    or if there is a folder of that name and no such config.

    Raises:
      ValueError: no config has this name; the message lists the names.
    """
    name, colon, argument = config.partition(":")
    path = pathlib.Path(name)
    if path.is_file() or name != path.stem:
        return config
    paths = {file.stem: file for file in sorted(folder().glob("*.py"))}
    if name not in paths and path.is_dir():
        return config
    if name not in paths:
        raise ValueError(
            f"--config={config}: no config has the name {name!r}; choose from {', '.join(paths)}, "
            "or give the path of a file"
        )
    return f"{paths[name]}{colon}{argument}"
