"""The codec of a trained model, the images that it codes, and the bound in the codec's steps."""

import dataclasses
import zlib
from pathlib import Path

import jax
import numpy as np
from PIL import ExifTags, Image

from sbml.codec import Chain, Codec
from sbml.codec.chain import pilot
from sbml.codec.file import as_integers
from sbml.core import bits
from sbml.core.streams import stream
from sbml.core.types import optional
from sbml.data import spread
from sbml.data.image_folder import check_opened, printable, special
from sbml.density.estimators.base import Target
from sbml.density.estimators.bound import InSteps
from sbml.density.measurement import Measurement
from sbml.program.config.trained import Trained
from sbml.program.evaluation.cells import Evaluation


def codec_of(trained: Trained, chain: Chain, lanes: int) -> Codec:
    """The codec of a model."""
    experiment = trained.experiment
    shape, levels, kind = experiment.shape, experiment.levels, experiment.config.data.kind
    settings = zlib.crc32(repr(trained.about["score"]).encode())
    identity = {"weights": f"{trained.parameters_crc32:08x}", "score": f"{settings:08x}"}
    return Codec(trained.score, chain, shape, levels, kind, lanes, identity)


def encoder_chain(evaluation: Evaluation) -> Chain:
    """A chain of ``config.codec.steps`` steps.

    Its times and variances follow from the errors of the noise prediction on up to 256 training
    images. The errors are rounded as in the header of a file, so that a decoder has the same
    chain.
    """
    experiment, train = evaluation.experiment, evaluation.train
    centre = experiment.config.data.kind == "centre"
    eps = experiment.discrete_eps if centre else experiment.eval_eps  # that of the bound
    images = train.images[spread(len(train), 256)]
    x = bits.to_model(jax.numpy.asarray(images), 0.5, train.levels)
    key = stream(jax.random.key(experiment.config.eval.seed), "pilot")
    run = jax.jit(lambda score, x, key: pilot(score, experiment.sde, x, key, eps=eps))
    found = np.asarray(run(evaluation.trained.score, x, key))
    errors = [(q + 0.5) / 256 for q in as_integers(found.tolist())]
    return Chain(experiment.sde, eps, experiment.config.codec.steps, tuple(errors))


def bound_of(evaluation: Evaluation, codec: Codec, pixels: np.ndarray) -> Measurement:
    """The measurement of the bound on -log2 P of ``pixels (n, *shape)`` in bits/dim, in the steps
    of ``codec``, by the functions of an evaluation."""
    experiment, config = evaluation.experiment, evaluation.experiment.config.eval.bound
    name, eps = "uniform", codec.chain.eps
    if codec.data == "centre":
        name = "learned" if optional(codec.score, "decoder_log_p") else "categorical"
    dequantizer = experiment.dequantizer(name)  # It has no parameters.
    target = Target(experiment.sde, eps, experiment.levels, dequantizer)
    times, reduction = max(config.n_times, 4), evaluation.reduction(eps)
    estimator = InSteps(times, reduction=reduction, steps=codec.chain.as_steps)
    run = evaluation.measurement(estimator, target, pixels, {})
    title = f"bound in {codec.chain.steps} steps"
    return dataclasses.replace(run, sweeps=config.sweeps, progress=title)


def lengths(codec: Codec, words: int, size: int, dims: int) -> dict[str, float]:
    """The parts of the length of a file of ``size`` bytes in bits/dim, for images with ``dims``
    entries together, whose stacks have ``words`` words of 32 bits."""
    bits, payload, initial = 8 * size, 32 * words, 32 * codec.initial_words * codec.lanes
    return {
        "disk": bits / dims,
        "net": (payload - initial) / dims,
        "initial": initial / dims,
        "header": (bits - payload) / dims,
    }


def read_folder(folder: Path, shape: tuple[int, ...], levels: int) -> np.ndarray:
    """The unchanged images of ``folder``, uint8 ``(n, *shape)``, in the order of their names.

    Names that begin with a dot are ignored.

    Raises:
      ValueError: something in the folder is not a picture that :func:`write_folder` would write
        with the same pixels and colours.
    """
    paths = sorted(p for p in folder.iterdir() if not p.name.startswith("."))
    if not paths:
        raise ValueError(f"--source={folder}: no files: give a folder of images")
    images = []
    for path in paths:
        try:
            images.append(_unchanged(path, shape, levels))
        except Exception as error:  # Pillow's decoders raise many kinds for broken files.
            raise ValueError(
                f"{printable(str(path))} cannot be coded without loss, so nothing is coded: "
                f"{printable(str(error))}. Take it out of the folder, or take another model"
            ) from None
    return np.stack(images)


def _unchanged(path: Path, shape: tuple[int, ...], levels: int) -> np.ndarray:
    """The pixels of a picture, uint8 ``shape``, if :func:`_picture` makes the same picture."""
    if path.is_dir() or special(path):
        raise ValueError("it is a folder, a FIFO, a device or a socket")
    modes = {(1, 256): "L", (3, 256): "RGB"}
    expected = modes.get((shape[-1], levels), "P")  # With fewer levels, pixels are indices.
    with Image.open(path) as image:
        check_opened(path, image)
        pixels = np.asarray(image).reshape(image.height, image.width, -1)
        if image.mode != expected or pixels.shape != shape or pixels.max() >= levels:
            raise ValueError(
                f"it has mode {image.mode}, shape {pixels.shape} and largest pixel {pixels.max()},"
                f" but the model has images of mode {expected}, shape {shape} and {levels} levels"
            )
        if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            raise ValueError("its EXIF orientation, which says how to turn it, would be lost")
        again = _picture(pixels, levels)
        if image.convert("RGBA").tobytes() != again.convert("RGBA").tobytes():
            raise ValueError("it has transparent pixels, or colours in its palette")
    return pixels


def _picture(pixels: np.ndarray, levels: int) -> Image.Image:
    """An image ``(h, w, c)`` as a picture. With fewer than 256 levels, a pixel is an index into a
    palette of greys."""
    if levels == 256:
        return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    image = Image.frombytes("P", pixels.shape[1::-1], pixels.tobytes())
    image.putpalette((np.arange(levels) * 255 // (levels - 1)).repeat(3).tolist())
    return image


def files_of(folder: Path, count: int) -> list[Path]:
    """The PNG files of ``count`` images."""
    return [folder / f"{number:0{len(str(count - 1))}d}.png" for number in range(count)]


def write_folder(folder: Path, pixels: np.ndarray, ids: np.ndarray, levels: int) -> None:
    """Write the images ``ids (m,)`` of ``pixels (n, h, w, c)`` as PNG files named by their ids."""
    folder.mkdir(parents=True, exist_ok=True)
    files = files_of(folder, len(pixels))
    for number in ids:
        _picture(pixels[number], levels).save(files[number])
