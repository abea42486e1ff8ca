"""The file ``images.sbml``: how images were coded, and the stack of each lane.

    bytes 0-3    "SBML"
    bytes 4-7    length of the header, uint32
    bytes 8-11   CRC32 of the header, uint32
    header       one JSON object (:class:`Header`)
    payload      the words of all stacks, uint32, one stack after the other

All integers are little-endian. The header does not contain the weights: a decoder needs the same
checkpoint, and the same versions and kind of processor, because it must repeat the outputs of the
network to the last bit. ``Header.made_by`` says which these are.
"""

import json
import struct
import zlib
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from sbml.codec import bits_back
from sbml.codec.bits_back import Codec, CodedFileError, State

MAGIC = b"SBML"
HEAD = struct.Struct("<4sII")

Word = Annotated[int, Field(ge=0, lt=2**32)]
Size = Annotated[int, Field(ge=1, lt=2**31)]


class DamagedStacksError(CodedFileError):
    """A file of which some stacks are damaged.

    Attributes:
      pixels: all images ``(n, *shape)``, of which those of the damaged stacks are wrong.
      lost: the numbers of these images.
    """

    def __init__(self, pixels: np.ndarray, lanes: int, damaged: list[int]) -> None:
        self.pixels = pixels
        self.lost = np.flatnonzero(np.isin(np.arange(len(pixels)) % lanes, damaged))
        stacks = ", ".join(map(str, damaged))
        super().__init__(
            f"the lanes {stacks} of {lanes} are damaged: {len(pixels) - len(self.lost)} of "
            f"{len(pixels)} images were restored. Image number i is in the lane i % {lanes}; take "
            "another copy of the file"
        )


class Header(BaseModel):
    """What a decoder must know.

    Attributes:
      format: the version of the format.
      count: the number of images.
      shape: the shape of an image.
      levels: the number of levels of a pixel.
      data: where the model's data lie in their bins (``bits_back.Codec``).
      steps: the number of steps of the chain.
      eps: its smallest time.
      errors: 256 m - 1/2 rounded to integers, in equal bins of log-SNR (``codec.chain``).
      made_by: what the decoder must have too, by name: checksums of weights, settings of the score,
        schedule and arithmetic, versions, and the kind of processor.
      words: the number of words of each stack.
      crc32: the CRC32 of each stack.
      pixels_crc32: the CRC32 of all images.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format: Literal[1] = 1
    count: Size
    shape: Annotated[list[Size], Field(min_length=1, max_length=8)]
    levels: Annotated[int, Field(ge=2, le=256)]
    data: Literal["centre", "uniform"]
    steps: Size
    eps: Annotated[float, Field(ge=0, lt=1e6)]
    errors: Annotated[list[Annotated[int, Field(ge=0, le=255)]], Field(max_length=2**16)]
    made_by: dict[str, str]
    words: Annotated[list[Size], Field(min_length=1, max_length=2**16)]
    crc32: list[Word]
    pixels_crc32: Word

    @model_validator(mode="after")
    def check(self) -> "Header":
        """Check that there is a checksum of each stack."""
        if len(self.crc32) != len(self.words):
            raise ValueError(f"{len(self.crc32)} checksums for {len(self.words)} stacks")
        return self

    @property
    def lanes(self) -> int:
        """The number of stacks."""
        return len(self.words)

    @property
    def shares(self) -> tuple[float, ...]:
        """m in equal bins of log-SNR."""
        return tuple((q + 0.5) / 256 for q in self.errors)

    def check_codec(self, codec: Codec) -> None:
        """Raise a CodedFileError unless ``codec`` is that of the encoder."""
        here = {**_settings(codec), "lanes": codec.lanes, **codec.made_by}
        there = {**self.model_dump(), "lanes": self.lanes, **self.made_by}
        others = [f"{n} {there.get(n)}, here {here[n]}" for n in here if here[n] != there.get(n)]
        if others:
            raise CodedFileError(
                f"the file was made with {'; '.join(others)}: it can only be decoded by the same "
                "model, with the same versions, on the same kind of machine"
            )

    def restored(self, codec: Codec, state: State) -> np.ndarray:
        """The images of a decoding that ended with ``state``.

        Raises:
          DamagedStacksError: some stacks are missing or did not end as they began.
          CodedFileError: the images are not those that were encoded.
        """
        # A stack of which all images are decoded has its initial words again.
        ends = [np.array_equal(words, codec.start(i)) for i, words in enumerate(state.stacks)]
        if damaged := [lane for lane, good in enumerate(ends) if not good]:
            raise DamagedStacksError(state.pixels, self.lanes, damaged)
        if zlib.crc32(np.ascontiguousarray(state.pixels)) != self.pixels_crc32:
            raise CodedFileError("the restored images are not those that were encoded")
        return state.pixels


def as_integers(errors: Sequence[float]) -> list[int]:
    """Numbers m in (0, 1) as the integers 0 .. 255 of the header, where m = (q + 1/2) / 256."""
    return [min(255, max(0, round(256 * m - 0.5))) for m in errors]


def _settings(codec: Codec) -> dict[str, Any]:
    """The fields of the header that a codec determines."""
    return {
        "shape": list(codec.shape),
        "levels": codec.levels,
        "data": codec.data,
        "steps": codec.chain.steps,
        "eps": float(codec.chain.eps),
        "errors": as_integers(codec.chain.errors),
    }


def to_bytes(header: Header, stacks: list[np.ndarray]) -> bytes:
    """The content of the file; ``stacks`` are the words of each, uint32 ``(n,)``."""
    text = json.dumps(header.model_dump(), separators=(",", ":")).encode()
    payload = b"".join(words.astype("<u4").tobytes() for words in stacks)
    return HEAD.pack(MAGIC, len(text), zlib.crc32(text)) + text + payload


def packed(codec: Codec, pixels: np.ndarray, state: State) -> tuple[Header, bytes]:
    """The file of ``pixels``, whose encoding ended with ``state``."""
    header = Header(
        count=len(pixels),
        **_settings(codec),
        made_by=codec.made_by,
        words=[len(words) for words in state.stacks],
        crc32=[zlib.crc32(words.astype("<u4").tobytes()) for words in state.stacks],
        pixels_crc32=zlib.crc32(np.ascontiguousarray(pixels, np.uint8)),
    )
    return header, to_bytes(header, state.stacks)


def compress(codec: Codec, pixels: np.ndarray) -> bytes:
    """Compress integer images ``pixels (n, *shape)``, 0 .. levels - 1; returns the file's bytes."""
    state = bits_back.first_state(codec)
    for after in bits_back.encode(codec, pixels, state):
        state = after
    return packed(codec, pixels, state)[1]


