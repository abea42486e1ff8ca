"""A lossless codec for images, whose code length is the bound of a diffusion model.

    codec = Codec(score, Chain(sde, eps=1e-3, steps=250), shape=(8, 8, 1), levels=17)
    content = compress(codec, pixels)           bytes: the length of the bound, plus initial bits
    pixels = decompress(codec, content)         the same images, to the last bit

``codec.chain`` has the mathematics, ``codec.bits_back`` the coding of images in a stack of bits,
and ``codec.file`` the format of the file.

May import: core, likelihood, sdes.
"""

from sbml.codec.bits_back import Codec as Codec
from sbml.codec.chain import Chain as Chain
from sbml.codec.file import CodedFileError as CodedFileError
from sbml.codec.file import compress as compress
from sbml.codec.file import decompress as decompress
