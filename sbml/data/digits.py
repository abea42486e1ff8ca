"""The 1,797 handwritten digits inside scikit-learn: 8x8 grey, 17 levels.

E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI (1998); its test part.
The last 360 images are the test split.
"""

import numpy as np

from sbml.data._examples import ImageSet, Options, Source

TEST_COUNT, LEVELS = 360, 17


class Digits(Source):
    """8x8x1 images with values 0 .. 16: 1,437 to train on, 360 to test on."""

    def load(self, split: str, options: Options) -> ImageSet:
        """The images of ``split``; no option applies."""
        from sklearn.datasets import load_digits  # here: it takes a second to import

        found = load_digits()
        images, labels = found.images[..., None].astype(np.uint8), found.target.astype(str)
        part = slice(None, -TEST_COUNT) if split == "train" else slice(-TEST_COUNT, None)
        return ImageSet("digits", "1", split, images[part], levels=LEVELS, labels=labels[part])
