"""What the tests of classification share: the configs, and a folder of class folders that learns in seconds."""

from pathlib import Path

import numpy as np
import pytest
from mmengine.config import Config
from mmengine.registry import DefaultScope
from PIL import Image

import coconv_surgery.classification  # noqa: F401

CONFIGS = Path(__file__).parents[2] / "configs" / "imagenet"
COLOURS = {
    "blue": (40, 60, 200),
    "cyan": (40, 190, 190),
    "grey": (120, 120, 120),
    "olive": (110, 130, 30),
    "pink": (220, 120, 180),
    "red": (200, 50, 40),
}


@pytest.fixture(autouse=True)
def _mmdet_scope():
    with DefaultScope.overwrite_default_scope("mmdet"):
        yield


@pytest.fixture(scope="session")
def configs() -> Path:
    return CONFIGS


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    """Noisy images of six colours: eight each to train on, and an odd number to validate on."""
    root, noise = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for name, colour in COLOURS.items():
        for split, count in (("train", 8), ("val", 2 if name == "red" else 1)):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = np.clip(noise.normal(colour, 30, (48, 64, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{index}.png")
    return root


@pytest.fixture
def small(images) -> dict:
    """Options that fit a config of ImageNet to those images and to seconds: a narrow network, at 64×64."""
    options = {
        "model.num_classes": len(COLOURS),
        "model.channels": (8, 16, 32, 64),
        "model.zero_init_last": True,
        "train_dataloader.batch_size": 12,
        "optim_wrapper.optimizer.lr": 0.02,
        "default_hooks.logger.interval": 1,
    }
    for split, folder in (("train", "train"), ("val", "val"), ("test", "val")):
        loader = f"{split}_dataloader"
        options[f"{loader}.dataset.root"] = str(images / folder)
        options[f"{loader}.dataset.transform.input_size"] = 64
        options[f"{loader}.num_workers"] = 0
        options[f"{loader}.persistent_workers"] = False
    return options


@pytest.fixture
def coresnet50() -> Config:
    return Config.fromfile(CONFIGS / "coresnet50_8xb32_in1k.py")