def decompress(codec: Codec, content: bytes) -> np.ndarray:
    """Restore the images, uint8 ``(n, *shape)``, from the bytes that :func:`compress` returned.

    Raises:
      CodedFileError: the file is damaged, or was made by another codec or machine.
    """
    header, stacks = from_bytes(content)
    header.check_codec(codec)
    state = bits_back.last_state(codec, header.count, stacks)
    for after in bits_back.decode(codec, header.count, state):
        state = after
    return header.restored(codec, state)


def from_bytes(content: bytes, name: str = "the file") -> tuple[Header, list[np.ndarray | None]]:
    """The header, and the words of each stack; None for a stack that is damaged or missing.

    Raises:
      CodedFileError: ``content`` is no such file, or its header or every stack is damaged.
    """
    if len(content) < HEAD.size or content[:4] != MAGIC:
        raise CodedFileError(f"{name} is no file of --mode=compress: it does not begin with SBML")
    _, length, checksum = HEAD.unpack_from(content)
    text = content[HEAD.size : HEAD.size + length]
    if len(text) < length or zlib.crc32(text) != checksum:
        raise CodedFileError(f"{name}: the header is damaged, so no image can be restored")
    try:
        header = Header.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "header"
        raise CodedFileError(
            f"{name}: {where}: {first['msg']}: the file was made by another version of sbml"
        ) from None
    position, stacks = HEAD.size + length, list[np.ndarray | None]()
    for size, expected in zip(header.words, header.crc32, strict=True):
        part = content[position : position + 4 * size]
        position += 4 * size
        whole = len(part) == 4 * size and zlib.crc32(part) == expected and part[-4:] != bytes(4)
        stacks.append(np.frombuffer(part, "<u4") if whole else None)
    if position < len(content):
        raise CodedFileError(f"{name} has {len(content) - position} bytes after its last stack")
    if all(words is None for words in stacks):
        raise CodedFileError(
            f"{name}: the header is whole, but all {len(stacks)} lanes are damaged or missing, so "
            "no image can be restored: take another copy of the file"
        )
    return header, stacks
