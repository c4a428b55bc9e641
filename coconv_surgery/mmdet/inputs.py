"""Inputs to run a detector with, without its data."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn as nn
from mmcv.utils import ext_loader
from mmdet.models.detectors import SemiBaseDetector
from mmdet.models.mot import BaseMOTModel
from mmdet.structures import DetDataSample, TrackDataSample
from mmengine.structures import InstanceData

from coconv_surgery.layers.arguments import Pair
from coconv_surgery.tracing.inputs import Inputs

_PROPOSALS = 4
# What mmcv says of a device without a kernel, torch of a tensor without data, and mmcv again of a map too small for a
# deformable convolution and of boxes from untrained weights.
_NO_KERNEL = (
    "implementation for device",
    "data pointer",
    "data is not allocated",
    "input image is smaller than kernel",
    "ROIs in ROIAlign",
)


def example_inputs(detector: nn.Module, image_size: Sequence[int]) -> Inputs:
    """Make inputs that show which convolution of a detector runs on how large a map.

    Args:
        detector: A model of mmdet's.
        image_size: Height and width of the image, before the data preprocessor pads it.

    Returns:
        One blank image that fills its padded size, for a forward pass in mode ``"tensor"`` (of both networks where a
        teacher averages a student), or ``"predict"`` for a tracker. The pass is meant for a copy of the detector, such
        as a trace makes: it runs few proposals, and operations of mmcv without a kernel for the tensors at hand leave
        their output blank.
    """
    height, width = padded(image_size, getattr(detector.data_preprocessor, "pad_size_divisor", 1))
    shape = (height, width)
    parameter = next(detector.parameters(), torch.empty(0))
    device = torch.device("cpu") if parameter.is_meta else parameter.device
    boxes = _boxes(height, width).to(device)
    sample = DetDataSample(
        metainfo={
            "img_id": 0,
            "ori_shape": shape,
            "img_shape": shape,
            "pad_shape": shape,
            "batch_input_shape": shape,
            "scale_factor": (1.0, 1.0),
            "frame_id": 0,
        },
        proposals=boxes,
        gt_instances=boxes,
    )
    return Inputs(
        kwargs={"inputs": torch.zeros(1, 3, height, width, device=device), "data_samples": [sample]},
        call=_run,
        needs_numbers=any(hasattr(module, "roi_head") for module in detector.modules()),
    )


def padded(size: Sequence[int], divisor: int) -> Pair:
    """Round a size up to multiples.

    >>> padded((800, 1333), 32)
    (800, 1344)
    """
    height, width = (-(-side // divisor) * divisor for side in size)
    return height, width


def _boxes(height: int, width: int) -> InstanceData:
    corners = torch.tensor([[0.0, 0.0, width / 2, height / 2], [width / 4, height / 4, width - 1.0, height - 1.0]])
    return InstanceData(bboxes=corners, scores=torch.ones(2), labels=torch.zeros(2, dtype=torch.long))


def _run(detector: nn.Module, inputs: torch.Tensor, data_samples: list[DetDataSample]) -> Any:
    for module in detector.modules():
        settings = getattr(module, "test_cfg", None)
        if isinstance(settings, dict) and "max_per_img" in settings:
            settings["max_per_img"] = min(settings["max_per_img"], _PROPOSALS)
        rpn_head: Any = getattr(module, "rpn_head", None)
        if rpn_head is not None:
            rpn_head.predict = partial(_predict_some, type(rpn_head).predict, rpn_head, data_samples[0].proposals)
    with _blank_without_kernel():
        return _forward(detector, inputs, [sample.new() for sample in data_samples])


def _forward(detector: nn.Module, inputs: torch.Tensor, data_samples: list[DetDataSample]) -> Any:
    if isinstance(detector, SemiBaseDetector):
        # The student is trained; the teacher, its average, is tested.
        return [_forward(part, inputs, data_samples) for part in (detector.student, detector.teacher)]
    if isinstance(detector, BaseMOTModel):  # has no mode "tensor"
        video = TrackDataSample(metainfo={"ori_length": 1})
        video.video_data_samples = data_samples
        return detector(inputs.unsqueeze(0), [video], mode="predict")
    return detector(inputs, data_samples, mode="tensor")


def _predict_some(
    predict: Callable[..., list[InstanceData]], head: nn.Module, some: InstanceData, *args: Any, **kwargs: Any
) -> list[InstanceData]:
    """Let a head predict proposals, and supply some where untrained weights predict none."""
    return [found if len(found) else some for found in predict(head, *args, **kwargs)]


@contextlib.contextmanager
def _blank_without_kernel() -> Iterator[None]:
    """Let mmcv's operations without a kernel for their tensors leave their output as allocated."""
    extension = ext_loader.load_ext("_ext", [])
    kernels = {name: value for name, value in vars(extension).items() if callable(value) and not name.startswith("_")}

    def blank(kernel: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                return kernel(*args, **kwargs)
            except RuntimeError as error:
                if not any(reason in str(error) for reason in _NO_KERNEL):
                    raise

        return call

    try:
        for name, kernel in kernels.items():
            setattr(extension, name, blank(kernel))
        yield
    finally:
        for name, kernel in kernels.items():
            setattr(extension, name, kernel)
