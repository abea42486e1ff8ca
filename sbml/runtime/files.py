"""Files that are whole or not there: written beside their place, then renamed into it."""

from etils import epath


def write_whole(path: epath.PathLike, content: bytes) -> None:
    """Write ``content`` to ``path``; a process killed meanwhile leaves the old file, if any."""
    path = epath.Path(path)
    if "://" in str(path):  # An object store shows only whole writes; its rename is a copy.
        path.write_bytes(content)
        return
    partial = path.parent / f".{path.name}.partial"
    partial.write_bytes(content)
    partial.replace(path)
