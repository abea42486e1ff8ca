"""What looks at images for the quality metrics, by name: one file each.

    extractor = EXTRACTORS[name](weights="...", sha256="...", levels=..., cache=...)
    features, probabilities = extractor(images)       uint8 (n, h, w, c) -> (n, d), (n, classes)

``inception`` gives FID, KID and the Inception Score. ``digits_classifier`` is trained here, in
a second, on the embedded digits; its distances are never called by those names.
"""

from sbml.features import digits_classifier, inception
from sbml.features._extractor import Extractor

EXTRACTORS = {"inception": inception.extractor, "digits_classifier": digits_classifier.extractor}

__all__ = ["EXTRACTORS", "Extractor"]
