"""The config files that come with the package, by name: ``digits_vp`` is configs/digits_vp.py."""

import pathlib

_PACKAGE = pathlib.Path(__file__).parents[1]


def folder() -> pathlib.Path:
    """The folder ``configs``: in the package once it is installed, beside it in a checkout."""
    installed = _PACKAGE / "configs"
    return installed if installed.is_dir() else _PACKAGE.with_name("configs")


def path_of(config: str) -> str:
    """The value of --config for absl: ``name`` or ``name:argument`` with the path for the name.

    A file that exists comes before a name, and a name before a folder of that name. What has a
    folder or an ending is a path, and stays.

    Raises:
      ValueError: for a name that no config has.
    """
    name, colon, argument = config.partition(":")
    path = pathlib.Path(name)
    if path.is_file() or name != path.stem:
        return config
    known = {file.stem: file for file in sorted(folder().glob("*.py"))}
    if name not in known and path.is_dir():
        return config
    if name not in known:
        raise ValueError(
            f"--config={config}: no config has the name {name!r}; choose from {', '.join(known)}, "
            "or give the path of a file"
        )
    return f"{known[name]}{colon}{argument}"
