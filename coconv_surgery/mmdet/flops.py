"""Parameters and FLOPs of the detector that a config describes, without its data set."""

from typing import Any, NamedTuple

from mmengine import Config
from mmengine.analysis import get_model_complexity_info
from mmengine.model import revert_sync_batchnorm

from coconv_surgery.layers.arguments import Pair
from coconv_surgery.mmdet.building import build_detector
from coconv_surgery.mmdet.inputs import example_inputs


class Complexity(NamedTuple):
    """What a detector costs.

    Attributes:
        parameters: Number of parameters.
        flops: FLOPs of a forward pass on one image as mmengine counts them, a multiply-add as one.
    """

    parameters: int
    flops: int


def count_config(config: str, image_size: Pair) -> Complexity:
    """Count the parameters and FLOPs of the detector that a config file describes.

    Args:
        config: Path of the file.
        image_size: Height and width of the image.

    Returns:
        Parameters and FLOPs.
    """
    return count_complexity(Config.fromfile(config).model, image_size)


def count_complexity(model: Any, image_size: Pair) -> Complexity:
    """Count the parameters and FLOPs of a detector.

    Args:
        model: The ``model`` of a config.
        image_size: Height and width of the image.

    Returns:
        Parameters and FLOPs.
    """
    detector = revert_sync_batchnorm(build_detector(model)).eval()
    inputs = dict(example_inputs(detector, image_size).kwargs)
    image = inputs.pop("inputs")
    forward = detector.forward
    detector.forward = lambda image: forward(image, **inputs, mode="tensor")
    info = get_model_complexity_info(detector, inputs=image, show_table=False, show_arch=False)
    return Complexity(info["params"], int(info["flops"]))
