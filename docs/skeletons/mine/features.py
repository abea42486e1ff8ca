"""A feature extractor: replace ``look``, and name its version in the first argument."""

import numpy as np

from sbml.program.features import Extractor


def raw_pixels(weights, sha256, levels, cache):
    def look(images):
        features = images.reshape(len(images), -1) / levels
        return features, np.full((len(images), 2), 0.5)

    return Extractor("raw pixels", ("pixel_frechet", "pixel_kernel", "class_score"), look)
