"""What calibration costs: seconds, and peak memory of the process."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace

import timm
import torch

from coconv_surgery.bench.heap import keep_freed_memory, return_freed_memory
from coconv_surgery.bench.memory import high_water_mib
from coconv_surgery.calibration import calibrate
from coconv_surgery.surgery import convert

MODELS = ("resnet18", "resnet50", "efficientnet_b0")
_IMAGES, _SIDE = 64, 224


@dataclass(frozen=True)
class Cost:
    """What calibration of one network costs, on 64 images of 224×224.

    Attributes:
        model: The network.
        convs: The convolutions that were solved.
        seconds: How long it took.
        peak_mib: Peak memory of the process in MiB, images and imported libraries included.
    """

    model: str
    convs: int
    seconds: float
    peak_mib: float


def measure(name: str) -> Cost:
    """Measure a network in two processes of its own: freed memory is kept for time, and returned for peak memory."""
    context, threads = multiprocessing.get_context("spawn"), torch.get_num_threads()
    costs = []
    for keep in (True, False):
        with ProcessPoolExecutor(1, context) as executor:
            costs.append(executor.submit(_measure, name, threads, keep).result())
    return replace(costs[0], peak_mib=costs[1].peak_mib)


def _measure(name: str, threads: int, keep: bool) -> Cost:
    torch.set_num_threads(threads)
    (keep_freed_memory if keep else return_freed_memory)()
    model = convert(timm.create_model(name).eval(), input_size=_SIDE)
    # Neighbouring pixels of real images are alike.
    images = torch.nn.functional.avg_pool2d(torch.randn(_IMAGES, 3, _SIDE, _SIDE), 5, stride=1, padding=2)
    report = calibrate(model, images)
    return Cost(name, len(report.solved), report.seconds, high_water_mib())
