"""The files that a report shows, and the checks that they belong together.

A table belongs to one evaluation, the samples and the coded images to one checkpoint, and their
quality to the samples. The modes write these files at different times, so some may be of others.
"""

import zlib
from collections.abc import Mapping

from absl import logging

from sbml.core.types import Json
from sbml.program.runtime.trees import table_crc32, tree_crc32
from sbml.program.runtime.workdir import (
    CODEC,
    EVALUATION,
    NEIGHBOURS,
    PER_IMAGE,
    QUALITY,
    SAMPLES,
    Workdir,
)


class OtherEvaluation(ValueError):
    """A table of the work directory is not that of its evaluation."""


class Stored:
    """What the modes have written in ``workdir``.

    Attributes:
      evaluation: the content of ``evaluation.json``; empty if there is none.
      of_training: that of the training images, which ``train/evaluation.json`` holds.
      drawn_at: the step of the checkpoint of ``samples.npz``; None if there are no samples.
    """

    def __init__(self, workdir: Workdir) -> None:
        self.workdir = workdir
        names = EVALUATION, PER_IMAGE, CODEC, SAMPLES, QUALITY
        self._files = {name: workdir.read(name) for name in names if workdir.has(name)}
        self.evaluation: Json = self._files.get(EVALUATION, {})
        train = Workdir(workdir / "train")
        self.of_training: Json = train.read(EVALUATION) if train.has(EVALUATION) else {}
        self.drawn_at = int(self._files[SAMPLES]["step"]) if SAMPLES in self._files else None
        self._neighbours = workdir.read_png(NEIGHBOURS) if workdir.has(NEIGHBOURS) else b""

    def table(self, name: str = PER_IMAGE) -> Json:
        """The columns of the table ``name`` of the evaluation.

        Raises:
          OtherEvaluation: the table is of a later evaluation, which was interrupted.
          ValueError: the file is damaged or missing.
        """
        columns = self._files.get(name) or self.workdir.read(name)
        if self.evaluation.get("tables", {}).get(name) in (None, table_crc32(columns)):
            return columns
        raise OtherEvaluation(
            f"{self.workdir / name} is not that of {EVALUATION}, because a later evaluation was "
            "interrupted while it wrote its files: evaluate again "
            f"(--workdir={self.workdir} --mode=eval)"
        )

    def codec(self, checkpoint: Mapping[str, int]) -> Json | None:
        """The content of ``codec.json`` of a ``checkpoint``, as for :meth:`samples`."""
        parameters = {name: crc32 for name, crc32 in checkpoint.items() if name != "step"}
        return self._of(CODEC, parameters, "another checkpoint")

    def samples(self, checkpoint: Mapping[str, int]) -> tuple[Json | None, Json | None]:
        """The arrays of ``samples.npz`` of a ``checkpoint``, and the content of ``quality.json`` of
        these samples; None for a file that is missing or, with a warning, of another origin.

        Args:
          checkpoint: its step and the CRC-32 of its parameters; empty if any checkpoint will do.
        """
        if (samples := self._of(SAMPLES, checkpoint, "another checkpoint")) is None:
            return None, None
        drawn = {"images_crc32": tree_crc32(samples["images"])}
        return samples, self._of(QUALITY, drawn, "other samples")

    def neighbours(self, quality: Json) -> bytes:
        """The picture ``neighbours.png`` of a ``quality``; with a warning, b"" if it is missing or
        of another one."""
        crc32 = zlib.crc32(self._neighbours)
        if self._neighbours and quality.get("neighbours_crc32", crc32) == crc32:
            return self._neighbours
        about = f"{self.workdir / NEIGHBOURS} is not that of {QUALITY}"
        logging.warning(f"{about}: left out; make it again (--mode=quality)")
        return b""

    def _of(self, name: str, origin: Mapping[str, int], other: str) -> Json | None:
        if (found := self._files.get(name)) is None:
            return None
        if any(int(found.get(key, -1)) != value for key, value in origin.items()):
            step = f", of step {int(found['step'])}," if "step" in found else ""
            logging.warning("%s%s is of %s: left out", self.workdir / name, step, other)
            return None
        return found
