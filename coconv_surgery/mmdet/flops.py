"""Parameters and FLOPs of a detector, without its data set."""

import copy
from typing import NamedTuple

import torch.nn as nn
from mmengine.analysis import get_model_complexity_info
from mmengine.model import revert_sync_batchnorm

from coconv_surgery.layers.arguments import Pair
from coconv_surgery.mmdet.inputs import example_inputs


class Complexity(NamedTuple):
    """What a detector costs.

    Attributes:
        parameters: Number of parameters.
        flops: FLOPs of a forward pass on one image as mmengine counts them, a multiply-add as one.
    """

    parameters: int
    flops: int


def count_complexity(detector: nn.Module, image_size: Pair) -> Complexity:
    """Count the parameters and FLOPs of a detector.

    Args:
        detector: The detector.
        image_size: Height and width of the image.

    Returns:
        Parameters and FLOPs.
    """
    counted = revert_sync_batchnorm(copy.deepcopy(detector)).eval()
    inputs = dict(example_inputs(counted, image_size).kwargs)
    image = inputs.pop("inputs")
    forward = counted.forward
    counted.forward = lambda image: forward(image, **inputs, mode="tensor")
    info = get_model_complexity_info(counted, inputs=image, show_table=False, show_arch=False)
    return Complexity(info["params"], int(info["flops"]))
