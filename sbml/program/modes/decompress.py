"""Restores the images of a file: ``--mode=decompress [--source=FILE] [--to=FOLDER]``."""

import time
from pathlib import Path

import numpy as np
from absl import logging

from sbml.codec import Chain, bits_back, file
from sbml.codec.file import CodedFileError, DamagedStacksError
from sbml.core.progress import Bar
from sbml.program.config.trained import Trained
from sbml.program.evaluation import coding
from sbml.program.modes.compress import check as check
from sbml.program.runtime.parts import Resumable
from sbml.program.runtime.preemption import Preemption
from sbml.program.runtime.workdir import CODEC, IMAGES, RESTORED, Workdir


def run(trained: Trained, preemption: Preemption, source: str = "", to: str = "") -> Workdir:
    """Restore the images of the file ``source`` with the model that coded them.

    Without ``source``, the file is ``images.sbml`` of the work directory.

    Writes ``restored.npz``, or PNG files to the folder ``to``. A killed run continues after its
    last stored round. If some lanes of the file are damaged, the images of the others are written.
    """
    experiment, workdir, start = trained.experiment, trained.workdir, time.perf_counter()
    path = Path(source) if source else workdir / IMAGES
    if not path.exists():
        raise ValueError(f"no file {path}: make it first (--mode=compress), or give --source=FILE")
    content = path.read_bytes()
    header, stacks = file.from_bytes(content, str(path))
    channels = experiment.shape[-1]
    if to and channels != 1 and (channels, experiment.levels) != (3, 256):
        raise ValueError(f"--to={to}: PNG files cannot hold such images; leave it out")
    if to and (there := [p for p in coding.files_of(Path(to), header.count) if p.exists()]):
        raise ValueError(f"{there[0]} exists, and would be overwritten: give --to=NEW_FOLDER")
    chain = Chain(experiment.sde, header.eps, header.steps, header.shares)
    codec = coding.codec_of(trained, chain, header.lanes)
    header.check_codec(codec)
    # Another copy of the file may have stacks that are missing in this one.
    missing = [lane for lane, words in enumerate(stacks) if words is None]
    identity = {**header.model_dump(), "missing": missing}
    resumable = Resumable(workdir / "codec", "decode", identity, preemption)
    state = bits_back.last_state(codec, header.count, stacks)._replace(**resumable.load())
    with Bar("decompress", "image", header.count, len(state.pixels)) as bar:
        for after in bits_back.decode(codec, header.count, state):
            state = after
            bar.update(len(state.pixels) - bar.n)
            resumable.store(state._asdict())
    damaged: CodedFileError | None = None
    pixels, ids = state.pixels, np.arange(header.count)
    try:
        header.restored(codec, state)
    except DamagedStacksError as error:
        damaged, ids = error, np.setdiff1d(ids, error.lost)
    if to:
        coding.write_folder(Path(to), pixels, ids, header.levels)
    else:
        workdir.write(RESTORED, {"id": ids, "images": pixels[ids]})
    resumable.remove()
    where = to or workdir / RESTORED
    if damaged:
        logging.warning("%d images are in %s", len(ids), where)
        raise damaged
    size = 8 * len(content) / pixels.size if not source else 0.0
    if not source and workdir.has(CODEC):
        workdir.write(CODEC, {**workdir.read(CODEC), "restored": len(ids)})
    print(
        f"compressed and restored: {len(ids)} of {header.count} images"
        + (f", {size:.4f} bits/dim on disk" if size else "")
        + f": {where}, in {time.perf_counter() - start:.0f} s"
    )
    return workdir
