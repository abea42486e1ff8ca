"""Files that are whole or not there: written beside their place, then renamed into it."""

import uuid

from etils import epath


def write_whole(path: epath.PathLike, content: bytes) -> None:
    """Write ``content`` to ``path``; a process killed meanwhile leaves the old file, if any."""
    path = epath.Path(path)
    if "://" in str(path):  # An object store shows only whole writes; its rename is a copy.
        path.write_bytes(content)
        return
    # Several processes may write the same file at once: each beside it, under a name of its own.
    partial = path.parent / f".{path.name}.{uuid.uuid4().hex}.partial"
    partial.write_bytes(content)
    partial.replace(path)
