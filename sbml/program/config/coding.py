"""``config.codec``: how ``--mode=compress`` codes images (``sbml.codec``)."""

from typing import ClassVar

from sbml.program.config.fields import Natural, PositiveSize, Section, field
from sbml.program.config.sampling import Steps


class Coding(Section):
    """Settings of ``--mode=compress``, which codes images of ``eval.split`` without loss."""

    section: ClassVar[str] = "codec"

    steps: Steps = field(
        250,
        "number of steps of the diffusion chain; more steps give a smaller file and take longer",
    )
    lanes: PositiveSize = field(
        8,
        "number of images that are coded at once; each of these lanes needs initial bits, which "
        "make the file longer",
    )
    num_images: Natural = field(0, "size of a random sample of images; 0: all")
