"""What surgery costs: seconds to plan and to convert, peak memory, and how both grow with the network."""

import multiprocessing
import statistics
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import timm
import torch
import torch.nn as nn

from coconv_surgery.bench.heap import keep_freed_memory, return_freed_memory
from coconv_surgery.bench.memory import high_water_mib
from coconv_surgery.surgery import convert, plan_conversion, revert
from coconv_surgery.tracing.inputs import Inputs, infer_inputs

MODELS = (
    "resnet18",
    "resnet26",
    "resnet50",
    "resnet101",
    "resnet152",
    "efficientnet_b0",
    "hrnet_w48",
    "Faster R-CNN R50 FPN, 800×1333",
    "SSD300 VGG16",
    "100 convs in a row",
    "1000 convs in a row",
)
_CONFIGS = {
    "Faster R-CNN R50 FPN, 800×1333": ("faster_rcnn/faster-rcnn_r50_fpn_1x_coco", (800, 1333)),
    "SSD300 VGG16": ("ssd/ssd300_coco", (300, 300)),
}


@dataclass(frozen=True)
class Cost:
    """What surgery on one network costs.

    Attributes:
        model: The network.
        convs: Its convolutions.
        plan_s: Median seconds to plan a conversion.
        convert_s: Median seconds to plan and apply it.
        weights_mib: Memory of its weights in MiB.
        memory: Peak memory of planning and converting, over that of the weights.
    """

    model: str
    convs: int
    plan_s: float
    convert_s: float
    weights_mib: float
    memory: float


def measure(name: str, repeats: int) -> Cost:
    """Measure a network in a process of its own, because peak memory never falls."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context) as executor:
        return executor.submit(_measure, name, repeats, torch.get_num_threads()).result()


def growth(costs: Iterable[Cost]) -> float | None:
    """Seconds a convolution in a network of 1,000 over those in one of 100: 1 where cost is linear.

    Returns:
        The ratio, or None if either network was not measured.
    """
    seconds = {cost.model: cost.convert_s / cost.convs for cost in costs}
    short, long = seconds.get("100 convs in a row"), seconds.get("1000 convs in a row")
    return None if short is None or long is None else long / short


def _measure(name: str, repeats: int, threads: int) -> Cost:
    torch.set_num_threads(threads)
    return_freed_memory()
    with torch.device("meta"):
        plan_conversion(timm.create_model("resnet18"))  # warms torch's imports and caches up
    model, inputs = _build(name)
    before = high_water_mib()
    revert(convert(model, example_inputs=inputs))
    after = high_water_mib()
    keep_freed_memory()
    plan_seconds, convert_seconds = [], []
    for _ in range(repeats):
        start = time.perf_counter()
        plan = plan_conversion(model, example_inputs=inputs)
        plan_seconds.append(time.perf_counter() - start)
        start = time.perf_counter()
        convert(model, example_inputs=inputs)
        convert_seconds.append(time.perf_counter() - start)
        revert(model)
    weights = sum(tensor.nbytes for tensor in model.state_dict().values()) / 2**20
    return Cost(
        name,
        len(plan.rows),
        statistics.median(plan_seconds),
        statistics.median(convert_seconds),
        weights,
        1 + (after - before) / weights,
    )


def _build(name: str) -> tuple[nn.Module, Inputs]:
    if name in _CONFIGS:
        from mmengine.config import Config

        from coconv_surgery.mmdet.building import build_detector
        from coconv_surgery.mmdet.inputs import example_inputs
        from coconv_surgery.sweep.mmdet_configs import CONFIGS

        path, size = _CONFIGS[name]
        detector = build_detector(Config.fromfile(CONFIGS / f"{path}.py").model)
        return detector, example_inputs(detector, size)
    if name.endswith("in a row"):
        count = int(name.split()[0])
        channels = (3, *[8] * (count - 1))
        blocks = [
            nn.Sequential(nn.Conv2d(inputs, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
            for inputs in channels
        ]
        model = nn.Sequential(*blocks)
        return model, infer_inputs(model, 32)
    model = timm.create_model(name)
    return model, infer_inputs(model)
